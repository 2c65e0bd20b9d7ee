"""Small tables in the schema of each source of the paper's recipe, and entries that read them.

QUESTIONS and the labelled sets cover every data set of data/paper.json that has a source.
"""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data.files import ROOT
from data.recipes import read_recipe

ENTRIES = {e["name"]: e for e in read_recipe(ROOT / "data/paper.json")["datasets"]}


# ---- pairs


def beir():
    """BEIR's: q0 has d0 (and d1 judged 0), q1 has d1 and d2, q2 a document that is not there."""
    ids = [("q0", "d0", 1), ("q0", "d1", 0), ("q1", "d1", 1), ("q1", "d2", 1), ("q2", "d9", 1)]
    titles = ["Title", "", "", ""]
    return {
        "": [{"query-id": q, "corpus-id": d, "score": score} for q, d, score in ids],
        "queries": [{"_id": f"q{i}", "text": f"question {i}"} for i in range(3)],
        "corpus": [
            {"_id": f"d{i}", "title": title, "text": f"text {i}"} for i, title in enumerate(titles)
        ],
    }


BEIR_ROWS = [
    ("question 0", ["Title text 0"], []),
    ("question 1", ["text 1"], []),
    ("question 1", ["text 2"], []),
]
GROUPED_BEIR_ROWS = [BEIR_ROWS[0], ("question 1", ["text 1", "text 2"], [])]


def numbered(value, number):
    """Texts with a number at their end."""
    if isinstance(value, list):
        return [f"{text} {number}" for text in value]
    return f"{value} {number}"


def two(**fields):
    """A table of two rows whose texts end in 0 and 1."""
    rows = []
    for number in range(2):
        rows.append({name: numbered(value, number) for name, value in fields.items()})
    return {"": rows}


def triplets():
    """One question's negatives in several rows, as of MIRACL and Mr.TyDi."""
    names = ("anchor", "positive", "negative")
    rows = [("a", "p", "n0"), ("a", "p", "n1"), ("b", "q", "n2")]
    return {"": [dict(zip(names, row, strict=True)) for row in rows]}


def entailment():
    names = ("premise", "hypothesis", "label")
    rows = [("a", "yes", 0), ("a", "maybe", 1), ("a", "no", 2), ("b", "so", 0), ("c", "nor", 2)]
    rows.append(("a", "nobody agrees", -1))
    return {"": [dict(zip(names, row, strict=True)) for row in rows]}


def claims():
    """HoVer's: the facts of a claim are sentences of documents; claim 2 is not supported."""
    titles = [["Title", "Other", "Title"], ["Other"], ["Title"]]
    found = []
    for number, keys in enumerate(titles):
        facts = [{"key": key, "value": 0} for key in keys]
        found.append(
            {
                "id": number,
                "claim": f"claim {number}",
                "supporting_facts": facts,
                "label": int(number < 2),
            }
        )
    corpus = []
    for number, title in enumerate(("Title", "Other", "Third")):
        corpus.append({"_id": f"d{number}", "title": title, "text": f"text {number}"})
    return {"": found, "corpus": corpus}


def bioasq():
    asked = []
    for number in range(2):
        passages = {"id": number, "relevant_passage_ids": [7, 8 + number]}
        asked.append({"question": f"question {number}", "answer": "yes"} | passages)
    corpus = [{"id": number, "passage": f"passage {number}"} for number in (7, 8, 9, 10)]
    return {"": asked, "corpus": corpus}


def similar(scores):
    rows = []
    for number, score in enumerate(scores):
        texts = {"sentence1": f"left {number}", "sentence2": f"right {number}"}
        rows.append(texts | {"score": score})
    return {"": rows}


BOTH_WAYS = [
    ("left 0", ["right 0"], []),
    ("right 0", ["left 0"], []),
    ("left 2", ["right 2"], []),
    ("right 2", ["left 2"], []),
]
ANSWERS = [("question 0", ["answer 0"], []), ("question 1", ["answer 1"], [])]
ARGUMENTS = [
    ("question 0", ["answer 0"], ["other 0"]),
    ("question 1", ["answer 1"], ["other 1"]),
]
PASSAGES = [
    ("question 0", ["passage 7", "passage 8"], []),
    ("question 1", ["passage 7", "passage 9"], []),
]
FACTS = [
    ("claim 0", ["Title text 0", "Other text 1"], []),
    ("claim 1", ["Other text 1"], []),
]
TRIPLETS = [("a", ["p"], ["n0", "n1"]), ("b", ["q"], ["n2"])]
SQUAD = two(
    id="", title="", context="answer", question="question", answers=["a"]
)  # its answers are spans
ARGUANA = two(query="question", pos=["answer"], neg=["other"], category="c", type="t", prompt="p")
QUESTIONS = {  # name: (tables in the source's schema, rows, texts of the corpus)
    "MSMARCO": (beir(), BEIR_ROWS, 4),
    "FiQA": (beir(), BEIR_ROWS, 4),
    "SciFact": (beir(), BEIR_ROWS, 4),
    "HotpotQA": (beir(), GROUPED_BEIR_ROWS, 4),
    "FEVER": (beir(), GROUPED_BEIR_ROWS, 4),
    "NFCorpus": (beir(), GROUPED_BEIR_ROWS, 4),
    "NQ": (two(query="question", answer="answer"), ANSWERS, 2),
    "PAQ": (two(query="question", answer="answer"), ANSWERS, 2),
    "StackExchange": (two(post1="question", post2="answer"), ANSWERS, 2),
    "SQuAD": (SQUAD, ANSWERS, 2),
    "ArguAna": (ARGUANA, ARGUMENTS, 4),
    "NLI": (entailment(), [("a", ["yes"], ["no"])], 6),
    "BioASQ": (bioasq(), PASSAGES, 4),
    "HoVer": (claims(), FACTS, 3),
    "MIRACL": (triplets(), TRIPLETS, 5),
    "MrTyDi": (triplets(), TRIPLETS, 5),
    "STS12": (similar([5.0, 3.9, 4.0]), BOTH_WAYS, 6),
    "STS22": (similar([5.0, 3.9, 4.0]), BOTH_WAYS, 6),
    "STSBenchmark": (similar([5.0, 3.9, 4.0]), BOTH_WAYS, 6),
}


