"""data/paper.json and data/convert.py: every data set of the paper's list is there and is converted from files in its
source's own schema; a changed schema is told in one line; what is interrupted goes on to the same bytes; leaks are
found, in the shipped sets too."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from data import convert, prepare
from nvembed import InputError

PAPER = prepare.read_recipe(ROOT / "data/paper.json")
ENTRIES = {entry["name"]: entry for entry in PAPER["datasets"]}
V2 = "HoVer SciFact NFCorpus MIRACL MrTyDi"
LISTED = {  # kind: sets, as the paper lists them
    "retrieval": "MSMARCO HotpotQA NQ PAQ StackExchange NLI SQuAD ArguAna BioASQ FiQA FEVER " + V2,
    "classification": "AmazonReviews AmazonCounterfactual Banking77 Emotion IMDB MTOPDomain MTOPIntent "
    "ToxicConversations TweetSentimentExtraction AmazonPolarity MassiveScenario MassiveIntent",
    "clustering": "arXivP2P arXivS2S bioRxivP2P bioRxivS2S medRxivP2P medRxivS2S TwentyNewsgroups Reddit RedditP2P "
    "StackExchangeClustering StackExchangeClusteringP2P",
    "sts": "STS12 STS22 STSBenchmark",
    "synthetic": "Synthetic",
}
SAMPLES = {  # printed sample counts
    **{"ArguAna": 4065, "BioASQ": 2495, "FEVER": 50000, "FiQA": 14166, "HotpotQA": 85000, "MSMARCO": 200000},
    **{"NFCorpus": 3685, "NLI": 20000, "NQ": 100231, "PAQ": 20000, "SciFact": 919, "SQuAD": 87599},
    **{"StackExchange": 100000, "Banking77": 10000, "AmazonCounterfactual": 4018, "AmazonReviews": 20000},
    **{"Emotion": 16000, "IMDB": 15000, "MTOPIntent": 10000, "ToxicConversations": 40000},
    **{
        "TweetSentimentExtraction": 27481,
        "STS12": 1868,
        "STS22": 416,
        "STSBenchmark": 2812,
        "Synthetic": 120000,
    },
    **{"arXivP2P": 35000, "arXivS2S": 35000, "bioRxivP2P": 4070, "bioRxivS2S": 4070, "medRxivP2P": 1160},
    "medRxivS2S": 1160,
}

# ---- the list


def test_every_set_of_the_paper():
    kinds = {kind: {e["name"] for e in ENTRIES.values() if e["kind"] == kind} for kind in LISTED}
    assert kinds == {kind: set(names.split()) for kind, names in LISTED.items()}
    assert len(PAPER["datasets"]) == len(ENTRIES) == 43
    assert {name: ENTRIES[name]["samples"] for name in SAMPLES} == SAMPLES
    for name, entry in ENTRIES.items():
        assert entry["stages"] == ([1, 2] if entry["kind"] in ("retrieval", "synthetic") else [2]), name
        assert "samples" in entry or "(all)" in entry["note"], name
        assert entry.get("symmetric", False) == (
            entry["kind"] in ("sts", "clustering") or multi_class(entry)
        ), name
    assert {n for n in ENTRIES if "leakage" in ENTRIES[n]} == {
        "AmazonCounterfactual",
        "Emotion",
        *LISTED["clustering"].split(),
    }


def multi_class(entry):
    return entry["kind"] == "classification" and "documents" not in entry["source"]


def test_instructions_are_those_of_the_evaluation():
    """Where the evaluation of the same set has a string of the authors', training has it too."""
    tasks = json.loads((ROOT / "data/instructions.json").read_text())
    same = {
        "MSMARCO": "MSMARCO",
        "HotpotQA": "HotpotQA",
        "HoVer": "HotpotQA",
        "NQ": "NQ",
        "ArguAna": "ArguAna",
    }
    same |= {"FiQA": "FiQA2018", "FEVER": "FEVER", "SciFact": "SciFact", "NFCorpus": "NFCorpus"}
    same |= {"StackExchange": "CQADupstack", "Emotion": "EmotionClassification"}
    assert {name: ENTRIES[name]["instruction"] for name in same} == {
        n: tasks["tasks"][t] for n, t in same.items()
    }
    assert {ENTRIES[n]["instruction"] for n in LISTED["sts"].split()} == {tasks["types"]["STS"]}
    assert all(not re.match("Instruct", e["instruction"]) for e in ENTRIES.values())


