"""Every data set of the paper's list is converted from files in its source's own schema.

A changed schema is reported with file, line and field; a sample depends on the seed alone.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sources import (
    BEIR_ROWS,
    ENTRIES,
    LABELLED,
    LISTS,
    QUESTIONS,
    beir,
    local_entry,
    report,
    tables_of,
    write_table,
)

from data import convert
from data.commands import InputError
from data.files import json_lines
from data.rows import read_rows


def number_in(text):
    return int(re.search(r"\d+", text)[0])


def triples(path):
    return [(row["query"], row["pos"], row["neg"]) for row in read_rows(path)]


def test_all_sets_have_a_test():
    assert {*QUESTIONS, *LABELLED, "Synthetic"} == set(ENTRIES)


# ---- sources in their own schema


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(name, tmp_path):
    """Ids are looked up, what is judged or scored low is dropped, the corpus is kept."""
    tables, rows, corpus = QUESTIONS[name]
    ending = (".jsonl", ".parquet", ".jsonl.gz")[sorted(QUESTIONS).index(name) % 3]
    entry = local_entry(name, tables, tmp_path, ending)
    convert.prepare(entry, 0)
    assert triples(entry["file"]) == rows
    texts = [row["text"] for _, row in json_lines(entry["corpus"])]
    assert len(texts) == len(set(texts)) == corpus
    for _, positives, _ in rows:
        assert set(positives) <= set(texts)
    counts = report(entry)
    assert (counts["read"], counts["kept"]) == (len(tables[""]), len(rows))


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_texts(name, tmp_path):
    """Classification and clustering: repeated and empty texts and leaks are dropped."""
    ending = (".jsonl", ".parquet")[len(name) % 2]
    entry = local_entry(name, tables_of(name), tmp_path, ending)
    convert.prepare(entry, 0)
    counts = report(entry)
    leaks = int("leakage" in entry)
    repeats = 0 if name in LISTS else 1
    assert counts["read"] == 24 + 2 * repeats
    assert counts["kept"] == 24 - leaks
    assert counts.get("leak", 0) == leaks
    assert counts.get("repeated", 0) == counts.get("empty", 0) == repeats
    dropped = [row["text"] for _, row in json_lines(tmp_path / f"{name}.dropped.jsonl")]
    assert [number_in(text) for text in dropped] == [3] * leaks
    rows = read_rows(entry["file"])
    for row in rows:
        check_labelled_row(row, entry["source"])
    if isinstance(entry["source"]["text"], list):
        assert rows[0]["query"].endswith(f"more {number_in(rows[0]['query'])}")


def check_labelled_row(row, source):
    """The text's class is its number modulo 2; documents are names, or texts of that class."""
    own = number_in(row["query"]) % 2
    if source.get("documents") == "names":
        names = list(source.get("names", {0: "class 0", 1: "class 1"}).values())
        assert (row["pos"], row["neg"]) == ([names[own]], [names[1 - own]])
        return
    assert [number_in(text) % 2 for text in row["pos"]] == [own]
    assert [number_in(text) % 2 for text in row["neg"]] == [1 - own] * 7
    assert row["query"] not in row["pos"]
    assert len(set(row["neg"])) == 7


def test_labels_by_name(tmp_path):
    """The setting for the ablation: the same texts, the label's text as the document."""
    entry = local_entry("Emotion", tables_of("Emotion"), tmp_path)
    del entry["leakage"]
    entry["source"]["documents"] = "names"
    convert.prepare(entry, 0)
    rows = read_rows(entry["file"])
    assert len(rows) == 24
    for row in rows:
        own = number_in(row["query"]) % 2
        assert (row["pos"], row["neg"]) == ([f"class {own}"], [f"class {1 - own}"])


