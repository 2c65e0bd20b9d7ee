"""Mining at scale: memory, recall, a kill in between, and what each rule does to planted false negatives.

    python tests/mine_scale.py                                    2,000 queries x 200,000 x 1,024 in 128 MiB
    python tests/mine_scale.py --documents 1000000 --mib 512      the same for a million
    python tests/mine_scale.py rules                              the table of the rules

The command mine.py runs whole, in processes of its own, on rows and a corpus whose "teacher" knows a vector for each
text: it is the only stand-in. Vectors are made in a temporary folder (2 KiB a document) that is removed at the end.
Query i has one positive, 3 false negatives (answers that nobody labelled, scored as the positive is, 5 % more or
less) and 6 hard negatives (40 to 96 % of its score); all others are random.
"""

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mine
import numpy as np
import torch

from data.prepare import read_rows, write_rows

FALSE, HARD = 3, 6


# ---- a world in which the truth is known


def noise(key, width):
    v = np.random.Generator(np.random.Philox(key=key)).standard_normal(width, dtype=np.float32)
    return v / np.linalg.norm(v)


def vector(text, width):
    """q7 a query, p7 its positive, f7.1 a false negative, h7.1 a hard one, d7 a random document."""
    kind, (i, j) = text[0], (*map(int, text[1:].split(".")), 0)[:2]
    own = noise(("qpfhd".index(kind) << 48) + (i << 8) + j, width)
    if kind in "qd":
        return own
    draw = np.random.default_rng([i, j, "pfh".index(kind)])
    score = np.random.default_rng(i).uniform(0.4, 0.9)
    score *= {"p": 1, "f": draw.normal(1, 0.05), "h": draw.uniform(0.4, 0.96)}[kind]
    q, score = noise(i << 8, width), min(score, 0.99)
    own -= q * (own @ q)
    return score * q + np.sqrt(1 - score**2) * own / np.linalg.norm(own)


def write_world(folder, queries, documents):
    """rows.jsonl, corpus.jsonl and a teacher's empty folder."""
    write_rows(
        folder / "rows.jsonl", [{"query": f"q{i}", "pos": [f"p{i}"], "neg": []} for i in range(queries)]
    )
    others = [
        f"{kind}{i}.{j}" for i in range(queries) for kind, n in (("f", FALSE), ("h", HARD)) for j in range(n)
    ]
    others += [f"d{i}" for i in range(documents - len(others) - queries)]
    with open(folder / "corpus.jsonl", "w") as file:
        file.writelines(f'{{"text": "{text}"}}\n' for text in others)
    (folder / "teacher").mkdir()


# ---- in a process of its own: the command, watched


def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