def test_first_version_of_the_mix():
    """v1: 11 retrieval sets, labels' names as documents, no synthetic data."""
    first = {e["name"]: e for e in prepare.read_recipe(f"{ROOT}/data/paper.json:v1")["datasets"]}
    assert set(ENTRIES) - set(first) == {*V2.split(), "Synthetic"}
    assert sum(e["kind"] == "retrieval" for e in first.values()) == 11
    by_names = {n for n, e in first.items() if e["file"].endswith("_names.jsonl.gz")}
    assert by_names == {n for n, e in ENTRIES.items() if e["kind"] == "clustering" or multi_class(e)}
    assert not any(first[name].get("symmetric") for name in by_names)
    assert all(first[n]["source"]["documents"] == "names" for n in by_names)


# ---- sources in their own schema


def beir():
    """BEIR's: q0 has d0 (and d1 judged 0), q1 has d1 and d2, q2 a document that is not there."""
    ids = [("q0", "d0", 1), ("q0", "d1", 0), ("q1", "d1", 1), ("q1", "d2", 1), ("q2", "d9", 1)]
    return {
        "": [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in ids],
        "queries": [{"_id": f"q{i}", "text": f"question {i}"} for i in range(3)],
        "corpus": [{"_id": f"d{i}", "title": "" if i else "Title", "text": f"text {i}"} for i in range(4)],
    }


BEIR_ROWS = [
    ("question 0", ["Title text 0"], []),
    ("question 1", ["text 1"], []),
    ("question 1", ["text 2"], []),
]
GROUPED = [BEIR_ROWS[0], ("question 1", ["text 1", "text 2"], [])]


def two(**fields):
    """Two rows whose texts end in 0 and 1; a list's members likewise."""

    def numbered(value, i):
        return [f"{v} {i}" for v in value] if isinstance(value, list) else f"{value} {i}"

    return [
        {k: numbered(v, i) if isinstance(v, str | list) else v for k, v in fields.items()} for i in range(2)
    ]


def triplets():
    """One question's negatives in several rows, as of MIRACL and Mr.TyDi."""
    rows = [("a", "p", "n0"), ("a", "p", "n1"), ("b", "q", "n2")]
    return {"": [dict(zip(("anchor", "positive", "negative"), row, strict=True)) for row in rows]}


def entailment():
    rows = [("a", "yes", 0), ("a", "maybe", 1), ("a", "no", 2), ("b", "so", 0), ("c", "nor", 2)]
    return {"": [dict(zip(("premise", "hypothesis", "label"), row, strict=True)) for row in rows]}


def claims():
    facts = [["Title", "Other"], ["Other"], ["Title"]]
    found = [
        {
            "id": i,
            "claim": f"claim {i}",
            "supporting_facts": [{"key": k, "value": 0} for k in keys],
            "label": i < 2,
        }
        for i, keys in enumerate(facts)
    ]
    corpus = [
        {"_id": f"d{i}", "title": t, "text": f"text {i}"} for i, t in enumerate(("Title", "Other", "Third"))
    ]
    return {"": [row | {"label": int(row["label"])} for row in found], "corpus": corpus}


def bioasq():
    asked = [
        {"question": f"question {i}", "answer": "yes", "id": i, "relevant_passage_ids": [7, 8 + i]}
        for i in (0, 1)
    ]
    return {"": asked, "corpus": [{"id": i, "passage": f"passage {i}"} for i in (7, 8, 9, 10)]}


def similar(scores):
    rows = [{"sentence1": f"left {i}", "sentence2": f"right {i}", "score": s} for i, s in enumerate(scores)]
    return {"": rows}


