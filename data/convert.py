"""A recipe's sources -> rows: tables streamed from the hub or local files, converted as the recipe's entry says,
sampled by seed, freed of what is too near an evaluation text (section 4; data/README.md lists an entry's fields).

An item is a row before its ids are looked up, or a labelled text {"text", "label"}.
"""

import contextlib
import gzip
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.prepare import json_lines, renamed, write_rows
from nvembed import attempt, expect, read_json

POOL = 100_000  # labelled texts kept of a larger set: positives and negatives are drawn from them
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tsv": "csv", ".csv": "csv"}


# ---- texts


def words(text):
    return re.findall(r"\w+", text.lower())


def runs(text, n):
    """Every n words in a row; a shorter text is one run."""
    w = words(text)
    return {" ".join(w[i : i + n]) for i in range(max(1, len(w) - n + 1))}


# ---- tables


def load(table):
    """Streams a table {"path": hub id, folder or file, "config", "split", "revision", "rows": at most so many of
    a config} -> (where it stands, row); a row of several configs has its own as "config"."""
    from datasets import load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # what it tells as it fails is in the error too
    path, how = table["path"], {"split": table["split"], "revision": table.get("revision")}
    configs = table.get("config")
    if Path(path).is_file():
        suffix = Path(path.removesuffix(".gz")).suffix
        expect(suffix in FILES, f"{path}: expected a file of {list(FILES)}, or one of them with .gz")
        expect(Path(path).stat().st_size, f"{path}: expected at least one row")
        how = {"data_files": path, "split": "train"} | ({"sep": "\t"} if suffix == ".tsv" else {})
        path, configs = FILES[suffix], None
    for config in configs if isinstance(configs, list) else [configs]:
        where = ":".join(filter(None, (table["path"], config)))
        rows = iter(attempt(where, load_dataset, path, config, streaming=True, **how))
        for number in range(1, table.get("rows", 10**12) + 1):
            row = attempt(f"{where}:{number}", next, rows, None)
            if row is None:
                break
            yield f"{where}:{number}", {"config": config} | row


def get(row, name, where):
    """A field's value; "a.b" is field b of object a, or of every object of list a."""
    for part in name.split("."):
        for item in as_list(row):
            fields = list(item) if isinstance(item, dict) else []
            expect(part in fields, f"{where}: field '{name}': missing, found {fields}")
        row = [item[part] for item in row] if isinstance(row, list) else row[part]
    return row


def texts_of(row, names, where, ids=False):
    """A field's texts, or with `ids` its numbers or names as strings: the members of a list, or the one that it
    is. Several fields' are joined by spaces."""
    if isinstance(names, list):
        return [" ".join(text for name in names for text in texts_of(row, name, where) if text)]
    found = as_list(get(row, names, where))
    kind, what = (str | int, "names or numbers") if ids else (str | None, "a string or strings")
    bad = [value for value in found if not isinstance(value, kind)]
    expect(not bad, f"{where}: field '{names}': expected {what}, got {bad[:1]!r:.60}")
    return [str(value or "").strip() if not ids else str(value) for value in found]


def as_list(value):
    return value if isinstance(value, list) else [value]


# ---- converters


def pairs(source, counts, see):
    """Rows of (query, documents): retrieval, duplicates, reranking, entailment, similarity -> items. `route` says
    by a field's value whether documents are positives or negatives, `at_least` a field's least value, `both` adds
    the other direction."""
    for where, row in load(source):
        counts["read"] += 1
        item = {"query": " ".join(texts_of(row, source["query"], where, "queries" in source))}
        for side in ("pos", "neg"):
            found = texts_of(row, source[side], where, "corpus" in source) if side in source else []
            item[side] = [text for text in found if text]
        if "corpus" not in source:
            see([*item["pos"], *item["neg"], *([item["query"]] if "both" in source else [])])
        side = "pos"
        for name, sides in source.get("route", {}).items():
            side = sides.get(str(get(row, name, where)))
        for name, least in source.get("at_least", {}).items():
            score = get(row, name, where)
            number = isinstance(score, int | float)
            expect(number, f"{where}: field '{name}': expected a number, got {score!r}")
            side = side if score >= least else None
        if side is None or not item["query"]:
            counts["label or score" if item["query"] else "empty"] += 1
            continue
        yield item if side == "pos" else item | {"pos": [], "neg": item["pos"]}
        if "both" in source:
            yield from (item | {"query": text, "pos": [item["query"]]} for text in item["pos"])


def grouped(items):
    """Items of one query -> one item with all its positives and negatives."""
    found = {}
    for item in items:
        known = found.setdefault(item["query"], item | {"pos": [], "neg": []})
        for side in ("pos", "neg"):
            known[side] += [text for text in item[side] if text not in known[side]]
    yield from found.values()