def test_texts_alone_in_their_class_are_no_rows_but_negatives():
    """As many rows as asked for, if so many texts have another one of their class."""
    labels = "a" * 10 + "bcdefghijk"
    texts = [{"text": f"{place}", "label": label} for place, label in enumerate(labels)]
    negatives = set()
    for seed in range(20):
        rows = convert.example_rows(texts, convert.random.Random(seed), 8)
        assert len(rows) == 8
        assert all(int(row["query"]) < 10 for row in rows)
        negatives.update(text for row in rows for text in row["neg"])
    assert negatives == {str(place) for place in range(10, 20)}


def test_negatives_are_any_text_of_other_classes():
    """Every text of the other classes is drawn about as often as any other, no text of its own."""
    labels = "aabcabcbbacca"
    texts = [{"text": f"{place}", "label": label} for place, label in enumerate(labels)]
    drawn = np.zeros((len(texts), len(texts)))
    for seed in range(2000):
        for row in convert.example_rows(texts, convert.random.Random(seed), 100, negatives=2):
            for text in row["neg"]:
                drawn[int(row["query"]), int(text)] += 1
    for place, label in enumerate(labels):
        others = [other != label for other in labels]
        assert not drawn[place][np.logical_not(others)].any()
        expected = 2000 * 2 / sum(others)
        assert np.abs(drawn[place][others] - expected).max() < 0.2 * expected


def test_tables_of_tabs(tmp_path):
    """BEIR's own qrels are .tsv, whose ids may read as numbers."""
    tables = json.loads(re.sub(r'"[qd](\d)"', r'"\1"', json.dumps(beir())))
    entry = local_entry("FiQA", tables, tmp_path)
    lines = ["query-id\tcorpus-id\tscore"]
    for row in tables[""]:
        lines.append("\t".join(str(value) for value in row.values()))
    path = tmp_path / "qrels.tsv"
    path.write_text("\n".join(lines) + "\n")
    entry["source"]["path"] = str(path)
    convert.prepare(entry, 0)
    assert triples(entry["file"]) == BEIR_ROWS


def test_ids_of_tabs_are_texts(tmp_path):
    """007 stays 007; a score is a number all the same."""
    queries = write_table(tmp_path / "queries.jsonl", [{"id": "007", "text": "q"}])
    source = {"path": str(tmp_path / "a.tsv"), "split": "train", "query": "id", "pos": "text"}
    source |= {"at_least": {"score": 1}}
    source["queries"] = {"path": queries, "split": "train", "id": "id", "text": "text"}
    (tmp_path / "a.tsv").write_text("id\ttext\tscore\n007\tNA\t2\n007\tlow\t0.5\n")
    entry = {"name": "a", "file": str(tmp_path / "rows.jsonl"), "source": source}
    convert.prepare(entry, 0)
    assert triples(entry["file"]) == [("q", ["NA"], [])]


def test_routed_documents_are_no_positives_the_other_way(tmp_path):
    """With both directions, a document that is routed to the negatives gives no row of its own."""
    rows = [{"a": "q", "b": "yes", "label": 1}, {"a": "q", "b": "no", "label": 0}]
    source = {"path": write_table(tmp_path / "a.jsonl", rows), "split": "train"}
    source |= {"query": "a", "pos": "b", "both": True}
    entry = {"name": "a", "file": str(tmp_path / "rows.jsonl"), "source": source}
    convert.prepare(entry, 0)
    assert triples(entry["file"]) == [
        ("q", ["yes"], []),
        ("yes", ["q"], []),
        ("q", ["no"], []),
        ("no", ["q"], []),
    ]
    source["route"] = {"label": {"1": "pos", "0": "neg"}}
    source["group"] = True
    convert.prepare(entry, 0)
    assert triples(entry["file"]) == [("q", ["yes"], ["no"])]
    del source["route"]
    source["both"] = False
    convert.prepare(entry, 0)
    assert triples(entry["file"]) == [("q", ["yes", "no"], [])]


# ---- a source that is not as the recipe says