# ---- labelled texts

PAPERS = ("arXivP2P", "arXivS2S", "bioRxivP2P", "bioRxivS2S", "medRxivP2P", "medRxivS2S")
LISTS = ("StackExchangeClustering",)  # a row holds many texts and their labels
CLASSIFICATION = [name for name, e in ENTRIES.items() if e["kind"] == "classification"]
LABELLED = [
    *PAPERS,
    "Reddit",
    "RedditP2P",
    "TwentyNewsgroups",
    "StackExchangeClusteringP2P",
    *CLASSIFICATION,
    *LISTS,
]


def labelled_row(name, number, label):
    """A labelled text of number `number` and class `label`, as its source has it."""
    text = f"text {number}"
    more = f"more {number}"
    of_class = f"class {label}"
    if name in PAPERS:
        return {"id": number, "title": text, "abstract": more, "category": of_class}
    if name in ("Reddit", "RedditP2P"):
        return {"title": text, "body": more, "subreddit": of_class}
    if name == "StackExchangeClusteringP2P":
        return {"title_body": text, "upvoted_answer": "a", "config": of_class}
    return {"text": text, "label": label, "label_text": of_class}


def labelled_tables(name):
    """24 texts of 2 classes, a repeated and an empty one.

    The table of the evaluation, if the entry has one, holds text 3, which is thus a leak.
    """
    if name in LISTS:
        table = []
        for numbers in (range(10), range(10, 24)):
            sentences = [f"text {number}" for number in numbers]
            labels = [f"class {number % 2}" for number in numbers]
            table.append({"sentences": sentences, "labels": labels})
    else:
        table = [labelled_row(name, number, number % 2) for number in range(24)]
        empty = dict(table[0])
        for field, value in empty.items():
            if "text" in str(value) or "more" in str(value):
                empty[field] = ""
        table += [table[5], empty]
    if "leakage" not in ENTRIES[name]:
        return {"": table}
    leak = "Text  3!"
    if isinstance(ENTRIES[name]["source"]["text"], list):
        leak = "text 3 more 3"
    evaluated = {"sentences": [leak, "another"], "labels": ["x", "y"]}
    if ENTRIES[name]["leakage"]["against"]["text"] == "text":
        evaluated = {"text": leak, "label": 0, "label_text": "x"}
    return {"": table, "against": [evaluated]}


def tables_of(name):
    if name in QUESTIONS:
        return QUESTIONS[name][0]
    return labelled_tables(name)


# ---- entries on local files


def write_table(path, rows):
    """The rows as a file of the kind that its name says -> its path as a string."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return str(path)


def local_entry(name, tables, folder, ending=".jsonl"):
    """The paper's entry of a data set, with local files of the same schema as its sources."""
    entry = json.loads(json.dumps(ENTRIES[name]))
    entry["file"] = str(folder / f"{name}.jsonl.gz")
    if "corpus" in entry:
        entry["corpus"] = str(folder / f"{name}.corpus.jsonl.gz")
    folder = folder / "tables"  # what is made of a table may have its name
    folder.mkdir(exist_ok=True)
    source = entry["source"]
    source["path"] = write_table(folder / f"{name}{ending}", tables[""])
    for part in ("queries", "corpus"):
        if part in source:
            source[part]["path"] = write_table(folder / f"{name}{part}{ending}", tables[part])
    if "leakage" in entry:
        path = write_table(folder / f"{name}.test{ending}", tables["against"])
        entry["leakage"]["against"]["path"] = path
    return entry


def small_recipe(folder):
    """A recipe of four sets on local files, one with a corpus, one with a leak -> its path."""
    folder.mkdir()
    entries = []
    for name in ("FiQA", "STS12", "Emotion", "IMDB"):
        entry = local_entry(name, tables_of(name), folder)
        del entry["file"]
        entry.pop("corpus", None)
        entries.append(entry)
    stages = read_recipe(ROOT / "data/paper.json")["stages"]
    recipe = {"base": "smollm2", "seed": 0, "stages": stages, "datasets": entries}
    path = folder / "small.json"
    path.write_text(json.dumps(recipe))
    return path


def report(entry):
    """The counts that prepare wrote for an entry."""
    path = Path(entry["file"].replace(".jsonl.gz", ".json"))
    return json.loads(path.read_text())["counts"]