BOTH = [
    ("left 0", ["right 0"], []),
    ("right 0", ["left 0"], []),
    ("left 2", ["right 2"], []),
    ("right 2", ["left 2"], []),
]
PAIR = [(f"question {i}", [f"answer {i}"], []) for i in range(2)]
QUESTIONS = {  # name: (tables in the source's schema, rows, texts of the corpus)
    **{name: (beir(), BEIR_ROWS, 4) for name in ("MSMARCO", "FiQA", "SciFact")},
    **{name: (beir(), GROUPED, 4) for name in ("HotpotQA", "FEVER", "NFCorpus")},
    **{name: ({"": two(query="question", answer="answer")}, PAIR, 2) for name in ("NQ", "PAQ")},
    "StackExchange": ({"": two(post1="question", post2="answer")}, PAIR, 2),
    "SQuAD": ({"": two(id="", title="", context="answer", question="question", answers=["a"])}, PAIR, 2),
    "ArguAna": (
        {"": two(query="question", pos=["answer"], neg=["other"], category="c", type="t", prompt="p")},
        [(f"question {i}", [f"answer {i}"], [f"other {i}"]) for i in range(2)],
        4,
    ),
    "NLI": (entailment(), [("a", ["yes"], ["no"])], 5),
    "BioASQ": (bioasq(), [(f"question {i}", ["passage 7", f"passage {8 + i}"], []) for i in (0, 1)], 4),
    "HoVer": (
        claims(),
        [("claim 0", ["Title text 0", "Other text 1"], []), ("claim 1", ["Other text 1"], [])],
        3,
    ),
    **{
        name: (triplets(), [("a", ["p"], ["n0", "n1"]), ("b", ["q"], ["n2"])], 5)
        for name in ("MIRACL", "MrTyDi")
    },
    **{name: (similar([5.0, 3.9, 4.0]), BOTH, 6) for name in ("STS12", "STS22", "STSBenchmark")},
}
PAPERS = ("arXiv", "bioRxiv", "medRxiv")
SHAPES = {  # name: fields of a labelled text i of class c, as its source has them
    **{
        p + form: lambda i, c: {
            "id": i,
            "title": f"text {i}",
            "abstract": f"more {i}",
            "category": f"class {c}",
        }
        for p in PAPERS
        for form in ("P2P", "S2S")
    },
    "RedditP2P": lambda i, c: {"title": f"text {i}", "body": f"more {i}", "subreddit": f"class {c}"},
    "TwentyNewsgroups": lambda i, c: {"text": f"text {i}", "label": c, "label_text": f"class {c}"},
    "StackExchangeClusteringP2P": lambda i, c: {
        "title_body": f"text {i}",
        "upvoted_answer": "a",
        "config": f"class {c}",
    },
    **{
        name: lambda i, c: {"text": f"text {i}", "label": c, "label_text": f"class {c}"}
        for name in LISTED["classification"].split()
    },
}
LISTS = ("Reddit", "StackExchangeClustering")  # a row holds many texts and their labels


def labelled_tables(name):
    """24 texts of 2 classes, a repeated and an empty one; the evaluation set holds text 3, which is so a leak."""
    rows = [(i, i % 2) for i in range(24)]
    if name in LISTS:
        table = [
            {"sentences": [f"text {i}" for i, _ in part], "labels": [f"class {c}" for _, c in part]}
            for part in (rows[:10], rows[10:])
        ]
    else:
        table = [SHAPES[name](i, c) for i, c in rows]
        empty = {
            key: "" if "text" in str(value) or "more" in str(value) else value
            for key, value in table[0].items()
        }
        table += [table[5], empty]
    source, leakage = ENTRIES[name]["source"], ENTRIES[name].get("leakage")
    shown = "text 3 more 3" if isinstance(source["text"], list) else "Text  3!"
    tested = {"sentences": [shown, "another"], "labels": ["x", "y"]}
    if leakage and leakage["against"]["text"] == "text":
        tested = {"text": shown, "label": 0, "label_text": "x"}
    return {"": table} | ({"against": [tested]} if leakage else {})


