"""Hard negatives for stage 2 (section 4.1.1 of the paper; NV-Retriever, arXiv 2407.15831).

    python mine.py                # teacher runs/stage1, retrieval and STS of stage 2 -> runs/mined
    python mine.py --model intfloat/e5-mistral-7b-instruct --data my.jsonl --corpus wiki.jsonl.gz
    torchrun --nproc-per-node 8 mine.py       # the same files, written by 8 ranks

A teacher embeds every query and document. Of the documents most similar to a query, those about as
similar as its positive are probably answers that nobody labelled: a rule drops them. The best of
the others become the row's "neg".

Vectors are written once, in shards under .cache/maps, where later runs find them by their content.
The ranks share out the encoding; rank 0 searches, block by block in bounded memory. Texts stay in
their files. Each output file has the name of its rows; NAME.json beside it holds the teachers'
hashes, the settings and what became of all candidates. A set whose NAME.json has the same settings
is not mined again; an interrupted one continues with the next shard.

Dimensions: Q queries, k documents asked for, n candidates of a query, m documents of a shard or
block, D width.
"""

import data.threads  # before torch

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch  # before faiss: on macOS the other order can crash
import faiss
from safetensors.torch import save_file
from tqdm import tqdm

from data import base, commands, dialects, files, folders, recipes
from data.columns import data_entry
from data.commands import InputError
from data.corpus import Corpus, Mined, documents_and_tasks, positives_of, queries_and_tasks
from data.machine import fast_dtype
from data.rows import KnownPositives, read_rows
from nvembed import NVEmbed

# The rules (see `allowed`) and their default bounds. sampled and top1 filter as percpos does and
# then choose at random (see `choose`).
RULES = {
    "percpos": 0.95,
    "naive": 1e9,  # no score reaches it
    "shifted": 10,
    "abs": 0.7,
    "margin": 0.05,
    "sampled": 0.95,
    "top1": 0.95,
}
DTYPES = ("bfloat16", "float32")
MINED_KINDS = ("retrieval", "sts")  # of a recipe's data sets
SHARD = 4096  # vectors in a file
WIDE = 1024  # D from which bf16 products pay on CPUs that have them; below, faiss is as fast

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


# ---- vectors


# digest: hash of the model's files; dtype: of vectors on disk, and of the model if it is float32
Teacher = namedtuple("Teacher", "folder digest max_length dtype")


@functools.lru_cache(maxsize=1)  # one model in memory at a time
def load_teacher(teacher):
    """Loads a model -> encode(texts, tasks), which returns unit rows (B, D) in fp32."""
    load_teacher.cache_clear()  # before the next one is loaded
    if dialects.is_sentence_transformer(teacher.folder):
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(teacher.folder), device=DEVICE)  # it knows no tasks
        options = {"normalize_embeddings": True, "show_progress_bar": RANK == 0}
        return lambda texts, tasks: peer.encode(texts, **options)
    dtype = torch.float32 if teacher.dtype == "float32" else fast_dtype(DEVICE)
    model = NVEmbed.from_pretrained(teacher.folder, DEVICE, dtype)
    return functools.partial(model.encode, max_length=teacher.max_length, progress=RANK == 0)


def encode_to_disk(count, read, teacher):
    """Unit vectors of texts -> shards [(SHARD, D), ...], mapped from files; the last is shorter.

    read(slice) gives a part of the `count` texts, and their tasks. A file is named by the hash of
    its texts, teacher and settings: if it exists, it is whole and right. The ranks share out the
    missing ones. Equal shards, as where two corpora begin alike, are encoded once.
    """
    parts = [slice(i, min(i + SHARD, count)) for i in range(0, count, SHARD)]
    paths = [shard_path(*read(part), teacher) for part in parts]
    for i in range(RANK, len(parts), WORLD_SIZE):
        if not paths[i].exists():
            write_shard(paths[i], *read(parts[i]), teacher)
    while not all(path.exists() for path in paths):
        time.sleep(0.1)  # other ranks write them; if one dies, torchrun stops the others
    return [folders.read_tensors(path)["vectors"] for path in paths]


def shard_path(texts, tasks, teacher):
    content = [teacher.digest, teacher.max_length, teacher.dtype, texts, tasks]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    return files.cache() / "maps" / f"{name}.safetensors"


def write_shard(path, texts, tasks, teacher):
    embeddings = load_teacher(teacher)(texts, tasks)
    if not np.isfinite(embeddings).all():
        raise InputError(f"{teacher.folder}: a vector that is not finite, after {texts[0][:60]!r}")
    vectors = torch.from_numpy(embeddings).to(getattr(torch, teacher.dtype))
    with files.renamed(path) as temporary:
        save_file({"vectors": vectors}, temporary)


