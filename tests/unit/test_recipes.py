"""Recipes: checked field by field; the paper's lists every set of the paper as it is printed."""

import json
import re
from pathlib import Path

import pytest

from data.commands import InputError
from data.files import ROOT, cache, read_json
from data.recipes import read_recipe, stage_settings
from data.rows import read_rows

LOCAL = read_recipe(ROOT / "data/local.json")
PAPER = read_recipe(ROOT / "data/paper.json")
ENTRIES = {entry["name"]: entry for entry in PAPER["datasets"]}
SECOND_VERSION = (  # added in the paper's v2
    "HoVer SciFact NFCorpus MIRACL MrTyDi MTOPDomain AmazonPolarity MassiveScenario MassiveIntent "
    "Reddit RedditP2P StackExchangeClustering StackExchangeClusteringP2P Synthetic"
).split()
EXAMPLE_BASED = "Emotion MassiveIntent MassiveScenario MTOPDomain MTOPIntent".split()  # 5.2.4
LISTED = {  # kind: sets, as the paper lists them
    "retrieval": "MSMARCO HotpotQA NQ PAQ StackExchange NLI SQuAD ArguAna BioASQ FiQA FEVER "
    "HoVer SciFact NFCorpus MIRACL MrTyDi",
    "classification": "AmazonReviews AmazonCounterfactual Banking77 Emotion IMDB MTOPDomain "
    "MTOPIntent ToxicConversations TweetSentimentExtraction AmazonPolarity MassiveScenario "
    "MassiveIntent",
    "clustering": "arXivP2P arXivS2S bioRxivP2P bioRxivS2S medRxivP2P medRxivS2S TwentyNewsgroups "
    "Reddit RedditP2P StackExchangeClustering StackExchangeClusteringP2P",
    "sts": "STS12 STS22 STSBenchmark",
    "synthetic": "Synthetic",
}
SAMPLES = {  # printed sample counts
    "ArguAna": 4065,
    "BioASQ": 2495,
    "FEVER": 50000,
    "FiQA": 14166,
    "HotpotQA": 85000,
    "MSMARCO": 200000,
    "NFCorpus": 3685,
    "NLI": 20000,
    "NQ": 100231,
    "PAQ": 20000,
    "SciFact": 919,
    "SQuAD": 87599,
    "StackExchange": 100000,
    "Banking77": 10000,
    "AmazonCounterfactual": 4018,
    "AmazonReviews": 20000,
    "Emotion": 16000,
    "IMDB": 15000,
    "MTOPIntent": 10000,
    "ToxicConversations": 40000,
    "TweetSentimentExtraction": 27481,
    "STS12": 1868,
    "STS22": 416,
    "STSBenchmark": 2812,
    "Synthetic": 120000,
    "arXivP2P": 35000,
    "arXivS2S": 35000,
    "bioRxivP2P": 4070,
    "bioRxivS2S": 4070,
    "medRxivP2P": 1160,
    "medRxivS2S": 1160,
}
SAME_TASK = {  # set: the evaluation task whose instruction it shares
    "MSMARCO": "MSMARCO",
    "HotpotQA": "HotpotQA",
    "HoVer": "HotpotQA",
    "NQ": "NQ",
    "ArguAna": "ArguAna",
    "FiQA": "FiQA2018",
    "FEVER": "FEVER",
    "SciFact": "SciFact",
    "NFCorpus": "NFCorpus",
    "StackExchange": "CQADupstack",
    "Emotion": "EmotionClassification",
}


def multi_class(entry):
    return entry["kind"] == "classification" and "documents" not in entry["source"]


# ---- the shipped recipes


def test_every_set_of_the_paper():
    for kind, names in LISTED.items():
        assert {e["name"] for e in ENTRIES.values() if e["kind"] == kind} == set(names.split())
    assert len(PAPER["datasets"]) == len(ENTRIES) == 43
    assert {name: ENTRIES[name]["samples"] for name in SAMPLES} == SAMPLES
    for name, entry in ENTRIES.items():
        both_stages = entry["kind"] in ("retrieval", "synthetic")
        assert entry["stages"] == ([1, 2] if both_stages else [2]), name
        assert "samples" in entry or "(all)" in entry["note"], name
        symmetric = entry["kind"] in ("sts", "clustering") or multi_class(entry)
        assert entry.get("symmetric", False) == symmetric, name
    assert {name for name, entry in ENTRIES.items() if multi_class(entry)} == set(EXAMPLE_BASED)
    filtered = {name for name, entry in ENTRIES.items() if "leakage" in entry}
    assert filtered == {"AmazonCounterfactual", "Emotion", *LISTED["clustering"].split()}