def write_table(path, rows):
    """The rows as a file of the kind its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        path.write_text(
            "\n".join("\t".join(map(str, line)) for line in [rows[0], *(r.values() for r in rows)]) + "\n"
        )
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def local(name, tables, folder, end=".jsonl"):
    """A recipe's entry with its sources replaced by local files of the same schema."""
    entry = json.loads(json.dumps(ENTRIES[name]))
    entry |= {"file": str(folder / f"{name}.jsonl.gz"), "corpus": str(folder / f"{name}.corpus.jsonl.gz")}
    if entry["kind"] not in ("retrieval", "sts"):
        del entry["corpus"]
    source = entry["source"]
    for part, table in (("", source), ("queries", source.get("queries")), ("corpus", source.get("corpus"))):
        if table:
            table["path"] = write_table(folder / f"{name}{part}{end}", tables[part])
    if "leakage" in entry:
        entry["leakage"]["against"]["path"] = write_table(folder / f"{name}.test{end}", tables["against"])
    return entry


def report(entry):
    return json.loads(Path(entry["file"].replace(".jsonl.gz", ".json")).read_text())["counts"]


def test_all_sets_have_a_test():
    assert {*QUESTIONS, *SHAPES, *LISTS, "Synthetic"} == set(ENTRIES)


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(name, tmp_path):
    """Retrieval, duplicates, entailment, similarity: ids looked up, judged or scored low dropped, corpus kept."""
    tables, rows, corpus = QUESTIONS[name]
    end = (".jsonl", ".parquet", ".jsonl.gz")[sorted(QUESTIONS).index(name) % 3]
    entry = local(name, tables, tmp_path, end)
    convert.prepare(entry, 0)
    found = [(row["query"], row["pos"], row["neg"]) for row in prepare.read_rows(entry["file"])]
    assert found == rows
    texts = [row["text"] for _, row in prepare.json_lines(entry["corpus"])]
    assert len(texts) == len(set(texts)) == corpus
    assert {text for _, pos, _ in rows for text in pos} <= set(texts)
    counts = report(entry)
    assert (counts["read"], counts["kept"]) == (len(tables[""]), len(rows))


@pytest.mark.parametrize("name", [*SHAPES, *LISTS])
def test_labelled_texts(name, tmp_path):
    """Classification and clustering: label texts, or texts of the same class and of others; leaks dropped."""
    entry = local(name, labelled_tables(name), tmp_path, (".jsonl", ".parquet")[len(name) % 2])
    convert.prepare(entry, 0)
    rows, counts, leaks = prepare.read_rows(entry["file"]), report(entry), int("leakage" in entry)
    repeats = 0 if name in LISTS else 2
    assert (counts["read"], counts["kept"], counts.get("leak", 0)) == (24 + repeats, 24 - leaks, leaks)
    assert counts.get("repeated", 0) == counts.get("empty", 0) == repeats // 2
    dropped = [row["text"] for _, row in prepare.json_lines(tmp_path / f"{name}.dropped.jsonl")]
    assert [int(re.search(r"\d+", text)[0]) for text in dropped] == [3] * leaks
    for row in rows:
        own = int(re.search(r"\d+", row["query"])[0]) % 2
        if entry["source"].get("documents") == "names":
            names = list(entry["source"]["names"].values())
            assert (row["pos"], row["neg"]) == ([names[own]], [names[1 - own]])
        else:
            classes = [[int(re.search(r"\d+", text)[0]) % 2 for text in row[side]] for side in ("pos", "neg")]
            assert classes == [[own], [1 - own] * 7]
            assert row["query"] not in row["pos"]
            assert len(set(row["neg"])) == 7
    if isinstance(entry["source"]["text"], list):
        assert rows[0]["query"].endswith("more " + re.search(r"\d+", rows[0]["query"])[0])


def test_labels_by_name(tmp_path):
    """The setting for the ablation: the same texts, the label's text as the document."""
    entry = local("Banking77", labelled_tables("Banking77"), tmp_path)
    entry["source"]["documents"] = "names"
    convert.prepare(entry, 0)
    rows = prepare.read_rows(entry["file"])
    assert len(rows) == 24
    for row in rows:
        own = int(row["query"].split()[1]) % 2
        assert (row["pos"], row["neg"]) == ([f"class {own}"], [f"class {1 - own}"])


