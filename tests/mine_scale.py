"""Mining at scale: memory, recall, kills in between, and what each rule does to false negatives.

    python tests/mine_scale.py                                  2,000 queries x 200,000 in 128 MiB
    python tests/mine_scale.py --documents 1000000 --mib 512    the same for a million
    python tests/mine_scale.py rules                            the table of the rules

The command mine.py runs whole, in processes of its own, on rows and a corpus whose "teacher" knows
a vector for each text: that is the only stand-in. Vectors go to a temporary folder (2 KiB a
document), which is removed at the end. Query i has one positive, 3 false negatives (answers that
nobody labelled, scored as the positive is, 5 % more or less) and 6 hard negatives (40 to 96 % of
its score); all other documents are random.
"""

import argparse
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
import faiss
import mine
import numpy as np
import torch

from data.commands import run_command
from data.files import write_rows
from data.rows import read_rows

FALSE = 3  # false negatives of a query
HARD = 6  # hard negatives of a query
KINDS = "qpfhd"  # query, positive, false negative, hard negative, random document


# ---- a world in which the truth is known


def write_world(folder, queries, documents):
    """Writes rows.jsonl, corpus.jsonl and a teacher's empty folder.

    Texts are q7 for a query, p7 for its positive, f7.1 and h7.1 for a false and a hard negative,
    d7 for a random document.
    """
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": []} for i in range(queries)]
    write_rows(folder / "rows.jsonl", rows)
    texts = []
    for i in range(queries):
        texts += [f"f{i}.{j}" for j in range(FALSE)]
        texts += [f"h{i}.{j}" for j in range(HARD)]
    texts += [f"d{i}" for i in range(documents - len(texts) - queries)]
    with open(folder / "corpus.jsonl", "w") as file:
        file.writelines(f'{{"text": "{text}"}}\n' for text in texts)
    (folder / "teacher").mkdir()