def take(shards, ids):
    """Vectors with sorted ids (n,) -> (n, D). All shards but the last are equally long."""
    shard_of, row_of = np.divmod(ids, len(shards[0]))
    rows = {i: torch.from_numpy(row_of[shard_of == i]) for i in np.unique(shard_of)}
    # index_select, as indexing by [] takes twice as long
    return torch.cat([shards[i].index_select(0, rows[i]) for i in rows])


# ---- search


def search(queries, shards, k, memory=2**30, index=None):
    """The k documents of largest inner product -> scores (Q, k), ids (Q, k), best first.

    queries (Q, D), shards [(m, D), ...] of one size, the last one shorter; memory in bytes. Ids
    number the documents over all shards. Scores are fp32 products of vectors in the shards' dtype;
    the lower id wins a tie. What an approximate `index` does not find scores -inf.
    """
    queries = queries.to(shards[0].dtype)
    k = min(k, sum(len(shard) for shard in shards))
    if index is not None:
        candidates = index.search(queries.float().numpy(), 2 * k)[1]
        return rescore(queries, candidates, shards, k, memory)
    if bf16_is_faster(queries):
        return search_in_bf16(queries, shards, k, memory)
    return search_in_fp32(queries, shards, k, memory)


def bf16_is_faster(queries):
    """True where bf16 products are fast; on CPUs if vectors are wide. fp32 vectors stay fp32."""
    wide = DEVICE != "cpu" or queries.shape[1] >= WIDE
    return queries.dtype == torch.bfloat16 and wide and fast_dtype(DEVICE) == torch.bfloat16


def search_in_fp32(queries, shards, k, memory):
    """`search` by fp32 products: 2 k candidates, as libraries differ in the last bits."""
    candidates = scan(queries.to(DEVICE, torch.float32), shards, 2 * k, memory)[1]
    return rescore(queries, candidates, shards, k, memory)


def search_in_bf16(queries, shards, k, memory):
    """`search` by products rounded to bf16. Rounding keeps the order of scores but makes ties."""
    scores, candidates = scan(queries.to(DEVICE), shards, 2 * k, memory)
    uncertain = may_lack_some(scores, k)
    candidates[~can_be_best(scores, k)] = -1
    scores, ids = rescore(queries, candidates, shards, k, memory)
    if uncertain.any():
        again = search_in_fp32(queries[torch.from_numpy(uncertain)], shards, k, memory)
        scores[uncertain] = again[0]
        ids[uncertain] = again[1]
    return scores, ids


def can_be_best(scores, k):
    """Rounded scores (Q, n) -> which candidates can be among the k best (Q, n).

    These are the k best by rounded scores, and what ties with the last of them.
    """
    kth = np.partition(scores, -k, axis=1)[:, -k]
    return scores >= kth[:, None]


def may_lack_some(scores, k):
    """Rounded scores (Q, n) -> for which queries (Q,) one of the k best may be no candidate.

    Other documents score no more than the last candidate. If k candidates score more than that,
    the k best are candidates.
    """
    above_last = scores > scores.min(axis=1, keepdims=True)
    return above_last.sum(axis=1) < k