def named_fields(name):
    """Table ("": the main one) -> the fields that the recipe names in it."""
    source = ENTRIES[name]["source"]
    named = {"": []}
    for field in ("query", "pos", "neg", "text", "label"):
        names = source.get(field, [])
        named[""] += [names] if isinstance(names, str) else names
    named[""] += [*source.get("route", {}), *source.get("at_least", {})]
    for part in ("queries", "corpus"):
        if part in source:
            texts = source[part]["text"]
            named[part] = [source[part]["id"]]
            named[part] += [texts] if isinstance(texts, str) else texts
    if "leakage" in ENTRIES[name]:
        named["against"] = [ENTRIES[name]["leakage"]["against"]["text"]]
    return named


@pytest.mark.parametrize(
    "name", ["MSMARCO", "NLI", "HoVer", "STS12", "Emotion", "arXivP2P", "Reddit", "ArguAna"]
)
def test_changed_schema(name, tmp_path):
    """Each field that the recipe names, renamed in its table, is reported with file and line."""
    tables = tables_of(name)
    tried = 0
    for part, fields in named_fields(name).items():
        for field in set(fields):
            folder = tmp_path / f"{part}.{field}"
            folder.mkdir()
            key = f'"{field.split(".")[-1]}":'
            table = json.loads(json.dumps(tables[part]).replace(key, '"renamed":'))
            entry = local_entry(name, tables | {part: table}, folder)
            message = rf"^{re.escape(str(folder))}/\S+:1: field '{field}': missing"
            with pytest.raises(InputError, match=message) as caught:
                convert.prepare(entry, 0)
            assert "\n" not in str(caught.value)
            assert "renamed" in str(caught.value)
            assert not Path(entry["file"]).exists()
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("STS12", "score", "high", "field 'score': expected a number, got 'high'"),
        ("NQ", "answer", 3, "field 'answer': expected a string or strings, got [3]"),
        (
            "Emotion",
            "label_text",
            1.5,
            "field 'label_text': expected names or numbers, got [1.5]",
        ),
        ("IMDB", "label", 2, "field 'label': expected one of ['0', '1'], got '2'"),
        (
            "StackExchangeClustering",
            "labels",
            ["a"],
            "field 'labels': expected 10, one for each text, got 1",
        ),
        (
            "BioASQ",
            "relevant_passage_ids",
            [1.5],
            "field 'relevant_passage_ids': expected names or numbers",
        ),
    ],
)
def test_changed_values(name, field, value, message, tmp_path):
    tables = tables_of(name)
    tables = tables | {"": [tables[""][0] | {field: value}]}
    with pytest.raises(InputError, match=r"\.jsonl:1: " + re.escape(message)):
        convert.prepare(local_entry(name, tables, tmp_path), 0)


def test_nothing_left(tmp_path):
    entry = local_entry("NQ", {"": [{"query": "", "answer": ""}]}, tmp_path)
    path = entry["source"]["path"]
    message = f"^{path}: expected at least one row, all were dropped: .'read': 1, 'empty': 1"
    with pytest.raises(InputError, match=message):
        convert.prepare(entry, 0)


# ---- samples


def test_samples(tmp_path):
    """A sample of the asked size, each row as likely, another by another seed."""
    pairs = [{"query": f"question {i}", "answer": f"answer {i}"} for i in range(400)]
    entry = local_entry("NQ", {"": pairs}, tmp_path) | {"samples": 100}
    del entry["corpus"]  # which is one file's alone
    picked = np.zeros(400)
    for seed in range(40):
        entry["file"] = str(tmp_path / f"{seed}.jsonl.gz")
        convert.prepare(entry, seed)
        rows = [number_in(row["query"]) for row in read_rows(entry["file"])]
        assert len(set(rows)) == 100
        assert rows == sorted(rows)
        assert report(entry)["surplus"] == 300
        picked[rows] += 1
    assert np.abs(picked.reshape(4, 100).mean(axis=1) - 10).max() < 1  # 40 seeds x 1/4
    first = (tmp_path / "0.jsonl.gz").read_bytes()
    assert first != (tmp_path / "1.jsonl.gz").read_bytes()
    entry["file"] = str(tmp_path / "again.jsonl.gz")
    convert.prepare(entry, 0)
    assert Path(entry["file"]).read_bytes() == first
