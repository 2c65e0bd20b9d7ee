"""The shipped sets: what stands in them, and that no training text is held out."""

import gzip
import hashlib
import json
import random
import re

import numpy as np
import pytest

from data import sets
from data.files import ROOT
from data.rows import read_rows
from data.leakage import words
from data.recipes import read_recipe

EVAL = sorted((ROOT / "data/eval").glob("*.jsonl.gz"))
RECIPE = read_recipe(ROOT / "data/local.json")
LABELS = {"spam", "not spam", "positive", "negative"}


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def texts_of(row):
    """The texts of a row of data/eval."""
    return [row[field] for field in ("text", "doc", "query") if row.get(field)]


@pytest.fixture(scope="module")
def held_out():
    """Every text that is evaluated on; WordSim-353's single words and titles are no texts."""
    texts = set()
    for path in EVAL:
        if path.name != "sts.jsonl.gz":
            for row in lines(path):
                texts.update(texts_of(row))
    for row in lines(ROOT / "data/eval/wikipedia.jsonl.gz"):
        texts.discard(row.get("query"))
    return sets.HeldOut(sorted(texts))


# ---- training rows


def test_shipped_recipe():
    rows_by_name = {d["name"]: read_rows(d["file"]) for d in RECIPE["datasets"]}
    kinds = {dataset["kind"] for dataset in RECIPE["datasets"]}
    assert kinds == {"retrieval", "classification", "clustering"}
    sizes = {n: len(rows) for n, rows in rows_by_name.items() if n.startswith("wikipedia")}
    assert sizes == {
        "wikipedia_question": 4000,
        "wikipedia_title": 1954,
        "wikipedia_description": 1462,
        "wikipedia_sentence": 1000,
    }
    for name, rows in rows_by_name.items():
        negatives = np.mean([len(row["neg"]) for row in rows])
        assert negatives >= (1 if name in ("spam", "sentiment") else 3.94), name
        assert not any(set(row["pos"]) & set(row["neg"]) for row in rows), name


def test_no_training_text_is_held_out(held_out):
    """No 8 words in a row of a training row are in a held-out text, nor is a whole shorter text."""
    training = {}  # text: name of its data set
    for dataset in RECIPE["datasets"]:
        for row in read_rows(dataset["file"]):
            for text in (row["query"], *row["pos"], *row["neg"]):
                training[text] = dataset["name"]
    assert len(training) > 20000
    leaks = []
    for text, name in training.items():
        if text not in LABELS and held_out.in_text(text):
            leaks.append((name, text))
    assert not leaks


def test_a_planted_leak_is_caught(held_out):
    """Control: eight words of a held-out text in other company are a leak, seven are none."""
    rng = random.Random(0)
    for path in EVAL:
        texts = [row.get("text") or row.get("doc") or "" for row in lines(path)]
        texts = [text for text in texts if len(words(text)) > 11]
        for text in rng.sample(texts, min(20, len(texts))):
            eight = " ".join(words(text)[2:10])
            assert held_out.in_text(f"Something else: {eight.upper()}, and more."), path
            seven = " ".join(words(text)[2:9])
            assert not held_out.in_text(f"Zzyzx {seven} zzyzx."), path


def test_an_article_that_is_held_out(held_out):
    """By its name in a held-out text, whatever its title adds in brackets, or by its own text."""
    article = {"title": "Amazon rainforest (biome)", "extract": "Zzyzx " * 30}
    assert held_out.in_article(article)
    assert not held_out.in_article(article | {"title": "Zzyzx (biome)"})
    squad = [row["doc"] for row in lines(ROOT / "data/eval/squad.jsonl.gz") if "doc" in row]
    assert held_out.in_article({"title": "Zzyzx", "extract": "Zzyzx " + squad[5]})


# ---- held-out sets


@pytest.mark.parametrize(
    "name, documents, queries", [("squad", 2067, 1500), ("wikipedia", 1200, 1190)]
)
def test_held_out_retrieval(name, documents, queries):
    rows = lines(ROOT / f"data/eval/{name}.jsonl.gz")
    corpus = {row["doc"] for row in rows if "doc" in row}
    asked = [row for row in rows if "query" in row]
    assert (len(corpus), len(asked)) == (documents, queries)
    assert all(row["pos"] and set(row["pos"]) <= corpus for row in asked)


@pytest.mark.parametrize("name, labels", [("trec", 6), ("spam", 2), ("sentiment", 2)])
def test_held_out_classes(name, labels):
    rows = lines(ROOT / f"data/eval/{name}.jsonl.gz")
    train = {row["text"] for row in rows if row["split"] == "train"}
    test = {row["text"] for row in rows if row["split"] == "test"}
    assert train and test and not train & test
    assert len({row["label"] for row in rows}) == labels


def test_other_held_out_sets():
    topics = lines(ROOT / "data/eval/topics.jsonl.gz")
    assert len({row["label"] for row in topics}) == 11
    assert len(lines(ROOT / "data/eval/sts.jsonl.gz")) == 353


# ---- how they were built


def shared_words(text, name):
    """How many of a name's words of more than three letters a text has."""
    known = words(text)
    return sum(len(word) > 3 and word in known for word in words(name))


def test_documents_do_not_name_their_title():
    """Control: other articles use the words of the title."""
    named = []
    elsewhere = []
    for row in read_rows(ROOT / "data/wikipedia_title.jsonl.gz"):
        named.append(shared_words(row["pos"][0], row["query"]) > 0)
        elsewhere.append(shared_words(" ".join(row["neg"]), row["query"]) > 0)
    assert np.mean(named) < 0.002
    assert np.mean(elsewhere) > 0.1


@pytest.mark.parametrize(
    "name, text, removed",
    [
        ("Tomato", "The tomato is a plant. Tomatoes are eaten.", "It is a plant. It are eaten."),
        (
            "Jane Addams",
            "Laura Jane Addams was a reformer; Addams's house",
            "Laura it was a reformer; it house",
        ),
        (
            "Republic of Korea",
            "The Republic of Korea, or Korea, is in Asia.",
            "It, or it, is in Asia.",
        ),
        ("C++", "C++ is a language.", "It++ is a language."),
        ("Art", "Partial artists start.", "Partial it start."),
    ],
)
def test_remove_name(name, text, removed):
    assert sets.remove_name(text, name) == removed


def test_question():
    """The answer is taken out and asked for in front; a sentence without one gives none."""
    sentence = "It was built in 1889 by Gustave Eiffel as the entrance to a world fair."
    asked = set()
    for seed in range(40):
        asked.add(sets.question(sentence, "The tower", random.Random(seed)).split()[0])
    assert asked >= {"When", "In", "By", "Who"}
    assert sets.question("it has no name and no number at all", "Zzyzx", random.Random(0)) is None


def test_readme_lists_every_shipped_file():
    """Rows, bytes and hash of each file are in data/README.md; all of them are at most 12 MB."""
    row = r"^\| `(\S+\.gz)` \| ([\d,]+) \| ([\d,]+) \| `(\w{16})` \|"
    listed = re.findall(row, (ROOT / "data/README.md").read_text(), re.MULTILINE)
    files = sorted((ROOT / "data").rglob("*.jsonl.gz"))
    found = []
    for path in files:
        name = str(path.relative_to(ROOT / "data"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        found.append((name, f"{len(lines(path)):,}", f"{path.stat().st_size:,}", digest))
    assert sorted(listed) == sorted(found)
    assert sum(path.stat().st_size for path in files) < 12e6