def test_labels_by_name_of_the_local_recipe(tmp_path):
    """A preset's labels take the shipped label-based files: the same texts in the same order, no instruction on
    the names."""
    recipe = json.loads((ROOT / "data/local.json").read_text()) | {"presets": {"names": {"labels": "names"}}}
    for dataset in recipe["datasets"]:
        dataset |= {
            field: str(ROOT / "data" / dataset[field]) for field in ("file", "names") if field in dataset
        }
    (tmp_path / "local.json").write_text(json.dumps(recipe))
    plain, named = (prepare.read_recipe(f"{tmp_path}/local.json{end}")["datasets"] for end in ("", ":names"))
    changed = [(a, b) for a, b in zip(plain, named, strict=True) if a != b]
    assert [a["name"] for a, _ in changed] == ["trec", "topics"]
    for a, b in changed:
        assert (a["symmetric"], b["symmetric"]) == (True, False)
        rows, names = prepare.read_rows(a["file"]), prepare.read_rows(b["file"])
        assert [row["query"] for row in rows] == [row["query"] for row in names]
        label = {row["query"]: row["pos"][0] for row in names}
        assert len(set(label.values())) == {"trec": 6, "topics": 11}[a["name"]]
        same = [label[row["pos"][0]] == label[row["query"]] for row in rows if row["pos"][0] in label]
        assert len(same) > 300 and all(same)
        assert all(row["pos"][0] not in row["neg"] and len(row["neg"]) in (5, 7) for row in names)


# ---- a source that is not as the recipe says


@pytest.mark.parametrize(
    "name", ["MSMARCO", "NLI", "HoVer", "STS12", "Emotion", "arXivP2P", "Reddit", "ArguAna"]
)
def test_changed_schema(name, tmp_path):
    """Each field that the recipe names, renamed in the second row of its table, is told with file and line."""
    tables = QUESTIONS[name][0] if name in QUESTIONS else labelled_tables(name)
    source = ENTRIES[name]["source"]
    named = {
        "": [
            source.get("query"),
            source.get("pos"),
            source.get("neg"),
            source.get("text"),
            source.get("label"),
        ]
    }
    named[""] += [*source.get("route", {}), *source.get("at_least", {})]
    named |= {
        part: [source[part]["id"], source[part]["text"]] for part in ("queries", "corpus") if part in source
    }
    if "against" in tables:
        named["against"] = [ENTRIES[name]["leakage"]["against"]["text"]]
    tried = 0
    for part, fields in named.items():
        for field in {f for names in fields if names for f in ([names] if isinstance(names, str) else names)}:
            folder = tmp_path / f"{part}.{field}"
            folder.mkdir()
            broken = json.loads(json.dumps(tables).replace(f'"{field.split(".")[-1]}":', '"renamed":'))
            entry = local(name, tables | {part: broken[part]}, folder)
            with pytest.raises(
                InputError, match=rf"^{re.escape(str(folder))}/\S+:1: field '{field}': missing"
            ) as told:
                convert.prepare(entry, 0)
            assert "\n" not in str(told.value) and "renamed" in str(told.value)
            assert not Path(entry["file"]).exists()
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("STS12", "score", "high", "field 'score': expected a number, got 'high'"),
        ("NQ", "answer", 3, "field 'answer': expected a string or strings, got [3]"),
        ("Emotion", "label_text", 1.5, "field 'label_text': expected names or numbers, got [1.5]"),
        ("IMDB", "label", 2, "field 'label': expected one of ['0', '1'], got '2'"),
        ("Reddit", "labels", ["a"], "expected 1 texts as labels, got 10"),
        ("BioASQ", "relevant_passage_ids", [1.5], "field 'relevant_passage_ids': expected names or numbers"),
    ],
)
def test_changed_values(name, field, value, message, tmp_path):
    tables = QUESTIONS[name][0] if name in QUESTIONS else labelled_tables(name)
    tables = tables | {"": [tables[""][0] | {field: value}]}
    with pytest.raises(InputError, match=r"\.jsonl:1: " + re.escape(message)):
        convert.prepare(local(name, tables, tmp_path), 0)


def test_bad_files(tmp_path):
    entry = local("NQ", QUESTIONS["NQ"][0], tmp_path)
    path = Path(entry["source"]["path"])
    for content in ('{"query": "a", "answer": "b"}\n{"query"', "", '{"query": "", "answer": ""}\n'):
        path.write_text(content)
        with pytest.raises(InputError, match="^" + re.escape(str(path))) as told:
            convert.prepare(entry, 0)
        assert "\n" not in str(told.value)
    entry["source"]["path"] = "no/such-set"
    with pytest.raises(InputError, match="^no/such-set: "):
        convert.prepare(entry, 0)