def labelled(source, counts, see):
    """Rows of a text and its label, or of a list of each -> labelled texts without repeats; `names` maps a label
    to its text."""
    seen, names = set(), source.get("names", {})
    for where, row in load(source):
        texts, labels = (texts_of(row, source[name], where, name == "label") for name in ("text", "label"))
        same = len(texts) == len(labels)
        expect(same, f"{where}: expected {len(labels)} texts as labels, got {len(texts)}")
        for text, label in zip(texts, labels, strict=True):
            known = not names or label in names
            expect(known, f"{where}: field '{source['label']}': expected one of {list(names)}, got {label!r}")
            counts["read"] += 1
            if text and (key := hash(" ".join(words(text)))) not in seen:
                seen.add(key)
                yield {"text": text, "label": names.get(label, label)}
            else:
                counts["repeated" if text else "empty"] += 1


def name_rows(texts, rng, negatives=7):
    """Label-based: the documents are the names of labels."""
    names, rows = sorted({t["label"] for t in texts}), []
    for t in texts:
        others = [name for name in names if name != t["label"]]
        others = others if len(others) <= negatives else rng.sample(others, negatives)
        rows.append({"query": t["text"], "pos": [t["label"]], "neg": others})
    return rows


def example_rows(texts, rng, most, negatives=7):
    """Example-based: positive = another text of the class, negatives = texts of other classes, at random."""
    members, rows = defaultdict(list), []
    for i, t in enumerate(texts):
        members[t["label"]].append(i)
    gaps = {label: np.array(own) - np.arange(len(own)) for label, own in members.items()}
    for i in rng.sample(range(len(texts)), min(len(texts), most)):
        own, gap = members[texts[i]["label"]], gaps[texts[i]["label"]]
        others = range(len(texts) - len(own))
        if len(own) > 1 and others:
            same = rng.choice(range(len(own) - 1))
            same = own[same + (own[same] >= i)]  # not the text itself
            picked = np.array(rng.sample(others, min(negatives, len(others))))
            picked += np.searchsorted(gap, picked, side="right")  # the texts of the class are left out
            neg = [texts[j]["text"] for j in picked]
            rows.append({"query": texts[i]["text"], "pos": [texts[same]["text"]], "neg": neg})
    return rows


def reservoir(items, most, rng):
    """A sample of at most `most` items, each as likely, in their order -> (sample, number left out)."""
    kept, seen = [], 0
    for seen, item in enumerate(items, 1):
        place = len(kept) if len(kept) < most else rng.randrange(seen)
        if place < most:
            kept[place : place + 1] = [(seen, item)]
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])], seen - len(kept)


def look_up(items, source, counts, see):
    """Ids of queries and documents -> their texts, while the whole corpus is seen; items that lack one go."""
    for name, sides in (("queries", ("query",)), ("corpus", ("pos", "neg"))):
        if name in source:
            table, found = source[name], {}
            wanted = {i for item in items for side in sides for i in as_list(item[side])}
            for where, row in load(table):
                text, key = " ".join(texts_of(row, table["text"], where)), str(get(row, table["id"], where))
                if text and name == "corpus":
                    see([text])
                if text and key in wanted:
                    found[key] = text
            for item in items:
                item |= {side: [found[i] for i in as_list(item[side]) if i in found] for side in sides}
    whole = [item for item in items if item["query"] and item["pos"]]
    counts["missing id"] += len(items) - len(whole)
    return [item | {"query": as_list(item["query"])[0]} for item in whole]


# ---- leakage


