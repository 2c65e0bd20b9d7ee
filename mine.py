"""Where hard negatives come from (section 4.1; NV-Retriever, arXiv 2407.15831): encode, search, filter.

    python mine.py                            teacher runs/stage1, stage 2's retrieval sets -> runs/mined
    python mine.py --model intfloat/e5-mistral-7b-instruct --data my.jsonl --corpus wiki.jsonl.gz --out mined
    torchrun --nproc-per-node 8 mine.py       the same files, made by 8 ranks

Vectors go to disk once, to .cache/maps, in shards that later runs find by what they hold and that the ranks share out;
rank 0 searches them block by block in bounded memory. Texts stay in memory. Each output has the name of its rows;
NAME.json beside it says the teachers, their hashes, the settings and what every filter dropped. A set whose NAME.json
says the same is not mined again; an interrupted one goes on with the next shard, then searches. Q queries, k
candidates, D width.
"""

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import nvembed
from data.prepare import cache, check_row, json_lines, read_recipe, read_rows, renamed, resolve, write_rows
from nvembed import FAMILIES, attempt, expect, read_json

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
WIDE = 1024  # D from which products in bf16 pay on CPUs that have them; below faiss is as fast
SHARD = 4096  # texts of a file of vectors
# the rules with their bounds; sampled and top1 are percpos that then choose at random, top1 after the best
RULES = dict(percpos=0.95, naive=1e9, shifted=10, abs=0.7, margin=0.05, sampled=0.95, top1=0.95)


# ---- vectors


@functools.lru_cache(maxsize=1)
def load_teacher(folder, dtype, max_length):
    """encode(texts, tasks) -> unit rows (B, D) fp32, of a model nvembed loads or a sentence-transformers
    folder, which has no tasks."""
    if (folder / "modules.json").exists() and read_json(folder / "config.json")["model_type"] not in FAMILIES:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(folder), device=DEVICE)
        return lambda texts, tasks: peer.encode(texts, normalize_embeddings=True, show_progress_bar=not RANK)
    dtype = torch.float32 if dtype == "float32" else nvembed.fast_dtype(DEVICE)
    model = nvembed.NVEmbed.from_pretrained(folder, DEVICE, dtype)
    return lambda texts, tasks: model.encode(texts, tasks, max_length, progress=not RANK)


def encoded(texts, tasks, teacher, args):
    """Unit vectors of texts -> shards: list of (SHARD, D) in args.dtype, mapped from files, the last one shorter.
    A file is named by the hash of its texts, teacher and settings: it is whole and right, or one of the ranks
    makes it. Equal runs of texts, as at the start of corpora, are encoded once."""
    parts = [slice(i, i + SHARD) for i in range(0, len(texts), SHARD)]
    paths = [place(teacher[1], args.max_length, args.dtype, texts[p], tasks[p]) for p in parts]
    for path, part in list(zip(paths, parts, strict=True))[RANK::RANKS]:
        if not path.exists():
            found = load_teacher(teacher[0], args.dtype, args.max_length)(texts[part], tasks[part])
            expect(np.isfinite(found).all(), f"{teacher[0]}: a vector that is not finite, of texts {part}")
            with renamed(path) as temporary:
                save_file({"vectors": torch.from_numpy(found).to(getattr(torch, args.dtype))}, temporary)
    while not all(path.exists() for path in paths):
        time.sleep(0.1)  # other ranks make them; if one fails torchrun ends all
    return [nvembed.read_tensors(path)["vectors"] for path in paths]


def take(shards, ids):
    """Rows of shards, all but the last equally long, by sorted ids -> (n, D) in their dtype. [] would take twice as
    long."""
    place, row = np.divmod(ids, len(shards[0]))
    return torch.cat([shards[i].index_select(0, torch.as_tensor(row[place == i])) for i in np.unique(place)])


# ---- search


