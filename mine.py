"""Where hard negatives come from (section 4.1; NV-Retriever, arXiv 2407.15831): encode, search, filter.

    python mine.py                            teacher runs/stage1, stage 2's retrieval sets -> runs/mined
    python mine.py --model intfloat/e5-mistral-7b-instruct --data my.jsonl --out mined

Each output has the name of its rows; NAME.json beside it says the teacher, its hash, the settings and what every
filter dropped. A set whose NAME.json says the same is not mined again. Q queries, k candidates, M documents.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

import nvembed
from data.prepare import read_recipe, read_rows, resolve, write_rows
from nvembed import NVEmbed, expect, read_json

ROOT = Path(__file__).resolve().parent
RULES = ("percpos", "naive", "shifted", "abs", "margin", "sampled")


def load_teacher(folder, max_length, batch_tokens):
    """encode(texts, instruction) -> unit rows (B, D) fp32, of a model nvembed loads or a
    sentence-transformers folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = read_json(Path(folder, "config.json")).get("model_type") if Path(folder).is_dir() else None
    if Path(folder, "modules.json").exists() and family not in nvembed.FAMILIES:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(folder), device=device)
        return lambda texts, instruction: peer.encode(
            texts, normalize_embeddings=True, show_progress_bar=True
        )
    model = NVEmbed.from_pretrained(folder, device, nvembed.fast_dtype(device))
    return lambda texts, instruction: model.encode(
        texts, instruction, max_length, batch_tokens, progress=True
    )


def same(text):
    """Texts that differ in case or white space only are one document."""
    return " ".join(text.split()).casefold()


def build_corpus(rows, extra=()):
    """Rows -> (distinct documents, for each row the documents that are positives of its query in any row).

    Documents are the rows' positives and negatives and `extra` texts, in order of appearance.
    """
    ids, documents, positives = {}, [], defaultdict(set)
    for row in rows:
        for text in row["pos"] + row["neg"]:
            if ids.setdefault(same(text), len(documents)) == len(documents):
                documents.append(text)
        positives[same(row["query"])] |= {ids[same(text)] for text in row["pos"]}
    for text in extra:
        if ids.setdefault(same(text), len(documents)) == len(documents):
            documents.append(text)
    own = [[ids[same(text)] for text in row["pos"]] for row in rows]
    return documents, own, [positives[same(row["query"])] for row in rows]