def scan(queries, shards, n, memory):
    """The n best of all documents by products in the queries' dtype -> scores (Q, n), ids (Q, n).

    They are in no order. Of documents that tie for the last place, any may be there.
    """
    # a product must be rounded only once, at its end, or rounding does not keep the order
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    n = min(n, sum(len(shard) for shard in shards))
    best = torch.full((len(queries), n), -torch.inf, device=queries.device)  # (Q, n)
    ids = torch.zeros_like(best, dtype=torch.int64)  # (Q, n)
    # a document takes its vector, twice as the heap frees it late, and its scores
    document_bytes = 2 * queries.element_size() * queries.shape[1] + 8 * len(queries)
    size = max(1, memory // 5 // document_bytes)
    blocks = [block for shard in shards for block in shard.split(size)]
    first_id = 0
    for block in tqdm(blocks, desc="search"):
        best, ids = keep_best(best, ids, queries, block, first_id)
        first_id += len(block)
    return best.cpu().numpy(), ids.cpu().numpy()


def keep_best(best, ids, queries, block, first_id):
    """The n best of documents with scores `best` and `ids` (Q, n) and those of a block (m, D)."""
    block = block.to(queries)
    if block.is_cuda or block.dtype == torch.bfloat16:
        scores, rows = best_by_products(queries, block, best)
    else:
        scores, rows = best_by_faiss(queries, block, best.shape[1])
    top = torch.cat([best, scores], dim=1).topk(best.shape[1], sorted=False)
    ids = torch.cat([ids, rows + first_id], dim=1).gather(1, top.indices)
    return top.values, ids


def best_by_faiss(queries, block, n):
    """The n best of a block (m, D) by fp32 products -> scores (Q, n), row numbers (Q, n)."""
    n = min(n, len(block))
    found = faiss.knn(queries.numpy(), block.numpy(), n, faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def best_by_products(queries, block, best):
    """The best of a block (m, D) by products in the queries' dtype -> scores, row numbers.

    Only as many as can enter `best` (Q, n): after some blocks few, and a topk of few is fast.
    """
    scores = queries @ block.T  # (Q, m)
    above = scores > best.amin(dim=1, keepdim=True)
    n = min(best.shape[1], int(above.sum(dim=1).max()))
    top = scores.topk(n, sorted=False)
    return top.values.float(), top.indices


def rescore(queries, candidates, shards, k, memory):
    """The k best of candidates' ids (Q, n) by exact scores -> scores (Q, k), ids (Q, k)."""
    scores = exact_scores(queries, candidates, shards, memory)
    order = np.lexsort((candidates, -scores))[:, :k]
    return tuple(np.take_along_axis(found, order, axis=1) for found in (scores, candidates))


def exact_scores(queries, candidates, shards, memory):
    """Scores of candidates' ids (Q, n) -> (Q, n). An id of -1 is no candidate and scores -inf."""
    scores = np.full(candidates.shape, -np.inf, np.float32)
    real = candidates >= 0
    rows = np.nonzero(real)[0]
    if real.any():  # an approximate index may find nothing
        scores[real] = inner_products(queries, rows, shards, candidates[real], memory)
    return scores


def inner_products(queries, rows, shards, ids, memory):
    """fp32 products of queries `rows` (n,) with documents `ids` (n,), pair by pair -> (n,).

    Each is summed alone and so the same, to the last bit, in any order, block or rank.
    """
    products = np.empty(len(ids))
    pair_bytes = 16 * queries.shape[1]
    parts = 1 + len(ids) * pair_bytes // min(memory // 8, 2**22)
    for part in np.array_split(ids.argsort(kind="stable"), min(parts, len(ids))):
        left = queries.index_select(0, torch.from_numpy(rows[part])).float()
        products[part] = left.mul_(take(shards, ids[part])).sum(dim=1)
    return products


def build_index(shards, text):
    """An approximate index in memory; `text` is faiss's factory string, a space and settings."""
    factory, _, settings = text.partition(" ")
    sample = torch.cat([shard[:: 1 + len(shards) // 32] for shard in shards]).float()
    try:
        index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(sample.numpy())
        for shard in tqdm(shards, desc=text):
            index.add(shard.float().numpy())
        faiss.ParameterSpace().set_index_parameters(index, settings)
    except RuntimeError as error:  # all that faiss raises
        raise InputError(f"--index {text}: {commands.one_line(error)}") from error
    return index


# ---- the rules


def allowed(scores, positive, known, rule, bound):
    """Which candidates a rule of NV-Retriever (section 3) lets pass as negatives -> (Q, n).

    scores (Q, n), best first; positive (Q,), the lowest score of a query's positives; known
    (Q, n), which candidates are positives or the query itself. All comparisons are strict.
    """
    positive = positive[:, None]  # (Q, 1)
    if rule == "shifted":  # Top-K shifted by N: rank > N, positives not counted
        return np.cumsum(~known, axis=1) > bound
    if rule in ("naive", "abs"):  # Naive Top-K, by its default bound; TopK-Abs: score < bound
        return scores < bound
    if rule == "margin":  # TopK-MarginPos: score < positive - bound
        return scores < positive - bound
    # TopK-PercPos: score < bound x positive, and as far below a positive's score < 0
    return scores < positive - (1 - bound) * np.abs(positive)


def choose(usable, count, rule, seeds):
    """Takes up to `count` of each query's usable candidates (Q, n) -> list of their columns.

    The best, best first; the rule sampled takes random ones, top1 the best and random others.
    There is a seed for each query.
    """
    chosen = []
    for line, seed in zip(usable, seeds, strict=True):
        columns = np.flatnonzero(line)
        if rule in ("sampled", "top1"):
            key = np.random.default_rng(seed).random(len(line))[columns]
            if rule == "top1":
                key[:1] = -1  # the best stays first
            columns = columns[key.argsort(kind="stable")]
        chosen.append(columns[:count])
    return chosen


# ---- mining


def mine(rows, teachers, entry, args, corpus_paths=()):
    """Mines the rows of a recipe's entry -> (rows with neg, neg_scores and pos_scores, counts).

    Each of several teachers chooses its share of a row's negatives. One that two of them choose
    is there twice, which NV-Retriever found best, unless args.distinct. All scores are those of
    the last teacher. The counts divide all candidates into known positives (with them the query's
    own text and, with args.distinct, what an earlier teacher chose), dropped by the rule, surplus
    and kept. The rows are a generator. Ranks other than 0 only help to encode.
    """
    corpus = Corpus(rows, corpus_paths)
    known_positives = KnownPositives([rows])
    task = entry["instruction"]
    document_task = task if entry.get("symmetric", False) else ""
    read_documents = functools.partial(documents_and_tasks, corpus, document_task)
    read_queries = functools.partial(queries_and_tasks, rows, task)
    mined = Mined(len(rows), args.negatives)
    counts = Counter(rows=len(rows))
    memory = int(args.memory * 2**30)
    for t, teacher in enumerate(teachers):
        shards = encode_to_disk(len(corpus), read_documents, teacher)
        queries = encode_to_disk(len(rows), read_queries, teacher)
        if RANK != 0:
            continue
        index = build_index(shards, args.index) if args.index else None
        # 7 of two teachers are 4 and 3
        share = (args.negatives + len(teachers) - 1 - t) // len(teachers)
        mined.positive_scores = []
        for group in query_groups(len(rows), shards[0].shape[1], args):
            vectors = take(queries, group)  # (Q, D)
            own, known = positives_of(group, rows, corpus, known_positives)
            own_scores = score_positives(vectors, own, shards, memory)
            lowest = np.array([line.min() for line in own_scores])  # (Q,)
            scores, ids = search(vectors, shards, args.top_k, memory, index)  # (Q, n)
            if args.distinct:
                known = [np.append(known[q], mined.ids[i]) for q, i in enumerate(group)]
            seeds = [(args.seed, t, i) for i in group]
            chosen, outcomes = select(scores, ids, lowest, known, share, seeds, args)
            counts.update(outcomes)
            for q, i in enumerate(group):
                mined.add(i, ids[q, chosen[q]])
            mined.scores[group] = exact_scores(vectors, mined.ids[group], shards, memory)
            mined.positive_scores.append(np.concatenate(own_scores))
    counts.update(documents=len(corpus), rows_short=mined.count_short())
    return mined.rows(rows, corpus), {name: int(number) for name, number in counts.items()}


def select(scores, ids, lowest, known, share, seeds, args):
    """Chooses up to `share` of each query's candidates -> (their columns, counts of outcomes).

    scores, ids (Q, n), best first; lowest (Q,), the lowest score of a query's positives; known:
    for each query the numbers of documents that are no negatives; a seed for each query.
    """
    found = scores > -np.inf
    is_known = [np.isin(line, numbers) for line, numbers in zip(ids, known, strict=True)]
    is_known = np.stack(is_known)
    is_known &= found
    passed = allowed(scores, lowest, is_known, args.rule, args.bound)
    usable = found & ~is_known & passed
    chosen = choose(usable, share, args.rule, seeds)
    dropped = found & ~is_known & ~passed
    kept = sum(len(columns) for columns in chosen)
    outcomes = {"candidates": found.sum(), "positive": is_known.sum(), "rule": dropped.sum()}
    return chosen, outcomes | {"surplus": usable.sum() - kept, "kept": kept}


def query_groups(count, width, args):
    """Numbers of `count` queries in groups that take half of the memory with their candidates."""
    query_bytes = 32 * width + 320 * args.top_k
    size = int(args.memory * 2**30) // query_bytes
    if size == 0:
        gib = query_bytes / 2**30
        raise InputError(f"--memory {args.memory}: expected {gib:.6f} GiB or more, for a query")
    return np.split(np.arange(count), range(size, count, size))


def score_positives(queries, positives, shards, memory):
    """Scores of each query's own positives, given by their ids -> list of arrays."""
    sizes = [len(ids) for ids in positives]
    rows = np.repeat(np.arange(len(positives)), sizes)
    scores = inner_products(queries, rows, shards, np.concatenate(positives), memory)
    return np.split(scores, np.cumsum(sizes)[:-1])


# ---- the command


def mine_file(entry, teachers, args):
    """Mines one data set into args.out, unless it is there with the same settings."""
    target, report, corpus = paths_of(entry, args)
    rows = read_rows(entry["file"], shown=entry.get("shown"))
    without_effect = ("recipe", "data", "columns", "out", "memory")  # on the rows, or named below
    plan = {name: value for name, value in vars(args).items() if name not in without_effect}
    plan["corpus"] = [files.digest(path) for path in corpus]
    plan["teacher"] = [teacher.digest for teacher in teachers]
    plan["name"] = target.name
    plan["instruction"] = entry["instruction"]
    plan["symmetric"] = entry.get("symmetric", False)
    plan["sha256"] = files.digest(entry["file"])
    earlier = files.finished(target, report, plan)
    source = entry.get("shown", entry["file"])  # of a table, not what it was converted to
    files.check_unchanged(target, report, source)
    if earlier:
        print(f"{target}: already mined with these settings")
        return
    mined, counts = mine(rows, teachers, entry, args, corpus)
    if RANK == 0:
        command = "python mine.py " + " ".join(sys.argv[1:])
        files.begin(report)
        files.write_rows(target, mined)
        made = {"of": os.path.abspath(source), "sha256": files.digest(target)}
        files.write_json(report, {"command": command, "plan": plan, "counts": counts, **made})
        numbers = ", ".join(f"{name} {number:,}" for name, number in counts.items())
        print(f"{target}: {numbers}", flush=True)
        if not counts["kept"]:
            print(f"{target}: no negative passed the rule {args.rule}: another --rule or --model?")


def paths_of(entry, args):
    """Where an entry's mined rows and report go, and the corpora that it is mined from."""
    target = Path(args.out, Path(entry["file"]).name)
    corpus = [path for path in (*args.corpus, entry.get("corpus")) if path]
    return target, Path(f"{target}.json"), corpus


def check_paths(entries, args):
    """Refuses outputs that are inputs, and two of one name, before anything is written."""
    outputs, inputs = [], [args.recipe]
    for entry in entries:
        target, report, corpus = paths_of(entry, args)
        outputs += [target, report]
        inputs += [entry["file"], entry.get("shown", entry["file"]), *corpus]
    files.check_outputs(outputs, inputs)


def find_teacher(name, args):
    folder = folders.local_folder(base.resolve(name))
    dialects.check_pooling(folder)
    return Teacher(folder, dialects.content_hash(folder), args.max_length, args.dtype)


def main():
    parser = commands.Flags(__doc__)
    flag = parser.add_argument
    flag("--model", nargs="+", default=["runs/stage1"], help="folders, hub ids, minilm, smollm2")
    flag("--recipe", default=str(files.ROOT / "data" / "local.json"))
    flag("--data", nargs="+", help="own rows instead of the recipe's retrieval and sts sets")
    flag("--columns", help="of --data, by their names: query=a,pos=b; default: known names")
    flag("--corpus", nargs="+", default=[], help='more documents: lines of {"text": str} or rows')
    flag("--out", default="runs/mined", help="folder for the mined rows")
    flag("--rule", choices=RULES, default="percpos", help="sampled, top1: percpos, then random")
    flag("--bound", type=float, help=f"of the rule, or ranks skipped; default {RULES}")
    flag("--top-k", type=int, default=100, help="candidates a query")
    flag("--negatives", type=int, default=7)
    flag("--distinct", action="store_true", help="several teachers: no negative twice in a row")
    flag("--index", help="approximate: faiss factory and settings, 'IVF1024,Flat nprobe=32'")
    flag("--max-length", type=int, help="tokens of a text; default: stage 1's in the recipe")
    flag("--dtype", choices=DTYPES, default="bfloat16", help="of vectors; float32: of teachers too")
    flag("--memory", type=float, default=1, help="GiB of the search, above the program")
    flag("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.negatives < 1:
        raise InputError(f"--negatives: expected 1 or more, got {args.negatives}")

    recipe = recipes.read_recipe(args.recipe)
    entries = [d for d in recipe["datasets"] if 2 in d["stages"] and d["kind"] in MINED_KINDS]
    if args.data:
        entries = [data_entry(data, args.columns) for data in args.data]
    elif args.columns:
        raise InputError("--columns: expected --data with it")
    check_paths(entries, args)
    for entry in entries:
        recipes.check_prepared(entry)
    if not args.max_length:
        args.max_length = recipe["stages"].get("1", {}).get("max_length", 512)
    if args.bound is None:
        args.bound = RULES[args.rule]
    if "runs/stage1" in args.model and not Path("runs/stage1", "config.json").exists():
        hint = "run python train.py --stage 1 first, or give --model"
        raise InputError(f"runs/stage1: no finished run: {hint}")
    teachers = [find_teacher(name, args) for name in args.model]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with files.locked(args.out) if RANK == 0 else contextlib.nullcontext():
        for entry in entries:
            mine_file(entry, teachers, args)


if __name__ == "__main__":
    commands.run_command(main)