def test_instructions_are_those_of_the_evaluation():
    """Where the evaluation of the same set has a string of the authors', training has it too."""
    instructions = read_json(ROOT / "data/instructions.json")
    for name, task in SAME_TASK.items():
        assert ENTRIES[name]["instruction"] == instructions["tasks"][task], name
    for name in LISTED["sts"].split():
        assert ENTRIES[name]["instruction"] == instructions["types"]["STS"]
    assert not any(entry["instruction"].startswith("Instruct") for entry in ENTRIES.values())


def test_first_version_of_the_mix():
    """v1: 11 retrieval sets, labels' names as documents, no synthetic data."""
    recipe = read_recipe(f"{ROOT}/data/paper.json:v1")
    first = {entry["name"]: entry for entry in recipe["datasets"]}
    assert set(ENTRIES) - set(first) == set(SECOND_VERSION)
    assert sum(entry["kind"] == "retrieval" for entry in first.values()) == 11
    named = {name for name, entry in first.items() if entry["file"].endswith("_names.jsonl.gz")}
    classes = {n for n, e in first.items() if e["kind"] in ("clustering", "classification")}
    assert {name for name in classes if ENTRIES[name].get("symmetric")} == named
    assert len(named) == 7 + 2
    for name in named:
        assert not first[name].get("symmetric")
        assert first[name]["source"]["documents"] == "names"


def test_settings_of_the_paper():
    stages = PAPER["stages"]
    settings = [(stages[s]["steps"], stages[s]["lr"], stages[s]["in_batch"]) for s in "12"]
    assert settings == [(20000, 2e-5, True), (18000, 1.5e-5, False)]


def test_labels_by_name_of_the_local_recipe(tmp_path):
    """A preset's labels take the shipped label-based files: the same texts in the same order."""
    recipe = read_json(ROOT / "data/local.json") | {"presets": {"names": {"labels": "names"}}}
    for dataset in recipe["datasets"]:
        for field in ("file", "names"):
            if field in dataset:
                dataset[field] = str(ROOT / "data" / dataset[field])
    path = tmp_path / "local.json"
    path.write_text(json.dumps(recipe))
    plain = read_recipe(path)["datasets"]
    named = read_recipe(f"{path}:names")["datasets"]
    changed = [pair for pair in zip(plain, named, strict=True) if pair[0] != pair[1]]
    assert [examples["name"] for examples, _ in changed] == ["trec", "topics"]
    for examples, names in changed:
        assert examples["symmetric"] and not names["symmetric"]  # a name is no query
        rows = read_rows(examples["file"])
        name_rows = read_rows(names["file"])
        assert [row["query"] for row in rows] == [row["query"] for row in name_rows]
        label = {row["query"]: row["pos"][0] for row in name_rows}
        assert len(set(label.values())) == {"trec": 6, "topics": 11}[examples["name"]]
        known = [row for row in rows if row["pos"][0] in label]
        assert len(known) > 300
        assert all(label[row["pos"][0]] == label[row["query"]] for row in known)
        assert all(row["pos"][0] not in row["neg"] for row in name_rows)
        assert all(len(row["neg"]) in (5, 7) for row in name_rows)


# ---- presets


def test_presets(tmp_path):
    """By name or by the path's end: another base and settings; without, nothing changes."""
    path = tmp_path / "recipe.json"
    presets = {"small": {"base": "smollm2:8", "stages": {"1": {"steps": 7}}}}
    path.write_text(json.dumps(LOCAL | {"presets": presets}))
    small = read_recipe(path, "small")
    assert small == read_recipe(f"{path}:small")
    first_stage = LOCAL["stages"]["1"] | {"steps": 7}
    assert small == LOCAL | {
        "base": "smollm2:8",
        "stages": LOCAL["stages"] | {"1": first_stage},
    }
    assert read_recipe(path) == LOCAL


@pytest.mark.parametrize(
    "presets, message",
    [
        ({"small": {"bases": ""}}, "presets: small: unknown field 'bases'"),
        (
            {"small": {"stages": {"4": {}}}},
            "presets: small: stage 4: expected an object of one of ['1', '2', '3']",
        ),
        ({"small": {"stages": {"1": 7}}}, "presets: small: stage 1: expected an object"),
        ({"small": {"without": ["x"]}}, "presets: small: without: expected one of ['"),
        ({"small": {"labels": "x"}}, "labels: expected examples or names, got 'x'"),
        ({}, "expected a preset of [], got 'small'"),
    ],
)
def test_bad_presets(tmp_path, presets, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(LOCAL | {"presets": presets}))
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: {message}")):
        read_recipe(f"{path}:small")


# ---- what is wrong with a recipe