def noise(key, width):
    vector = np.random.Generator(np.random.Philox(key=key)).standard_normal(width, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def planted_vector(text, width):
    """The unit vector (width,) of a text."""
    kind = text[0]
    query, _, number = text[1:].partition(".")
    i = int(query)
    j = int(number or 0)
    own = noise((KINDS.index(kind) << 48) + (i << 8) + j, width)
    if kind in "qd":
        return own
    draw = np.random.default_rng([i, j, "pfh".index(kind)])
    score = np.random.default_rng(i).uniform(0.4, 0.9)
    if kind == "f":
        score *= draw.normal(1, 0.05)
    if kind == "h":
        score *= draw.uniform(0.4, 0.96)
    score = min(score, 0.99)
    q = noise(i << 8, width)
    own -= q * (own @ q)  # now orthogonal to the query
    return score * q + np.sqrt(1 - score**2) * own / np.linalg.norm(own)


class PlantedTeacher:
    """Stands in for mine.load_teacher."""

    def __init__(self, width):
        self.width = width

    def __call__(self, teacher):
        return self.encode

    def encode(self, texts, tasks):
        return np.stack([planted_vector(text, self.width) for text in texts])


# ---- in a process of its own: the command, watched


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


class Watch(threading.Thread):
    """Largest anonymous memory above that at the start, sampled every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.base = anonymous_bytes()
        self.peak = self.base
        self.begin = time.perf_counter()
        self.on = True
        self.start()

    def run(self):
        while self.on:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def stop(self):
        self.on = False
        self.join()
        seconds = time.perf_counter() - self.begin
        return {"peak": self.peak - self.base, "seconds": seconds}


class WatchedEncoding:
    """mine.encode_to_disk that starts a watch at its end: the last one sees search and choice.

    loose, the control: vectors are copied into memory, as most would have them, and the first
    watch, of the documents' encoding, is the one that counts.
    """

    def __init__(self, loose):
        self.encode_to_disk = mine.encode_to_disk
        self.loose = loose
        self.watch = None

    def __call__(self, *arguments):
        shards = self.encode_to_disk(*arguments)
        if self.watch is None or not self.loose:
            self.watch = Watch()
        if self.loose:
            return [torch.cat(shards)]
        return shards


def watched_command(width, shard, loose, flags):
    """Runs mine.py with the planted teacher; prints the memory and seconds of its search."""
    torch.set_num_threads(1)
    torch.ones(64, 2048).bfloat16() @ torch.ones(2048, 64).bfloat16()  # the libraries' own buffers
    faiss.knn(np.ones((64, 64), np.float32), np.ones((2048, 64), np.float32), 4)
    watched = WatchedEncoding(loose)
    mine.load_teacher = PlantedTeacher(width)
    mine.SHARD = shard
    mine.encode_to_disk = watched
    sys.argv = ["mine.py", *flags]
    run_command(mine.main)
    used = {}
    if watched.watch is not None:
        used = watched.watch.stop()
    print(json.dumps(used))


# ---- outside of it


def start(folder, out, width, shard, flags, ranks=1, loose=0, stderr=None):
    """Starts mine.py on the world of a folder -> Popen."""
    command = [sys.executable]
    if ranks > 1:
        command += f"-m torch.distributed.run --standalone --nproc-per-node={ranks}".split()
    command += [__file__, "one", "--width", width, "--shard", shard, "--loose", loose, "--"]
    command += "--data rows.jsonl --corpus corpus.jsonl --model teacher".split()
    command += ["--out", out, *flags]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | {"NVEMBED_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def finish(*arguments, **options):
    """The same to its end -> what it used."""
    process = start(*arguments, **options)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def kill_when(moment, folder, *arguments):
    """Starts it and kills it, without a chance to tidy up, when moment() is true."""
    process = start(folder, *arguments)
    while not moment() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def shard_times(folder):
    """Each file of vectors: when it was written."""
    paths = (folder / "cache/maps").glob("*.safetensors")
    return {path: path.stat().st_mtime_ns for path in paths}


def scale(queries, documents, width, mib, shard=4096, k=100):
    """Memory with the limit and loose, recall, and the file after kills in encoding and search."""
    flags = ["--rule", "naive", "--negatives", k, "--top-k", k, "--memory"]
    limited = ("out", width, shard, [*flags, mib / 1024])
    free = ("free", width, shard, [*flags, 8 * mib / 1024])
    needed = -(-documents // shard) + -(-queries // shard)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, queries, documents)
        kill_when(lambda: len(shard_times(folder)) >= 2, folder, *limited)  # it encodes
        kept = len(shard_times(folder))
        kill_when(lambda: len(shard_times(folder)) >= needed, folder, *limited)  # it searches
        before = shard_times(folder)
        assert kept < needed == len(before)
        assert not (folder / "out/rows.jsonl").exists()

        used = finish(folder, *limited)
        assert shard_times(folder) == before  # nothing is encoded twice
        used_loose = finish(folder, *free, loose=1)
        outputs = [(folder / out / "rows.jsonl").read_bytes() for out in ("out", "free")]
        recall = recall_of(folder, queries, k, width)
    return {
        "queries": queries,
        "documents": documents,
        "width": width,
        "limit_mib": mib,
        "peak_mib": used["peak"] / 2**20,
        "loose_mib": used_loose["peak"] / 2**20,
        "seconds": used["seconds"],
        "recall": recall,
        "same": outputs[0] == outputs[1],
        "shards_kept": kept,
    }


def recall_of(folder, queries, k, width):
    """Share of the truly best k documents in what was mined, the positive included."""
    ids, texts = brute_force(folder, queries, k, width)
    mined = read_rows(folder / "out/rows.jsonl")
    hits = 0
    for i, row in enumerate(mined):
        best = {texts[number] for number in ids[i].tolist()}
        hits += len(best & {f"p{i}", *row["neg"]})
    return hits / k / queries


def stored_vectors(texts, width):
    """fp32 vectors rounded to bf16, as files hold them."""
    vectors = np.stack([planted_vector(text, width) for text in texts])
    return torch.from_numpy(vectors).bfloat16().float()


def brute_force(folder, queries, k, width):
    """Ids (Q, k) of the best by fp32 products with every vector, and all texts."""
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts += [f"p{i}" for i in range(queries)]
    q = stored_vectors([f"q{i}" for i in range(queries)], width)
    best = torch.full((queries, k), -9.0)
    ids = torch.zeros(queries, k, dtype=torch.int64)
    for i in range(0, len(texts), 8192):
        scores = q @ stored_vectors(texts[i : i + 8192], width).T
        columns = torch.arange(i, i + scores.shape[1]).expand(queries, -1)
        top = torch.cat([best, scores], dim=1).topk(k)
        best = top.values
        ids = torch.cat([ids, columns], dim=1).gather(1, top.indices)
    return ids, texts


def rules(queries, documents, width, k=100):
    """What each rule does to k candidates of each query.

    -> {rule: (share of the false negatives that it drops, share of the hard ones, share of false
    ones among 4 negatives a row)}
    """
    shares = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, queries, documents)
        with (
            mock.patch.object(mine, "load_teacher", PlantedTeacher(width)),
            mock.patch.dict(os.environ, {"NVEMBED_CACHE": name}),
        ):
            for rule in mine.RULES:
                passed = mined_kinds(folder, rule, k, k)  # all that pass
                row = mined_kinds(folder, rule, 4, k)  # what a row gets
                false = 1 - passed["f"] / (queries * FALSE)
                hard = 1 - passed["h"] / (queries * HARD)
                shares[rule] = (false, hard, row["f"] / row["all"])
    return shares


def mined_kinds(folder, rule, negatives, k):
    """Numbers of mined negatives: false ones of their query, hard ones of their query, all."""
    args = argparse.Namespace(
        rule=rule,
        bound=mine.RULES[rule],
        negatives=negatives,
        top_k=k,
        memory=1,
        index=None,
        distinct=False,
        seed=0,
    )
    teacher = mine.Teacher(folder / "teacher", "", 1, "bfloat16")
    rows = read_rows(folder / "rows.jsonl")
    corpus = [folder / "corpus.jsonl"]
    mined, _ = mine.mine(rows, [teacher], {"instruction": ""}, args, corpus)
    counts = {"f": 0, "h": 0, "all": 0}
    for row in mined:
        counts["all"] += len(row["neg"])
        for text in row["neg"]:
            if text[0] in "fh" and text[1:].split(".")[0] == row["query"][1:]:
                counts[text[0]] += 1
    return counts


def print_rules(shares):
    print("| rule | false negatives dropped | hard negatives dropped | false among 4 a row |")
    print("|---|---|---|---|")
    for rule, three in shares.items():
        print(f"| {rule} | " + " | ".join(f"{share:.1%}" for share in three) + " |")


def main():
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("what", nargs="?", default="scale", choices=("scale", "rules", "one"))
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=200000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--shard", type=int, default=4096)
    parser.add_argument("--loose", type=int, default=0)
    own = sys.argv[1:]
    flags = []
    if "--" in own:  # what follows is for mine.py
        end = own.index("--")
        flags = own[end + 1 :]
        own = own[:end]
    args = parser.parse_args(own)
    if args.what == "one":
        watched_command(args.width, args.shard, args.loose, flags)
    elif args.what == "scale":
        found = scale(args.queries, args.documents, args.width, args.mib, args.shard)
        print(json.dumps(found))
    else:
        print_rules(rules(args.queries, args.documents, args.width))


if __name__ == "__main__":
    main()