def test_tables_of_tabs(tmp_path):
    """BEIR's own qrels are .tsv, whose ids may read as numbers."""
    tables = json.loads(re.sub(r'"[qd](\d)"', r'"\1"', json.dumps(beir())))
    entry = local("FiQA", tables, tmp_path)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row.values())) for row in tables[""])]
    entry["source"]["path"] = str(tmp_path / "qrels.tsv")
    Path(entry["source"]["path"]).write_text("\n".join(lines) + "\n")
    convert.prepare(entry, 0)
    assert [(r["query"], r["pos"], r["neg"]) for r in prepare.read_rows(entry["file"])] == BEIR_ROWS


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "source: unknown field 'extra'"),
        ({"route": {"a": {"0": "no"}}}, "source: route: field 'a': expected pos or neg by value"),
        ({"at_least": {"a": "4"}}, "source: at_least: field 'a': expected int or float, got '4'"),
        ({"at_least": 4}, "source: field 'at_least': expected dict, got 4"),
        ({"corpus": {"path": "a", "split": "b", "id": "c"}}, "source: corpus: field 'text': missing"),
        ({"pos": 1}, "source: field 'pos': expected str or list, got 1"),
    ],
)
def test_bad_source(tmp_path, change, message):
    entry = {k: v for k, v in ENTRIES["NQ"].items() if k not in ("file", "corpus")}
    path = tmp_path / "recipe.json"
    recipe = {
        "base": "b",
        "seed": 0,
        "stages": {},
        "datasets": [entry | {"source": entry["source"] | change}],
    }
    path.write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: datasets[0]: {message}")):
        prepare.read_recipe(path)
    path.write_text(json.dumps(recipe | {"datasets": [entry | {"file": "too"}]}))
    with pytest.raises(InputError, match="expected either 'file' or 'source'"):
        prepare.read_recipe(path)
    path.write_text(json.dumps(recipe | {"datasets": [entry]}))
    assert prepare.read_recipe(path)["datasets"][0]["file"].endswith("recipe/NQ.jsonl.gz")  # control


# ---- samples, resuming, the command


def test_samples(tmp_path):
    """A sample of the asked size, each row as likely, another by another seed, the same by the same."""
    pairs = [{"query": f"question {i}", "answer": f"answer {i}"} for i in range(400)]
    entry = local("NQ", {"": pairs}, tmp_path) | {"samples": 100}
    picked = np.zeros(400)
    for seed in range(40):
        entry["file"] = str(tmp_path / f"{seed}.jsonl.gz")
        convert.prepare(entry, seed)
        rows = [int(row["query"].split()[1]) for row in prepare.read_rows(entry["file"])]
        assert len(set(rows)) == 100 and rows == sorted(rows)
        assert report(entry)["surplus"] == 300
        picked[rows] += 1
    assert np.abs(picked.reshape(4, 100).mean(axis=1) - 10).max() < 1  # 40 seeds x 1/4
    first = Path(tmp_path / "0.jsonl.gz").read_bytes()
    assert first != Path(tmp_path / "1.jsonl.gz").read_bytes()
    entry["file"] = str(tmp_path / "again.jsonl.gz")
    convert.prepare(entry, 0)
    assert Path(entry["file"]).read_bytes() == first


def small_recipe(folder):
    """A recipe of four sets on local files, one of them mined from a corpus, one with a leak."""
    folder.mkdir()
    entries = [local(name, QUESTIONS[name][0], folder) for name in ("FiQA", "STS12")]
    entries += [local(name, labelled_tables(name), folder) for name in ("Emotion", "IMDB")]
    entries = [{k: v for k, v in e.items() if k not in ("file", "corpus")} for e in entries]
    recipe = PAPER | {"datasets": entries}
    (folder / "small.json").write_text(json.dumps(recipe))
    return folder / "small.json"