def first(**changes):
    """The local recipe's first data set, changed."""
    return {"datasets": [LOCAL["datasets"][0] | changes]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "unknown field 'extra'"),
        ({"seed": "0"}, "field 'seed': expected int, got '0'"),
        ({"datasets": [3]}, "datasets[0]: expected an object, got int"),
        ({"datasets": [{"name": "a"}]}, "datasets[0]: field 'kind': missing"),
        (first(kinds="sts"), "datasets[0]: unknown field 'kinds'"),
        (first(kind="x"), "datasets[0]: field 'kind': expected one of"),
        (first(stages=[3]), "datasets[0]: field 'stages': expected [1], [2]"),
        (first(samples=True), "datasets[0]: field 'samples': expected int"),
        (first(samples=0), "datasets[0]: samples: expected a number in [1, inf), got 0"),
        (first(samples=-1), "datasets[0]: samples: expected a number in [1, inf), got -1"),
        ({"seed": -1}, "seed: expected a number in [0, 1e18), got -1"),
        ({"seed": 10**20}, "seed: expected a number in [0, 1e18), got 1" + "0" * 20),
        ({"stages": {"1": 7}}, "stages: field '1': expected dict, got 7"),
        ({"stages": {"stage2": {}}}, "stages: unknown field 'stage2': expected one of ['1', '2'"),
        (first(name="../../x"), "datasets[0]: field 'name': expected the name of a file"),
        (first(name="a/b"), "datasets[0]: field 'name': expected the name of a file"),
        (first(name=".."), "datasets[0]: field 'name': expected the name of a file"),
        (first(name=""), "datasets[0]: field 'name': expected the name of a file"),
        (
            first(instruction="Instruct: find it"),
            "datasets[0]: field 'instruction': expected the bare task",
        ),
        (
            {
                "datasets": [
                    LOCAL["datasets"][0],
                    LOCAL["datasets"][1] | {"name": "wikipedia_question"},
                ]
            },
            "datasets: expected one of the name wikipedia_question, got several",
        ),
        (
            {"datasets": [LOCAL["datasets"][0], LOCAL["datasets"][0] | {"name": "other"}]},
            "datasets: expected one of the name wikipedia_question.jsonl.gz, got several",
        ),
    ],
)
def test_bad_recipe(tmp_path, change, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(LOCAL))
    assert read_recipe(path) == LOCAL  # control: it is fine without the change
    path.write_text(json.dumps(LOCAL | change))
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: {message}")):
        read_recipe(path)


def write_entry(path, entry):
    """A recipe of one data set, without the places that read_recipe fills in."""
    recipe = {"base": "b", "seed": 0, "stages": {}, "datasets": [entry]}
    path.write_text(json.dumps(recipe))


def nq_entry():
    entry = dict(ENTRIES["NQ"])
    del entry["file"]
    del entry["corpus"]
    return entry


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "source: unknown field 'extra'"),
        (
            {"route": {"a": {"0": "no"}}},
            "source: route: field 'a': expected pos or neg by value",
        ),
        ({"route": {"a": "pos"}}, "source: route: field 'a': expected pos or neg by value"),
        (
            {"at_least": {"a": "4"}},
            "source: at_least: field 'a': expected int or float, got '4'",
        ),
        ({"at_least": 4}, "source: field 'at_least': expected dict, got 4"),
        (
            {"corpus": {"path": "a", "split": "b", "id": "c"}},
            "source: corpus: field 'text': missing",
        ),
        (
            {"route": {"a": {"0": "pos"}, "b": {"0": "pos"}}},
            "source: field 'route': expected one field, got ['a', 'b']",
        ),
        ({"pos": 1}, "source: field 'pos': expected str or list, got 1"),
        ({"pos": [1]}, "source: field 'pos': expected a list of str, got [1]"),
        ({"config": ["a", None]}, "source: field 'config': expected a list of str, got ['a', None"),
        ({"path": ""}, "source: field 'path': expected a hub id, folder or file"),
        ({"rows": 0}, "source: rows: expected a number in [1, inf), got 0"),
        (
            {"corpus": {"path": " ", "split": "b", "id": "c", "text": "d"}},
            "source: corpus: field 'path': expected a hub id, folder or file",
        ),
        ({"label": "a"}, "source: unknown field 'query'"),
    ],
)
def test_bad_source(tmp_path, change, message):
    path = tmp_path / "recipe.json"
    entry = nq_entry()
    write_entry(path, entry | {"source": entry["source"] | change})
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: datasets[0]: {message}")):
        read_recipe(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"documents": "name"}, "field 'documents': expected names, got 'name'"),
        ({"names": {"0": 5}}, "names: field '0': expected str, got 5"),
        ({"text": ["a", 1]}, "field 'text': expected a list of str, got ['a', 1]"),
    ],
)
def test_bad_classes(tmp_path, change, message):
    path = tmp_path / "recipe.json"
    source = {"path": "a", "split": "b", "text": "c", "label": "d"}
    write_entry(path, nq_entry() | {"source": source | change})
    where = f"{path}: datasets[0]: source: "
    with pytest.raises(InputError, match="^" + re.escape(where + message)):
        read_recipe(path)
    good = source | {"documents": "names", "names": {"0": "e"}}  # control
    write_entry(path, nq_entry() | {"source": good})
    assert read_recipe(path)["datasets"][0]["source"] == good


