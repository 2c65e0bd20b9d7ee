"""From the tables that a recipe's "source" names to rows for training (section 4 of the paper).

    table -> items -> sample -> ids looked up -> leaks dropped -> rows

An item is what one row of a table becomes: a pair {"query", "pos", "neg"}, whose texts may still
be ids, or a labelled text {"text", "label"}. data/README.md lists the fields of a source.
"""

import contextlib
import gzip
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.commands import InputError
from data.files import begin, beside, check_outputs, digest, finished, locked, renamed
from data.files import write_json, write_rows
from data.leakage import drop_leaks, words
from data.tables import get, ids_of, local_files, read_table, tables_of, texts_of, texts_of_table

LABELLED_TEXTS = 100_000  # kept of a larger set with fewer "samples": documents are drawn of them
NEGATIVES = 7  # of a labelled text


# ---- a data set of a recipe


def prepare(dataset, seed):
    """Writes a data set's rows -> a line that reports what was kept and dropped.

    Beside NAME.jsonl.gz stand NAME.corpus.jsonl.gz (every document seen, for mining),
    NAME.dropped.jsonl (leaks) and, written last, NAME.json (the settings and counts). If
    NAME.json has the same settings, local files included, nothing is done.
    """
    path = Path(dataset["file"])
    report = beside(path, "json")
    settings = {name: value for name, value in dataset.items() if name not in ("file", "corpus")}
    plan = {"dataset": settings, "seed": seed}
    inputs = files_read(dataset)
    if inputs:
        plan["files"] = {str(source): digest(source) for source in inputs}
    outputs = [path, report, beside(path, "dropped.jsonl")]
    if "corpus" in dataset:
        outputs.append(dataset["corpus"])
    check_outputs(outputs, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        earlier = finished(path, report, plan, outputs)
        if earlier:
            return f"{path}: already made so: {earlier['counts']['kept']:,} rows"
        begin(report)
        counts = write(dataset, seed, path)
        write_json(report, {"plan": plan, "counts": counts})
    shown = [f"{name} {count:,}" for name, count in counts.items() if count]
    return f"{path}: {', '.join(shown)}"


def files_read(dataset):
    """The local files that a data set is made from."""
    return [path for table in tables_of(dataset) for path in local_files(table)]


def write(dataset, seed, path):
    """Writes a data set's rows, leaks and corpus -> counts."""
    if "corpus" in dataset:
        with corpus_file(dataset["corpus"]) as corpus:
            rows, dropped, counts = convert(dataset, seed, corpus)
    else:
        rows, dropped, counts = convert(dataset, seed)
    write_rows(path, rows)
    write_rows(beside(path, "dropped.jsonl"), dropped)
    return counts


def convert(dataset, seed, corpus=None):
    """A data set's source -> (rows, leaks, counts of what was read, kept and dropped).

    Leaks are the items dropped as too near to an evaluation text. The sample depends on the seed
    and the data set's name only. `corpus` collects all documents seen.
    """
    source = dataset["source"]
    most = dataset.get("samples", math.inf)
    rng = random.Random(f"{seed} {dataset['name']}")
    counts = Counter(read=0)
    if "label" in source:
        texts = progress(labelled(source, counts), dataset)
        items, counts["surplus"] = reservoir(texts, max(most, LABELLED_TEXTS), rng)
    else:
        found = progress(pairs(source, counts, corpus), dataset)
        if source.get("group"):
            found = grouped(found)
        items, counts["surplus"] = reservoir(complete(found, source, counts), most, rng)
        items = look_up(items, source, counts, corpus)

    dropped = []  # leaks
    if "leakage" in dataset:
        leakage = dataset["leakage"]
        against = texts_of_table(leakage["against"])
        items, dropped = drop_leaks(items, against, leakage["by"], leakage["threshold"])
        counts["leak"] = len(dropped)

    if source.get("documents") == "names":
        chosen = rng.sample(items, min(len(items), most))
        rows = name_rows(chosen, rng)
    elif "label" in source:
        rows = example_rows(items, rng, most)
        sizes = Counter(item["label"] for item in items)
        counts["alone in its class"] = sum(size == 1 for size in sizes.values())
    else:
        rows = items
    counts["surplus"] += len(items) - len(rows) - counts["alone in its class"]
    if not rows:
        reasons = dict(counts)
        raise InputError(
            f"{source['path']}: expected at least one row, all were dropped: {reasons}"
        )
    counts["kept"] = len(rows)
    return rows, dropped, dict(counts)


def progress(items, dataset):
    return tqdm(items, dataset["name"], mininterval=2)


class Corpus:
    """A file to which add() writes each new text as a line {"text": str}."""

    def __init__(self, file):
        self.file = file
        self.written = set()  # hashes of texts: the texts themselves may not fit in memory

    def add(self, texts):
        for text in texts:
            key = hash(text)
            if key in self.written:
                continue
            self.written.add(key)
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            self.file.write(line.encode())


@contextlib.contextmanager
def corpus_file(path):
    """Yields a Corpus in a gzipped file, whose bytes hold neither its name nor the time."""
    with renamed(path) as temporary, open(temporary, "wb") as raw:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as file:
            yield Corpus(file)


# ---- pairs: retrieval, duplicates, reranking, entailment, similarity


def pairs(source, counts, corpus):
    """Rows of a query and documents -> items {"query", "pos", "neg"}."""
    for where, row in read_table(source):
        counts["read"] += 1
        item = read_pair(source, row, where)
        documents = item["pos"]
        if corpus is not None and "corpus" not in source:
            corpus.add(item["pos"] + item["neg"])
            if source.get("both"):
                corpus.add([item["query"]])
        side = document_side(source, row, where)
        if not item["query"]:
            counts["empty"] += 1
        elif side is None:
            counts["label or score"] += 1
        elif side == "neg":
            yield item | {"pos": [], "neg": documents}
        else:
            yield item
            if source.get("both"):
                for document in documents:
                    yield item | {"query": document, "pos": [item["query"]]}


def read_pair(source, row, where):
    """The query and the documents of a row, as texts or as ids of "queries" and "corpus"."""
    read_query = ids_of if "queries" in source else texts_of
    read_documents = ids_of if "corpus" in source else texts_of
    item = {"query": " ".join(read_query(row, source["query"], where)), "pos": [], "neg": []}
    for side in ("pos", "neg"):
        if side in source:
            documents = read_documents(row, source[side], where)
            item[side] = list(dict.fromkeys(document for document in documents if document))
    return item


def document_side(source, row, where):
    """Whether a row's documents are "pos" or "neg", or None: the row is dropped.

    "route" decides by a field's value, "at_least" by the least value of a score.
    """
    side = "pos"
    for name, sides in source.get("route", {}).items():
        side = sides.get(str(get(row, name, where)))
    for name, least in source.get("at_least", {}).items():
        value = get(row, name, where)
        try:
            score = float(value)  # a cell of a .csv is a text
        except (TypeError, ValueError) as error:
            message = f"field '{name}': expected a number, got {value!r}"
            raise InputError(f"{where}: {message}") from error
        if not score >= least:  # lower, or NaN
            side = None
    return side


def grouped(items):
    """Items of one query -> one item with all its positives and negatives."""
    groups = {}
    for item in items:
        query = item["query"]
        if query not in groups:
            groups[query] = item | {"pos": [], "neg": []}
        group = groups[query]
        for side in ("pos", "neg"):
            new = [text for text in item[side] if text not in group[side]]
            group[side] += new
    return list(groups.values())


def complete(items, source, counts):
    """Items with a positive, and with a negative where the source routes documents there."""
    needed = {"pos"}
    for sides in source.get("route", {}).values():
        needed.update(sides.values())
    for item in items:
        one_sided = not all(item[side] for side in needed)
        counts["one-sided"] += one_sided
        if not one_sided:
            yield item


def look_up(items, source, counts, corpus):
    """Replaces the items' ids by texts -> the items for which there are any.

    Every document of the source's corpus goes to `corpus`.
    """
    if "queries" in source:
        wanted = {item["query"] for item in items}
        texts = texts_by_id(source["queries"], wanted)
        for item in items:
            item["query"] = texts.get(item["query"], "")
    if "corpus" in source:
        wanted = set()
        for item in items:
            wanted.update(item["pos"], item["neg"])
        texts = texts_by_id(source["corpus"], wanted, corpus)
        for item in items:
            for side in ("pos", "neg"):
                item[side] = [texts[key] for key in item[side] if key in texts]
    found = [item for item in items if item["query"] and item["pos"]]
    counts["missing id"] += len(items) - len(found)
    return found


def texts_by_id(table, wanted, corpus=None):
    """{id: text} of the wanted ids of a table that are there."""
    texts = {}
    for where, row in read_table(table):
        text = " ".join(texts_of(row, table["text"], where))
        key = str(get(row, table["id"], where))
        if not text:
            continue
        if corpus is not None:
            corpus.add([text])
        if key in wanted:
            texts[key] = text
    return texts


# ---- labelled texts: classification, clustering


def labelled(source, counts):
    """Rows of a text and its label, or of a list of each -> labelled texts without repeats."""
    names = source.get("names", {})  # label: its text
    seen = set()  # hashes of texts
    for where, row in read_table(source):
        texts = texts_of(row, source["text"], where)
        labels = ids_of(row, source["label"], where)
        if len(texts) != len(labels):
            message = f"expected {len(texts)}, one for each text, got {len(labels)}"
            raise InputError(f"{where}: field '{source['label']}': {message}")
        for text, label in zip(texts, labels, strict=True):
            if names and label not in names:
                message = f"expected one of {list(names)}, got {label!r}"
                raise InputError(f"{where}: field '{source['label']}': {message}")
            counts["read"] += 1
            key = hash(" ".join(words(text)))
            if not text:
                counts["empty"] += 1
            elif key in seen:
                counts["repeated"] += 1
            else:
                seen.add(key)
                yield {"text": text, "label": names.get(label, label)}


def name_rows(texts, rng, negatives=NEGATIVES):
    """Label-based: the positive is the name of the text's label, the negatives are other names."""
    names = sorted({text["label"] for text in texts})
    rows = []
    for text in texts:
        others = [name for name in names if name != text["label"]]
        if len(others) > negatives:
            others = rng.sample(others, negatives)
        rows.append({"query": text["text"], "pos": [text["label"]], "neg": others})
    return rows


def example_rows(texts, rng, most, negatives=NEGATIVES):
    """Example-based: the positive is another text of the class, the negatives are texts of others.

    At most `most` rows, all drawn at random.
    """
    places = defaultdict(list)  # label: where its texts stand in the list, ascending
    for place, text in enumerate(texts):
        places[text["label"]].append(place)
    others_before = {}  # label: for each of its texts, how many texts of other classes come before
    for label, own in places.items():
        others_before[label] = np.array(own) - np.arange(len(own))

    # A text has a row if there is another one of its class, and one of another class.
    usable = [i for i, text in enumerate(texts) if 1 < len(places[text["label"]]) < len(texts)]
    rows = []
    for place in rng.sample(usable, min(len(usable), most)):
        label = texts[place]["label"]
        own = places[label]
        others = len(texts) - len(own)
        draw = rng.choice(range(len(own) - 1))
        if own[draw] >= place:  # passes over the text itself
            draw += 1
        positive = texts[own[draw]]["text"]
        # Negatives are drawn by their numbers among the texts of other classes. Number j stands in
        # the list at place j + how many texts of this class come before it.
        drawn = np.array(rng.sample(range(others), min(negatives, others)))
        drawn += np.searchsorted(others_before[label], drawn, side="right")
        negative = [texts[other]["text"] for other in drawn]
        rows.append({"query": texts[place]["text"], "pos": [positive], "neg": negative})
    return rows


def reservoir(items, most, rng):
    """At most `most` items, each as likely, in their order -> (sample, number left out)."""
    kept = []  # (number of the item, item)
    number = 0
    for number, item in enumerate(items, 1):
        if len(kept) < most:
            kept.append((number, item))
            continue
        place = rng.randrange(number)
        if place < most:
            kept[place] = (number, item)
    kept.sort(key=lambda pair: pair[0])
    sample = [item for _, item in kept]
    return sample, number - len(sample)