def made(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    prepare.main()


def test_interrupted_and_resumed(tmp_path, monkeypatch, capsys):
    """Killed before any of the files takes its name, and started again: the same bytes; what is done stays."""
    recipe, replace, calls = small_recipe(tmp_path / "source"), os.replace, []
    command(monkeypatch, "--recipe", recipe, "--out", tmp_path / "whole")
    whole = made(tmp_path / "whole")
    assert len(whole) == 4 * 3 + 2
    for stop in range(len(whole)):
        calls.clear()

        def killed(*paths):
            calls.append(paths)
            if len(calls) == stop + 1:
                raise KeyboardInterrupt
            replace(*paths)

        out = tmp_path / f"stop{stop}"
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            command(monkeypatch, "--recipe", recipe, "--out", out)
        monkeypatch.setattr(os, "replace", replace)
        assert len(made(out)) == stop
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
        capsys.readouterr()
        command(monkeypatch, "--recipe", recipe, "--out", out)
        assert made(out) == whole
        assert capsys.readouterr().out.count("already made so") == len(before)
        assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    command(
        monkeypatch, "--recipe", recipe, "--out", out, "--labels", "names"
    )  # another setting: another file
    assert set(made(out)) - set(whole) == {
        f"Emotion_names.{end}" for end in ("jsonl.gz", "json", "dropped.jsonl")
    }


def run(*args, seed="0", **env):
    """python data/prepare.py in a process of its own, whose hashes of strings are salted by the seed."""
    line = [sys.executable, ROOT / "data/prepare.py", *args]
    env = os.environ | {"PYTHONHASHSEED": seed} | env
    return subprocess.run([*map(str, line)], capture_output=True, text=True, env=env, check=False)


def test_the_command_and_training_on_what_it_made(tmp_path):
    """Two processes make the same bytes; train.py and mine.py find them; without them one line says what to run."""
    import train

    recipe = small_recipe(tmp_path / "source")
    for seed in "12":
        done = run("--recipe", recipe, "--out", tmp_path / seed, seed=seed)
        assert done.returncode == 0, done.stderr
    assert made(tmp_path / "1") == made(tmp_path / "2")
    cache = tmp_path / "cache"
    done = run("--recipe", recipe, "--only", "FiQA", NVEMBED_CACHE=str(cache))
    assert done.stdout.endswith("read 5, label or score 1, missing id 1, kept 3\n"), done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVEMBED_CACHE", str(cache))
        entries = prepare.read_recipe(recipe)["datasets"]
        settings = train.Settings(batch=2, held_out=0)
        assert len(train.read_datasets(entries, 1, settings)[0].rows) == 3
        asked = "python data/prepare.py --recipe data/small.json makes it"
        with pytest.raises(InputError, match=f"STS12.jsonl.gz: expected .*{re.escape(asked)}$"):
            train.read_datasets(entries, 2, settings)
    bad = run("--recipe", recipe, "--only", "MSMARCO")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert bad.stderr.startswith("error: --only: expected one of ['FiQA',")


# ---- leakage

OWN = "The quick brown fox jumps over the lazy dog near the old river bank at dawn."


@pytest.mark.parametrize(
    "text, bm25, runs",
    [
        (OWN, 1, 1),
        (OWN.upper() + "!!", 1, 1),
        (OWN.replace("lazy", "sleepy"), 0.8, 0.5),  # 5 of the 12 runs hold the word
        (" ".join(reversed(OWN.split())), 1, 0),
        ("A treatise on the mating habits of river fish.", 0, 0),
        ("the the the the the", 0, 0),
    ],
)
def test_overlap(text, bm25, runs):
    others = [f"Something about number {i} and its uses in trade" for i in range(30)]
    found = convert.bm25_overlap([text], [OWN, *others])[0], convert.run_overlap([text], [OWN, *others])[0]
    assert (
        found[0] == pytest.approx(1, abs=0.02)
        if bm25 == 1
        else bm25 <= found[0] < 1
        if bm25
        else found[0] < 0.3
    )
    assert found[1] == 1 if runs == 1 else runs <= found[1] < 1 if runs else found[1] == 0


def test_overlap_by_hand():
    """BM25 of two short texts, written out."""
    against = ["a b b", "c"]
    idf = np.log(1 + (2 - 1 + 0.5) / (1 + 0.5))

    def weight(tf, length):
        return idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / 2))

    own, other = weight(1, 3) + weight(2, 3), weight(1, 2) + np.log(1 + 2.5 / 0.5) * 2.2 / (1 + 1.2)
    assert convert.bm25_overlap(["a x"], against)[0] == pytest.approx(weight(1, 3) / max(own, other))