def test_local_tables_stand_beside_the_recipe(tmp_path, monkeypatch):
    """Like its files, wherever the command is called from; other names are of the hub."""
    names = ("rows.jsonl", "queries.jsonl")
    entry = nq_entry()
    queries = {"path": names[1], "split": "a", "id": "b", "text": "c"}
    entry["source"] = entry["source"] | {"path": names[0], "queries": queries}
    for name in names:
        (tmp_path / name).touch()
    write_entry(tmp_path / "recipe.json", entry)
    monkeypatch.chdir("/")
    (found,) = read_recipe(tmp_path / "recipe.json")["datasets"]
    assert found["source"]["path"] == str(tmp_path / names[0])
    assert found["source"]["queries"]["path"] == str(tmp_path / names[1])
    (tmp_path / names[0]).unlink()
    (found,) = read_recipe(tmp_path / "recipe.json")["datasets"]
    assert found["source"]["path"] == names[0]  # control


def test_file_or_source(tmp_path):
    path = tmp_path / "recipe.json"
    entry = nq_entry()
    neither = {name: value for name, value in entry.items() if name != "source"}
    for wrong in (entry | {"file": "too"}, neither):
        write_entry(path, wrong)
        with pytest.raises(InputError, match="expected either 'file' or 'source'"):
            read_recipe(path)
    write_entry(path, entry)  # control
    assert re.search(r"/recipe-\w{8}/NQ.jsonl.gz$", read_recipe(path)["datasets"][0]["file"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"by": "x"}, "field 'by': expected bm25 or runs, got 'x'"),
        ({"threshold": 1}, "field 'threshold': expected float, got 1"),
        ({"threshold": 1.5}, "threshold: expected a number in [0, 1], got 1.5"),
        ({"threshold": float("nan")}, "threshold: expected a number in [0, 1], got nan"),
        ({"against": {"path": "a", "split": "b"}}, "against: field 'text': missing"),
    ],
)
def test_bad_leakage(tmp_path, change, message):
    path = tmp_path / "recipe.json"
    against = {"path": "a", "split": "b", "text": "c"}
    leakage = {"against": against, "by": "bm25", "threshold": 0.8}
    write_entry(path, nq_entry() | {"leakage": leakage | change})
    where = f"{path}: datasets[0]: leakage: "
    with pytest.raises(InputError, match="^" + re.escape(where + message)):
        read_recipe(path)
    write_entry(path, nq_entry() | {"leakage": leakage})  # control
    assert read_recipe(path)["datasets"][0]["leakage"] == leakage


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"lr": float("nan")}, "lr: expected a number in [0, inf), got nan"),
        ({"warmup": -5}, "warmup: expected a number in [0, inf), got -5"),
        ({"temperature": -1}, "temperature: expected a number in (0, inf), got -1"),
        ({"lora_dropout": 2}, "lora_dropout: expected a number in [0, 1), got 2"),
        ({"steps": 2.5}, "steps: expected int, got 2.5"),
        ({"step": 2}, None),
    ],
)
def test_settings_of_a_stage(setting, message):
    types = {"steps": int, "warmup": int}
    types |= dict.fromkeys(("lr", "temperature", "lora_dropout"), float)
    message = f"a.json: stages.1.{message}" if message else "a.json: stages.1: unknown setting"
    with pytest.raises(InputError, match="^" + re.escape(message)):
        stage_settings({"stages": {"1": setting}}, "a.json", 1, types)
    good = {"lr": 0, "warmup": 0, "temperature": 0.02, "lora_dropout": 0, "steps": 1}  # control
    assert stage_settings({"stages": {"1": good}}, "a.json", 1, types) == good
    with pytest.raises(InputError, match="^a.json: stages: expected '2', got \\['1'\\]"):
        stage_settings({"stages": {"1": good}}, "a.json", 2, types)


# ---- the cache


def test_recipes_of_one_name_have_rows_of_their_own(tmp_path):
    """Known by their place; those of data/ by their name, wherever the project is."""
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_entry(tmp_path / folder / "mine.json", nq_entry())
        files.append(read_recipe(tmp_path / folder / "mine.json")["datasets"][0]["file"])
    assert files[0] != files[1]
    again = read_recipe(tmp_path / "b" / ".." / "a" / "mine.json")["datasets"][0]["file"]
    assert again == files[0]
    assert Path(ENTRIES["NQ"]["file"]) == cache() / "recipes/paper/NQ.jsonl.gz"