class Watch(threading.Thread):
    """Largest anonymous memory above that at the start, sampled every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.base, self.peak, self.seconds, self.on = anonymous(), 0, time.perf_counter(), True
        self.start()

    def run(self):
        while self.on:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

    def stop(self):
        self.on = False
        self.join()
        return {"peak": self.peak - self.base, "seconds": time.perf_counter() - self.seconds}


def one(width, shard, loose, flags):
    """mine.py with the teacher above; prints what it used from the last encoding on: all of search and choice.
    loose, the control: the vectors are in memory, as most would have them."""
    torch.set_num_threads(1)
    torch.ones(64, 2048).bfloat16() @ torch.ones(2048, 64).bfloat16()  # the libraries' own buffers
    mine.faiss.knn(np.ones((64, 64), np.float32), np.ones((2048, 64), np.float32), 4)
    encode = lambda texts, tasks: np.stack([vector(text, width) for text in texts])
    mine.load_teacher, mine.SHARD, watches = (lambda *_: encode), shard, []

    def watched(*args, whole=mine.encoded):
        shards = whole(*args)
        if not loose or not watches:
            watches.append(Watch())
        return [torch.cat(shards)] if loose else shards

    mine.encoded, sys.argv = watched, ["mine.py", *flags]
    mine.nvembed.run(mine.main)
    print(json.dumps(watches[-1].stop() if watches else {}))


# ---- outside of it


def command(folder, out, width, shard, flags, ranks=1, loose=0):
    """-> Popen of mine.py on the world of a folder."""
    start = f"-m torch.distributed.run --standalone --nproc-per-node={ranks}".split() if ranks > 1 else []
    line = [
        sys.executable,
        *start,
        __file__,
        "one",
        "--width",
        width,
        "--shard",
        shard,
        "--loose",
        loose,
        "--",
    ]
    line += "--data rows.jsonl --corpus corpus.jsonl --model teacher --out".split() + [out, *flags]
    environment = os.environ | {"NVEMBED_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    kind = {"stdout": subprocess.PIPE, "text": True, "env": environment, "start_new_session": True}
    return subprocess.Popen(list(map(str, line)), cwd=folder, **kind)


def finished(*args, **kind):
    process = command(*args, **kind)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def killed(folder, moment, *args):
    """Starts the command and kills it, without a chance to tidy up, when moment() is true."""
    process = command(folder, *args)
    while not moment() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def brute_force(folder, queries, k, width):
    """Ids (Q, k) of the best by fp32 products with every vector, and the texts."""
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines] + [f"p{i}" for i in range(queries)]
    rounded = lambda part: torch.from_numpy(np.stack([vector(t, width) for t in part])).bfloat16().float()
    q = rounded([f"q{i}" for i in range(queries)])
    best, ids = torch.full((queries, k), -9.0), torch.zeros(queries, k, dtype=torch.int64)
    for i in range(0, len(texts), 8192):
        scores = torch.cat([best, q @ rounded(texts[i : i + 8192]).T], dim=1)
        columns = torch.cat([ids, torch.arange(i, i + scores.shape[1] - k).expand(queries, -1)], dim=1)
        best, keep = scores.topk(k)
        ids = columns.gather(1, keep)
    return ids, texts


def scale(queries, documents, width, mib, shard=4096, k=100):
    """Memory with the limit and loose, recall, and the file after kills in encoding and in search -> dict."""
    with tempfile.TemporaryDirectory() as name:
        folder, flags = Path(name), ["--rule", "naive", "--negatives", k, "--top-k", k, "--memory"]
        write_world(folder, queries, documents)
        shards = lambda: len(list((folder / "cache/maps").glob("*.safetensors")))
        limited = ("out", width, shard, [*flags, mib / 1024])
        needed = -(-documents // shard) + -(-queries // shard)
        killed(folder, lambda: shards() >= 2, *limited)
        kept = shards()
        killed(folder, lambda: shards() >= needed, *limited)  # all is encoded: it searches
        before = {path: path.stat().st_mtime_ns for path in (folder / "cache/maps").glob("*.safetensors")}
        assert kept < needed == len(before) and not (folder / "out").exists()
        used = finished(folder, *limited)
        assert before == {path: path.stat().st_mtime_ns for path in before}  # nothing is encoded twice
        free = finished(folder, "free", width, shard, [*flags, 8 * mib / 1024], loose=1)
        whole = [(folder / out / "rows.jsonl").read_bytes() for out in ("out", "free")]
        ids, texts = brute_force(folder, queries, k, width)
        hits = [
            len({texts[j] for j in line} & {f"p{i}", *row["neg"]})
            for i, (line, row) in enumerate(
                zip(ids.tolist(), read_rows(folder / "out/rows.jsonl"), strict=True)
            )
        ]
    found = {"queries": queries, "documents": documents, "width": width, "limit_mib": mib}
    found |= {
        "peak_mib": used["peak"] / 2**20,
        "loose_mib": free["peak"] / 2**20,
        "seconds": used["seconds"],
    }
    return found | {"recall": sum(hits) / k / queries, "same": whole[0] == whole[1], "shards_kept": kept}


def rules(queries, documents, width, k=100):
    """rule -> shares of false and of hard negatives among the candidates that it drops, and share of false ones
    among 4 negatives a row."""
    found, encode = {}, lambda texts, _: np.stack([vector(text, width) for text in texts])
    with tempfile.TemporaryDirectory() as name, mock.patch.object(mine, "load_teacher", lambda *_: encode):
        write_world(Path(name), queries, documents)
        rows, corpus = read_rows(Path(name, "rows.jsonl")), [Path(name, "corpus.jsonl")]
        same = {"top_k": k, "seed": 0, "dtype": "bfloat16", "memory": 1, "max_length": 1, "index": None}
        with mock.patch.dict(os.environ, {"NVEMBED_CACHE": name}):
            for rule, bound in mine.RULES.items():
                kept = {}
                for n in (k, 4):  # all that passes; what a row gets
                    args = argparse.Namespace(**same, rule=rule, bound=bound, negatives=n, distinct=False)
                    out, _ = mine.mine(rows, [(Path("teacher"), "")], {"instruction": ""}, args, corpus)
                    own = [
                        text[0]
                        for row in out
                        for text in row["neg"]
                        if text[1:].split(".")[0] == row["query"][1:]
                    ]
                    kept[n] = own.count("f"), own.count("h"), sum(len(row["neg"]) for row in out)
                dropped = [1 - kept[k][i] / queries / (FALSE, HARD)[i] for i in (0, 1)]
                found[rule] = (*dropped, kept[4][0] / kept[4][2])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = functools.partial(parser.add_argument, type=int)
    flag("what", nargs="?", default="scale", choices=("scale", "rules", "one"), type=str)
    flag("--queries", default=2000)
    flag("--documents", default=200000)
    flag("--width", default=1024)
    flag("--mib", default=128)
    flag("--shard", default=4096)
    flag("--loose", default=0)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]  # after -- they are mine.py's
    if args.what == "one":
        one(args.width, args.shard, args.loose, flags)
    elif args.what == "scale":
        print(json.dumps(scale(args.queries, args.documents, args.width, args.mib, args.shard)))
    else:
        print(
            "| rule | false negatives dropped | hard negatives dropped | false among 4 a row |\n|---|---|---|---|"
        )
        for rule, shares in rules(args.queries, args.documents, args.width).items():
            print(f"| {rule} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