def bm25_overlap(texts, against, k1=1.2, b=0.75):
    """Of each text the highest BM25 score as a query for one of `against`, as a share of what either of the two
    scores for itself, whichever is more: 1 if they have the same words, little if one only contains the other."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    tf = csr_array(CountVectorizer(analyzer=words).fit_transform(texts + against), dtype=np.float64)
    length, df = tf.sum(axis=1), np.bincount(tf[len(texts) :].indices, minlength=tf.shape[1])
    norm = np.repeat(k1 * (1 - b + b * length / length[len(texts) :].mean()), np.diff(tf.indptr))
    idf = np.log(1 + (len(against) - df + 0.5) / (df + 0.5))
    present, weight = tf > 0, tf.copy()
    weight.data = tf.data * (k1 + 1) / (tf.data + norm) * idf[tf.indices]
    own, best = weight.sum(axis=1), np.zeros(len(texts))
    for i in range(0, len(texts), 256):
        score = (present[i : i + 256][: len(texts) - i] @ weight[len(texts) :].T).tocoo()
        share = score.data / np.maximum(own[i + score.row], own[len(texts) + score.col])
        np.maximum.at(best, i + score.row, share)
    return best


def run_overlap(texts, against, n=5):
    """Of each text the share of its runs of n words that occur in `against`: 1 if it is one of them."""
    known = np.unique(np.concatenate([[hash(run) for run in runs(text, n)] for text in against]))
    found = [[hash(run) for run in runs(text, n)] for text in texts]
    codes, sizes = np.concatenate(found), np.array([len(codes) for codes in found])
    same = known[np.searchsorted(known, codes).clip(max=len(known) - 1)] == codes
    return np.add.reduceat(same, np.cumsum([0, *sizes[:-1]])) / sizes


OVERLAP = {"bm25": bm25_overlap, "runs": run_overlap}


def strings(row, but=("label", "split", "prompt")):
    """Every text of a row of any kind."""
    found = [value for name, value in row.items() if name not in but]
    return [text for value in found for text in as_list(value) if isinstance(text, str) and words(text)]


def drop_leaks(items, against, by, threshold):
    """Items -> (kept, dropped with their "overlap": the highest of an item's texts, at least the threshold)."""
    texts = sorted({text for item in items for text in strings(item)})
    against = sorted({text for text in against if words(text)})
    expect(texts and against, "leakage: expected texts on both sides")
    overlap = dict(zip(texts, OVERLAP[by](texts, against).round(4).tolist(), strict=True))
    found = [max((overlap[text] for text in strings(item)), default=0) for item in items]
    kept = [item for item, share in zip(items, found) if share < threshold]
    return kept, [item | {"overlap": share} for item, share in zip(items, found) if share >= threshold]


def check_files(rows, against, by, threshold, out):
    """The rows of one file that are too near to any text of another -> `out` (kept rows) and what was dropped."""
    items = [row for _, row in json_lines(rows)]
    texts = [text for _, row in json_lines(against) for text in strings(row)]
    kept, dropped = drop_leaks(items, texts, by, threshold)
    if out:
        write_rows(out, kept)
        write_rows(beside(out, "dropped.jsonl"), dropped)
    return {"rows": len(items), "kept": len(kept), "dropped": len(dropped)}


# ---- a data set of a recipe


def beside(path, end):
    """rows/name.jsonl.gz -> rows/name.END"""
    return Path(path).with_name(Path(path).name.split(".jsonl")[0] + "." + end)


@contextlib.contextmanager
def corpus_file(path):
    """Yields see(texts), which writes each new text as a line {"text": str} of a gzipped file."""
    known = set()
    with renamed(Path(path)) as part, open(part, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, 0) as file:

        def see(texts):
            for text in texts:
                if hash(text) not in known:
                    known.add(hash(text))
                    file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())

        yield see


def usable(items, source, counts):
    """Items with a positive, and with a negative where the source routes documents there."""
    sides = {"pos", *(side for sides in source.get("route", {}).values() for side in sides.values())}
    for item in items:
        whole = all(item[side] for side in sides)
        counts["one-sided"] += not whole
        if whole:
            yield item


def convert(dataset, seed, see):
    """A data set's source -> (rows, items dropped as leaks, counts of what was read, kept and dropped)."""
    source, most, counts = dataset["source"], dataset.get("samples", 10**12), Counter(read=0)
    rng, classes, dropped = random.Random(f"{seed} {dataset['name']}"), "label" in source, []
    items = tqdm((labelled if classes else pairs)(source, counts, see), dataset["name"], mininterval=2)
    items = grouped(items) if source.get("group") else items
    items = items if classes else usable(items, source, counts)
    items, counts["surplus"] = reservoir(items, max(most, POOL) if classes else most, rng)
    items = items if classes else look_up(items, source, counts, see)
    if leakage := dataset.get("leakage"):
        table = leakage["against"]
        against = [text for where, row in load(table) for text in texts_of(row, table["text"], where)]
        items, dropped = drop_leaks(items, against, leakage["by"], leakage["threshold"])
        counts["leak"] = len(dropped)
    rows = items
    if source.get("documents") == "names":
        rows = name_rows(rng.sample(items, min(len(items), most)), rng)
    elif classes:
        rows = example_rows(items, rng, most)
    counts["surplus"] += len(items) - len(rows)
    expect(rows, f"{source['path']}: expected at least one row, all were dropped: {dict(counts)}")
    return rows, dropped, dict(counts) | {"kept": len(rows)}


def prepare(dataset, seed):
    """Writes a data set's rows, its corpus for mining (retrieval, sts) and its dropped leaks, and last a JSON file
    of counts: a set whose JSON file says the same settings is not made again -> its line of the report."""
    path, said = Path(dataset["file"]), beside(dataset["file"], "json")
    plan = {"dataset": {k: v for k, v in dataset.items() if k not in ("file", "corpus")}, "seed": seed}
    if path.exists() and said.exists() and (found := read_json(said)).get("plan") == plan:
        return f"{path}: already made so: {found['counts']['kept']:,} rows"
    with corpus_file(dataset["corpus"]) if "corpus" in dataset else contextlib.nullcontext(len) as see:
        rows, dropped, counts = convert(dataset, seed, see)
    write_rows(path, rows)
    write_rows(beside(path, "dropped.jsonl"), dropped)
    with renamed(said) as temporary:
        temporary.write_text(json.dumps({"plan": plan, "counts": counts}, indent=2) + "\n")
    return f"{path}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