def search(queries, documents, k, chunk=1024):
    """Exact inner-product search: (Q, D), (M, D) -> scores (Q, k), ids (Q, k), best first, ties by lower id.

    It looks 2 k deep, since faiss takes any of the documents that tie at the last place.
    """
    index, deep = faiss.IndexFlatIP(documents.shape[1]), min(2 * k, len(documents))
    index.add(documents)
    starts = tqdm(range(0, len(queries), chunk), desc="search")
    found = [index.search(queries[i : i + chunk], deep) for i in starts]
    scores, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((ids, -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def allowed(scores, positive, known, args):
    """The rule's verdict on candidates: scores (Q, k), lowest positive's score (Q,), known positives (Q, k)
    -> (Q, k).

    All comparisons are strict. percpos is positive - (1 - p) |positive|, which is p x positive where that is
    positive.
    """
    margin = {"margin": args.margin, "percpos": (1 - args.percent) * np.abs(positive)}
    if args.rule in ("percpos", "sampled", "margin"):
        return scores < (positive - margin[args.rule.replace("sampled", "percpos")])[:, None]
    if args.rule == "shifted":
        return np.cumsum(~known, axis=1) > args.shift
    return scores < (args.threshold if args.rule == "abs" else np.inf)


def choose(usable, n, rng=None):
    """The first n usable candidates of each query, or with rng n at random: (Q, k) bool -> (Q, k) bool."""
    key = np.arange(usable.shape[1])[None] if rng is None else rng.random(usable.shape)
    place = np.where(usable, key, np.inf).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return usable & (place < n)


def mine(rows, encode, instruction, symmetric, args, extra=()):
    """Rows -> (rows with neg, neg_scores and pos_scores, counts of what became of all candidates)."""
    documents, own, positives = build_corpus(rows, extra)
    d_MD = encode(documents, instruction if symmetric else "")
    q_QD = np.empty((len(rows), d_MD.shape[1]), np.float32)
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.get("prompt", instruction)].append(i)
    for prompt, members in groups.items():
        q_QD[members] = encode([rows[i]["query"] for i in members], prompt)
    own_scores = [d_MD[ids] @ q for q, ids in zip(q_QD, own, strict=True)]
    lowest = np.array([scores.min() for scores in own_scores])
    scores, ids = search(q_QD, np.ascontiguousarray(d_MD), min(args.top_k, len(documents)))
    known = np.array([np.isin(line, list(p)) for line, p in zip(ids, positives, strict=True)])
    passed = allowed(scores, lowest, known, args) & ~known
    chosen = choose(
        passed, args.negatives, np.random.default_rng(args.seed) if args.rule == "sampled" else None
    )
    out = []
    for i, row in enumerate(rows):
        picked = {"neg": [documents[j] for j in ids[i][chosen[i]]]}
        picked |= {"pos_scores": rounded(own_scores[i]), "neg_scores": rounded(scores[i][chosen[i]])}
        out.append(row | picked)
    short = int((chosen.sum(axis=1) < args.negatives).sum())
    counts = {
        "rows": len(rows),
        "documents": len(documents),
        "candidates": ids.size,
        "positive": int(known.sum()),
    }
    counts |= {"rule": int((~known & ~passed).sum()), "surplus": int((passed & ~chosen).sum())}
    return out, counts | {"kept": int(chosen.sum()), "rows_short": short}


def rounded(scores):
    return [round(float(score), 4) for score in scores]


def digest(*paths):
    """First 16 digits of the files' SHA-256."""
    found = hashlib.sha256()
    for path in paths:
        found.update(Path(path).read_bytes())
    return found.hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="runs/stage1", help="teacher: folder, hub id, minilm or smollm2")
    flag("--recipe", default=str(ROOT / "data" / "local.json"))
    flag("--data", nargs="+", help="own rows instead of the retrieval sets of the recipe's stage 2")
    flag("--corpus", help="more documents: .jsonl of rows, whose texts are added")
    flag("--out", default="runs/mined", help="folder for the mined rows")
    flag("--rule", choices=RULES, default="percpos")
    flag("--percent", type=float, default=0.95, help="percpos, sampled: share of the positive's score")
    flag("--margin", type=float, default=0.05, help="margin: distance below the positive's score")
    flag("--threshold", type=float, default=0.7, help="abs: highest score")
    flag("--shift", type=int, default=10, help="shifted: best candidates skipped")
    flag("--top-k", type=int, default=100, help="candidates a query")
    flag("--negatives", type=int, default=7)
    flag("--max-length", type=int, help="tokens of a text; default: stage 1's in the recipe")
    flag("--batch-tokens", type=int, default=16384)
    flag("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    entries = [e for e in recipe["datasets"] if e["kind"] in ("retrieval", "sts") and 2 in e["stages"]]
    if args.data:
        entries = [{"file": path, "instruction": ""} for path in args.data]
    args.max_length = args.max_length or recipe["stages"].get("1", {}).get("max_length", 512)
    missing = args.model == "runs/stage1" and not Path(args.model, "config.json").exists()
    expect(
        not missing,
        "runs/stage1: no finished run to mine with; run torchrun train.py --stage 1, or give --model",
    )
    folder = nvembed.local_folder(resolve(args.model))
    weights = sorted(folder.glob("*.safetensors"))
    extra = [
        text for row in (read_rows(args.corpus) if args.corpus else []) for text in row["pos"] + row["neg"]
    ]
    options = {k: v for k, v in vars(args).items() if k not in ("recipe", "data", "out")}
    encode, plan = None, options | {"teacher": digest(*weights), "corpus": extra and digest(args.corpus)}
    for entry in entries:
        rows, name = read_rows(entry["file"]), Path(entry["file"]).name
        source = {"name": name, "instruction": entry["instruction"], "sha256": digest(entry["file"])}
        target, said = Path(args.out, name), Path(args.out, name + ".json")
        if target.exists() and said.exists() and read_json(said).get("plan") == plan | source:
            print(f"{target}: already mined so")
            continue
        encode = encode or load_teacher(folder, args.max_length, args.batch_tokens)
        mined, counts = mine(rows, encode, entry["instruction"], entry.get("symmetric", False), args, extra)
        write_rows(target, mined)
        command = " ".join(["python", "mine.py", *sys.argv[1:]])
        said.write_text(
            json.dumps({"command": command, "plan": plan | source, "counts": counts}, indent=2) + "\n"
        )
        print(f"{target}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()), flush=True)


if __name__ == "__main__":
    nvembed.run(main)