def dots(q_QD, rows, shards, ids, memory):
    """fp32 inner products of queries `rows` (n,) with documents `ids` (n,) -> (n,). Each is summed alone: the
    same in any order, block or rank."""
    out, order = np.empty(len(ids)), ids.argsort(kind="stable")
    for part in np.array_split(order, 1 + len(ids) * q_QD.shape[1] * 16 // min(memory, 2**22)):
        out[part] = take([q_QD], rows[part]).float().mul_(take(shards, ids[part])).sum(dim=1)
    return out


def scan(q_QD, shards, deep, memory):
    """The `deep` best of all documents by products in q_QD's dtype: scores (Q, deep), ids (Q, deep); those that
    tie at the last place are any."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # rounded once, order stays
    best, start = torch.full((len(q_QD), deep), -torch.inf, device=q_QD.device), 0
    ids = torch.zeros_like(best, dtype=torch.int64)
    height = max(1, memory // 4 // (4 * q_QD.shape[1] + 8 * len(q_QD)))
    for block in tqdm([block for shard in shards for block in shard.split(height)], desc="search"):
        block = block.to(q_QD)
        if block.is_cuda or block.dtype == torch.bfloat16:
            scores = q_QD @ block.T
            above = (scores > best.amin(dim=1, keepdim=True)).sum(dim=1)  # few, once some blocks are seen
            found = scores.topk(min(deep, int(above.max())), sorted=False)
        else:
            found = faiss.knn(q_QD, block, min(deep, len(block)), faiss.METRIC_INNER_PRODUCT)
        best, keep = torch.cat([best, torch.as_tensor(found[0]).float()], dim=1).topk(deep, sorted=False)
        ids = torch.cat([ids, torch.as_tensor(found[1]) + start], dim=1).gather(1, keep)
        start += len(block)
    return best.cpu().numpy(), ids.cpu().numpy()


def search(queries, shards, k, memory=2**30, index=None, exact=False):
    """The k documents of largest inner product: queries (Q, D), shards [(m, D), ...] -> scores (Q, k), ids (Q,
    k), best first, ties by lower id; what an approximate `index` does not find is -inf. Shards are of one size, the
    last one shorter.

    Scores are fp32 inner products of the vectors in the shards' dtype, of the best 2 k candidates: by faiss in
    fp32; from width WIDE and on GPUs by products rounded to bf16, which keeps their order: where k are above
    the last, the k best are among the k and what ties with them, and else fp32 searches again.
    """
    q_QD, deep = queries.to(shards[0].dtype), min(2 * k, sum(map(len, shards)))
    fast = torch.cpu.get_capabilities().get("avx512_bf16") and q_QD.shape[1] >= WIDE or DEVICE != "cpu"
    half = fast and q_QD.dtype == torch.bfloat16 and not (exact or index)
    q = q_QD.to(DEVICE, torch.bfloat16 if half else torch.float32)
    scores, ids = index.search(q.cpu(), deep) if index else scan(q, shards, deep, memory)
    unsure = half and deep == 2 * k and (scores > scores.min(1)[:, None]).sum(1) < k
    near = scores >= np.partition(scores, -k)[:, -k, None] if half and k < deep else ids >= 0
    scores[near] = dots(q_QD, np.nonzero(near)[0], shards, ids[near], memory // 8)
    scores[~near] = -np.inf
    order = np.lexsort((ids, -scores))[:, :k]
    scores, ids = (np.take_along_axis(a, order, axis=1) for a in (scores, ids))
    if np.any(unsure):
        scores[unsure], ids[unsure] = search(q_QD[unsure], shards, k, memory, exact=True)
    return scores, ids


def build_index(shards, text):
    """An approximate index, in memory: faiss's factory string and, after a space, settings of the search."""
    factory, _, settings = text.partition(" ")
    index = faiss.index_factory(shards[0].shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(torch.cat([shard[:: 1 + len(shards) // 32] for shard in shards]).float())
    for shard in tqdm(shards, desc=text):
        index.add(shard.float())
    faiss.ParameterSpace().set_index_parameters(index, settings)
    return index


# ---- negatives


def same(text):
    """Texts that differ in case or white space only are one document."""
    return " ".join(text.split()).casefold()


def build_corpus(rows, paths=()):
    """Rows, files of {"text": str} or of more rows -> (distinct documents, the files' first; for each row the ids
    of its positives; for each row those of its query's in any row)."""
    documents, positives = {}, {}
    lines = chain(*map(json_lines, paths))
    more = (check_row({"query": "-", "pos": [r["text"]]} if "text" in r else r, at) for at, r in lines)
    for row in chain(more, rows):
        for text in row["pos"] + row["neg"]:
            documents.setdefault(same(text), text)
    ids = {key: i for i, key in enumerate(documents)}
    own = [[ids[same(text)] for text in row["pos"]] for row in rows]
    for row, found in zip(rows, own, strict=True):
        positives.setdefault(same(row["query"]), []).extend(found)
    return list(documents.values()), own, [list(positives[same(row["query"])]) for row in rows]


def allowed(scores, positive, known, rule, bound):
    """The rule's verdict on candidates: scores (Q, k), lowest positive's score (Q,), known positives (Q, k)
    -> (Q, k).

    All comparisons are strict. percpos is positive - (1 - p) |positive|, which is p x positive where that is
    positive.
    """
    if rule == "shifted":
        return np.cumsum(~known, axis=1) > bound
    if rule in ("naive", "abs"):
        return scores < bound
    return scores < (positive - (bound if rule == "margin" else (1 - bound) * np.abs(positive)))[:, None]


def choose(usable, n, rule, seeds):
    """Columns of the n usable candidates (Q, k) taken for each query, in order of choice; what is random has a
    seed for each query."""
    k, random = usable.shape[1], rule in ("sampled", "top1")
    key = np.stack([np.random.default_rng(seed).random(k) if random else np.arange(k) for seed in seeds])
    if rule == "top1":
        key[np.arange(len(key)), usable.argmax(axis=1)] = -1
    order = np.where(usable, key, np.inf).argsort(axis=1, kind="stable")[:, :n]
    return [line[:count] for line, count in zip(order, usable.sum(axis=1), strict=True)]


def mine(rows, teachers, entry, args, corpus=()):
    """Rows -> on rank 0 (rows with neg, neg_scores and, of the last teacher, pos_scores; counts of what became of
    all candidates); the others only encode. Each of several teachers gives its share of a row's negatives, one that
    two choose twice unless --distinct (NV-Retriever found that best). Queries are searched for in groups that take
    half of the memory with their candidates."""
    documents, own, excluded = build_corpus(rows, corpus)
    out, counts = [row | {"neg": [], "neg_scores": []} for row in rows], Counter(rows=len(rows))
    task, both = entry["instruction"], entry.get("symmetric", False)
    for t, teacher in enumerate(teachers):
        shards = encoded(documents, [task * both] * len(documents), teacher, args)
        queries = encoded([r["query"] for r in rows], [r.get("prompt", task) for r in rows], teacher, args)
        if RANK:
            continue
        index = args.index and attempt(f"--index {args.index}", build_index, shards, args.index)
        share = (args.negatives + len(teachers) - 1 - t) // len(teachers)
        memory, one = int(args.memory * 2**30), 32 * shards[0].shape[1] + 320 * args.top_k  # bytes; a query's
        expect(one <= memory, f"--memory {args.memory}: expected {one / 2**30:.6f} GiB or more, for a query")
        for some in np.split(np.arange(len(rows)), range(memory // one, len(rows), memory // one)):
            q_QD, pairs = take(queries, some), np.repeat(np.arange(len(some)), [len(own[i]) for i in some])
            own_scores = dots(q_QD, pairs, shards, np.concatenate([own[i] for i in some]), memory // 8)
            own_scores = np.split(own_scores, np.flatnonzero(np.diff(pairs)) + 1)
            scores, ids = search(q_QD, shards, args.top_k, memory, index)
            real, lowest = scores > -np.inf, np.array([line.min() for line in own_scores])
            known = real & np.stack([np.isin(ids[i], excluded[j]) for i, j in enumerate(some)])
            passed = real & ~known & allowed(scores, lowest, known, args.rule, args.bound)
            chosen = choose(passed, share, args.rule, [(args.seed, t, i) for i in some])
            for i, (j, columns) in enumerate(zip(some, chosen, strict=True)):
                out[j]["neg"] += [documents[found] for found in ids[i, columns]]
                out[j]["neg_scores"] += scores[i, columns].round(4).tolist()
                out[j]["pos_scores"] = own_scores[i].round(4).tolist()
                excluded[j] += ids[i, columns].tolist() if args.distinct else []
            kept = sum(map(len, chosen))
            counts.update(candidates=real.sum(), positive=known.sum(), rule=(real & ~known & ~passed).sum())
            counts.update(surplus=passed.sum() - kept, kept=kept)
    counts.update(documents=len(documents), rows_short=sum(len(row["neg"]) < args.negatives for row in out))
    return None if RANK else (out, {name: int(count) for name, count in counts.items()})


def place(*what):
    return cache() / "maps" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.safetensors"


def digest(*paths):
    """First 16 digits of each file's SHA-256."""
    maps = [attempt(path, np.memmap, path, np.uint8) for path in sorted(paths)]
    return " ".join(hashlib.sha256(found).hexdigest()[:16] for found in maps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--model", nargs="+", default=["runs/stage1"], help="teachers: folder, hub id, minilm or smollm2")
    flag("--recipe", default=str(Path(__file__).resolve().parent / "data" / "local.json"))
    flag("--data", nargs="+", help="own rows instead of the retrieval sets of the recipe's stage 2")
    flag("--corpus", nargs="+", default=[], help='more documents: .jsonl(.gz) of {"text": str} or rows')
    flag("--out", default="runs/mined", help="folder for the mined rows")
    flag("--rule", choices=RULES, default="percpos", help="sampled, top1: percpos, then random of top-k")
    flag("--bound", type=float, help=f"of the rule, or ranks skipped; default {RULES}")
    flag("--top-k", type=int, default=100, help="candidates a query")
    flag("--negatives", type=int, default=7)
    flag("--distinct", action="store_true", help="several teachers: no negative twice in a row")
    flag("--index", help="approximate: faiss factory and search settings, 'IVF1024,Flat nprobe=32'")
    flag("--max-length", type=int, help="tokens of a text; default: stage 1's in the recipe")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="float32: the teacher too")
    flag("--memory", type=float, default=1, help="GiB of the search, above program and texts")
    flag("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    entries = [e for e in recipe["datasets"] if e["kind"] in ("retrieval", "sts") and 2 in e["stages"]]
    if args.data:
        entries = [{"file": path, "instruction": ""} for path in args.data]
    args.max_length = args.max_length or recipe["stages"].get("1", {}).get("max_length", 512)
    args.bound = RULES[args.rule] if args.bound is None else args.bound
    found = "runs/stage1" not in args.model or Path("runs/stage1", "config.json").exists()
    expect(found, "runs/stage1: no finished run: run torchrun train.py --stage 1 first, or give --model")
    folders = [nvembed.local_folder(resolve(name)) for name in args.model]
    teachers = [(f, digest(*f.glob("*.safetensors"), *f.glob("**/*.json"))) for f in folders]
    plan = {k: v for k, v in vars(args).items() if k not in ("recipe", "data", "out", "memory")}
    for entry in entries:
        rows, target = read_rows(entry["file"]), Path(args.out, Path(entry["file"]).name)
        corpus, said = [p for p in (*args.corpus, entry.get("corpus")) if p], Path(f"{target}.json")
        told = plan | {"teacher": [name for _, name in teachers], "corpus": corpus and digest(*corpus)}
        told |= {"name": target.name, "instruction": entry["instruction"], "sha256": digest(entry["file"])}
        if target.exists() and said.exists() and read_json(said).get("plan") == told:
            print(f"{target}: already mined so")
        elif found := mine(rows, teachers, entry, args, corpus):
            write_rows(target, found[0])
            done = {"command": "python mine.py " + " ".join(sys.argv[1:]), "plan": told, "counts": found[1]}
            said.write_text(json.dumps(done, indent=2) + "\n")
            print(f"{target}: " + ", ".join(f"{name} {n:,}" for name, n in found[1].items()), flush=True)


if __name__ == "__main__":
    nvembed.run(main)