def shipped(path, names):
    """Rows of a shipped set; of those whose documents are names of labels the queries."""
    rows = prepare.read_rows(path)
    return [{"query": row["query"]} for row in rows] if names else rows


# rows that share 0.8 of a held-out text's BM25 score, and half their runs of 5 words, in any text of theirs
NEAR = {
    "sentiment": (0, 1),
    "spam": (0, 4),
    "topics": (0, 72),
    "topics_names": (0, 12),
    "trec": (9, 454),
    "trec_names": (1, 52),
    "wikipedia_description": (0, 7),
    "wikipedia_question": (0, 12),
    "wikipedia_sentence": (0, 2),
    "wikipedia_title": (2, 4),
}


@pytest.fixture(scope="module")
def held_out():
    """Every evaluated text; WordSim-353's single words are no texts."""
    files = [path for path in sorted((ROOT / "data/eval").glob("*.jsonl.gz")) if path.name != "sts.jsonl.gz"]
    return [text for path in files for _, row in prepare.json_lines(path) for text in convert.strings(row)]


def test_shipped_sets_are_listed():
    assert set(NEAR) == {path.name.split(".")[0] for path in (ROOT / "data").glob("*.jsonl.gz")}


@pytest.mark.parametrize("name", NEAR)
def test_shipped_sets(name, held_out):
    """The local recipe against data/eval, and 20 planted rows, whose text is a held-out one's in other dress."""
    rows = shipped(ROOT / f"data/{name}.jsonl.gz", name.endswith("_names"))
    found = [len(convert.drop_leaks(rows, held_out, *how)[1]) for how in (("bm25", 0.8), ("runs", 0.5))]
    assert tuple(found) == NEAR[name]


@pytest.mark.parametrize("by, threshold", [("bm25", 0.8), ("runs", 0.5)])
def test_planted_leaks(by, threshold, held_out):
    """Control: of 20 rows whose text is a held-out one in other dress, and of 20 honest ones."""
    long = [text for text in held_out if len(set(convert.words(text))) > 14]
    planted = [{"query": f"{text.lower()} zzyzx", "pos": ["zzyzx"]} for text in long[:: len(long) // 20][:20]]
    honest = prepare.read_rows(ROOT / "data/wikipedia_sentence.jsonl.gz")[-20:]
    kept, dropped = convert.drop_leaks(planted + honest, held_out, by, threshold)
    assert len(planted) == 20
    assert (kept, [row["query"] for row in dropped]) == (honest, [row["query"] for row in planted])


def test_leakage_of_two_files(tmp_path, held_out):
    """Any rows against any file: counts, the rows kept, and those dropped with what they share."""
    against = ROOT / "data/eval/trec.jsonl.gz"
    leak = [row["text"] for _, row in prepare.json_lines(against)][7]
    rows = [{"query": "an honest question about nothing", "pos": ["p"]}, {"query": "q", "pos": [leak + " ."]}]
    prepare.write_rows(tmp_path / "rows.jsonl", rows)
    done = run("--leakage", tmp_path / "rows.jsonl", "--against", against, "--out", tmp_path / "kept.jsonl")
    assert done.stdout.strip() == "{'rows': 2, 'kept': 1, 'dropped': 1}", done.stderr
    assert [row["query"] for row in prepare.read_rows(tmp_path / "kept.jsonl")] == [rows[0]["query"]]
    ((_, dropped),) = prepare.json_lines(tmp_path / "kept.dropped.jsonl")
    assert dropped == rows[1] | {"overlap": 1.0}
    done = run("--leakage", tmp_path / "rows.jsonl", "--against", tmp_path / "no.jsonl")
    assert (done.returncode, done.stderr.startswith(f"error: {tmp_path}/no.jsonl: expected")) == (2, True)
