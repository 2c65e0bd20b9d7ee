"""Mining without a model: each rule on planted scores, and the command on planted teachers."""

import argparse
import errno
import functools
import gc
import json
import os
import signal
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import mine
from data import commands
from data.commands import InputError
from data.corpus import Corpus, Mined
from data.files import locked, write_rows
from data.rows import KnownPositives, canonical, read_rows, text_id

SCORES = np.array(
    [[0.90, 0.80, 0.76, 0.75, 0.70, 0.10], [-0.05, -0.099, -0.1, -0.104, -0.106, -0.3]]
)
LOWEST = np.array([0.80, -0.1])  # lowest positive's score of each query
KNOWN = np.zeros_like(SCORES, bool)


# ---- rules and choice


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("naive", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ("shifted", [2, 3, 4, 5], [2, 3, 4, 5]),
        ("abs", [5], [0, 1, 2, 3, 4, 5]),  # 0.70 is not < 0.70
        ("margin", [4, 5], [5]),  # < 0.75, < -0.15
        ("percpos", [3, 4, 5], [4, 5]),  # < 0.76, < -0.105: further below a negative score
        ("sampled", [3, 4, 5], [4, 5]),
        ("top1", [3, 4, 5], [4, 5]),
    ],
)
def test_rules_on_planted_scores(rule, first, second):
    bound = mine.RULES[rule]
    if rule == "shifted":
        bound = 2
    passed = mine.allowed(SCORES, LOWEST, KNOWN, rule, bound)
    assert [list(np.flatnonzero(line)) for line in passed] == [first, second]
    if rule == "percpos":  # control: 0.95 x the score would let -0.099 through
        assert not passed[1][2]
        assert SCORES[1][2] < 0.95 * LOWEST[1]


def test_shift_counts_after_positives():
    known = KNOWN.copy()
    known[0, 0] = True
    passed = mine.allowed(SCORES, LOWEST, known, "shifted", 2)
    assert list(np.flatnonzero(passed[0])) == [3, 4, 5]


def choose(rule, seed=0):
    """Two of the candidates 1, 2, 4, 5 of the first query, and of none of the second."""
    usable = np.array([[False, True, True, False, True, True], [False] * 6])
    chosen = mine.choose(usable, 2, rule, [(seed, 0), (seed, 1)])
    return [columns.tolist() for columns in chosen]


def test_choose_first():
    assert choose("percpos") == [[1, 2], []]


@pytest.mark.parametrize(
    ("rule", "shares"),
    [("sampled", [0, 0.5, 0.5, 0, 0.5, 0.5]), ("top1", [0, 1, 1 / 3, 0, 1 / 3, 1 / 3])],
)
def test_choose_at_random(rule, shares):
    draws = [choose(rule, seed) for seed in range(300)]
    assert choose(rule, 7) == draws[7]
    counts = np.zeros(6)
    for columns, none in draws:
        assert len(set(columns)) == 2
        assert none == []
        assert rule == "sampled" or columns[0] == 1
        counts[columns] += 1
    assert np.abs(counts / 300 - shares).max() < 0.1


# ---- rows

VECTORS = {
    "q": [1, 0],
    "true": [0.8, 0.6],
    "near": [0.79, 0.613],
    "fair": [0.7, 0.714],
    "far": [0, 1],
}
OTHER = VECTORS | {"fair": [0, 1], "far": [0.7, 0.714]}  # another teacher's
CALLS = []  # (task, text) of all that is encoded
ROWS = [
    {"query": "q one", "pos": ["true 1"], "neg": ["near copy", "fair a", "far b", "FAR   b"]},
    # the same query: its positive is none of the first's negatives
    {"query": "Q  ONE", "pos": ["far other"], "neg": []},
    {"query": "q two", "pos": ["true 2", "fair positive"], "neg": [], "prompt": "Own task"},
]


def encode(name, texts, tasks):
    """A planted encoder: a text's first word names its vector."""
    CALLS.extend(zip(tasks, texts, strict=True))
    vectors = VECTORS
    if name == "other":
        vectors = OTHER
    rows = [vectors[canonical(text).split()[0]] for text in texts]
    found = np.array(rows, np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def load_planted(teacher):
    return functools.partial(encode, teacher.folder.name)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with two planted teachers and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mine, "load_teacher", load_planted)
    CALLS.clear()
    for name in ("teacher", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    return tmp_path


def run_mine(
    teachers=("teacher",),
    corpus=(),
    symmetric=False,
    dtype="float32",
    max_length=64,
    rule="percpos",
    rows=ROWS,
    **changes,
):
    defaults = {"negatives": 2, "top_k": 100, "seed": 0, "memory": 1.0}
    settings = {"bound": mine.RULES[rule], "index": None, "distinct": False} | defaults | changes
    args = argparse.Namespace(rule=rule, **settings)
    entry = {"instruction": "Task", "symmetric": symmetric}
    teachers = [mine.Teacher(Path(name), name, max_length, dtype) for name in teachers]
    mined, counts = mine.mine(rows, teachers, entry, args, corpus)
    return list(mined), counts


def add_up(counts):
    outcomes = [counts[name] for name in ("positive", "rule", "surplus", "kept")]
    return counts["candidates"] == sum(outcomes)


def test_false_negatives_and_counts(here):
    mined, counts = run_mine(negatives=9)
    # not: near copy, true 2, far other, a duplicate
    assert mined[0]["neg"] == ["fair a", "fair positive", "far b"]
    assert mined[0]["pos_scores"] == [0.8]
    assert mined[0]["neg_scores"] == sorted(mined[0]["neg_scores"], reverse=True)
    naive, _ = run_mine(negatives=9, rule="naive")
    assert {"near copy", "true 2"} <= set(naive[0]["neg"])
    assert "far other" not in naive[0]["neg"]
    # the lowest positive decides: fair a is too near to it
    assert mined[2]["pos_scores"] == [0.8, pytest.approx(0.7, abs=1e-3)]
    assert mined[2]["neg"] == ["far b", "far other"]
    assert counts["documents"] == 7
    assert counts["candidates"] == 21
    assert counts["rows_short"] == 3
    assert add_up(counts)

    few, counts = run_mine(negatives=1)
    # nothing scores below the second's positive, 0
    assert [len(row["neg"]) for row in few] == [1, 0, 1]
    assert counts["surplus"] > 0
    assert counts["rows_short"] == 1
    assert add_up(counts)


def test_a_query_is_not_its_own_negative(here):
    """Of pairs both ways, as STS has them, whatever the rule; it may be another query's."""
    pairs = [("q one", "fair 1"), ("fair 1", "q one"), ("q two", "fair 2")]
    rows = [{"query": query, "pos": [text], "neg": []} for query, text in pairs]
    mined, counts = run_mine(rows=rows, rule="naive", negatives=9)
    assert [set(row["neg"]) for row in mined] == [{"fair 2"}, {"fair 2"}, {"fair 1", "q one"}]
    assert counts["positive"] == 5  # three positives, two queries themselves
    assert add_up(counts)


def tasks_of(text):
    return {task for task, encoded in CALLS if encoded == text}


def test_prompts(here):
    run_mine()
    assert tasks_of("q two") == {"Own task"}
    assert tasks_of("true 1") == {""}
    CALLS.clear()
    run_mine(symmetric=True)
    assert tasks_of("true 1") == {"Task"}


def first_negatives(*teachers, **changes):
    mined, counts = run_mine(teachers, **changes)
    assert add_up(counts)
    assert len(mined[0]["neg_scores"]) == len(mined[0]["neg"])
    return mined[0]["neg"]


def test_several_teachers(here):
    one = first_negatives("teacher")
    other = first_negatives("other")
    assert one == ["fair a", "fair positive"]
    assert other == ["far b", "fair a"]
    # fair a is there twice
    assert first_negatives("teacher", "other", negatives=4) == [*one, *other]
    distinct = first_negatives("teacher", "other", negatives=4, distinct=True)
    assert distinct == [*one, "far b"]
    assert len(first_negatives("teacher", "other", negatives=3)) == 3  # shares of 2 and 1
    assert ROWS[0]["neg"] == ["near copy", "fair a", "far b", "FAR   b"]


def test_scores_of_several_teachers_are_the_last_ones(here):
    """So a row's scores can be compared, and a document that two teachers chose has one."""
    mined, _ = run_mine(("teacher", "other"), negatives=4)
    for row in mined:
        (query,) = encode("other", [row["query"]], [""])
        for texts, scores in ((row["pos"], row["pos_scores"]), (row["neg"], row["neg_scores"])):
            expected = [] if not texts else encode("other", texts, [""] * len(texts)) @ query
            assert scores == pytest.approx(expected, abs=1e-4)
    assert mined[0]["neg"] == ["fair a", "fair positive", "far b", "fair a"]
    alone, _ = run_mine(("teacher",))
    assert alone[0]["neg_scores"] != mined[0]["neg_scores"][:2]  # control


def test_vectors_are_encoded_once_and_only_for_what_they_are(here, monkeypatch):
    monkeypatch.setattr(mine, "SHARD", 2)
    maps = here / "cache/maps"
    first = run_mine()
    assert len(CALLS) == 7 + 3
    assert len(list(maps.iterdir())) == 4 + 2
    assert run_mine(rule="sampled", negatives=1)
    assert len(CALLS) == 10
    sorted(maps.iterdir())[0].unlink()
    assert run_mine() == first
    assert 10 < len(CALLS) <= 12  # one shard only
    for changed in ({"max_length": 32}, {"dtype": "bfloat16"}):
        CALLS.clear()
        run_mine(**changed)
        assert len(CALLS) == 10
    (here / "more.jsonl").write_text('{"text": "far more"}\n{"text": "fair more"}\n')
    CALLS.clear()
    mined, _ = run_mine(negatives=9, corpus=["more.jsonl"])
    assert mined[0]["neg"][0] == "fair more"
    assert len(CALLS) == 2  # a shard of its own, before those of the rows


# ---- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"text": "far"}\n{"text": 3}\n',
            r"more.jsonl:2: field 'text': expected a string",
        ),
        ('{"text": " "}\n', r"more.jsonl:1: field 'text': expected a non-empty string"),
        ('{"title": 1, "text": "far"}\n', r"more.jsonl:1: field 'title': expected a string"),
        ('{"text": "\\udc00"}\n', r"more.jsonl:1: field 'text': expected a string"),
        ('{"txt": "far"}\n', r"more.jsonl:1: expected a field 'text', or a row's 'query' and"),
        ('{"text": "far"}\n{"query": "q"}\n', r"more.jsonl:2: field 'pos'"),
        ("far\n", r"more.jsonl:1: expected a JSON object"),
    ],
)
def test_bad_corpora(here, text, message):
    (here / "more.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        run_mine(corpus=["more.jsonl"])


def test_bad_settings(here):
    with pytest.raises(InputError, match=r"--memory 1e-07: expected 0.0000\d+ GiB or more"):
        run_mine(memory=1e-7)
    with pytest.raises(InputError, match="--index odd: .*could not parse"):
        run_mine(index="odd")
    with pytest.raises(InputError, match="--index Flat odd=3: .*could not set parameter odd"):
        run_mine(index="Flat odd=3")
    with pytest.raises(InputError, match="--index IVF999,Flat: .*training points"):
        run_mine(index="IVF999,Flat")  # more lists than documents


def test_bad_vectors(here, monkeypatch):
    def load_broken(teacher):
        return lambda texts, tasks: np.full((len(texts), 2), np.nan)

    monkeypatch.setattr(mine, "load_teacher", load_broken)
    with pytest.raises(InputError, match="teacher: a vector that is not finite"):
        run_mine()
    assert not (here / "cache").exists()


# ---- documents by number


def test_a_beir_corpus(here):
    """Its title stands before its text; a document of a title alone is one."""
    lines = [
        {"_id": "1", "title": "Far", "text": "more", "metadata": {}},
        {"_id": "2", "title": "", "text": "far text"},
        {"_id": "3", "title": "far title", "text": ""},
        {"_id": "4", "title": None, "text": "FAR  Text"},  # the second again
    ]
    (here / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = Corpus(ROWS, ["more.jsonl"])
    assert corpus[:4] == ["Far more", "far text", "far title", "true 1"]
    mined, _ = run_mine(negatives=9, corpus=["more.jsonl"])
    assert {"Far more", "far text", "far title"} <= set(mined[0]["neg"])


def test_documents_are_those_of_lists(here):
    """Against the plain way, a dict of all texts: distinct, in order, and found by their text."""
    rng = np.random.default_rng(0)
    texts = [f"{'Text' if i % 3 else 'text '} {i % 50}" for i in range(300)]
    rows = [
        {"query": "q", "pos": list(rng.choice(texts, 2)), "neg": list(rng.choice(texts, n % 4))}
        for n in range(100)
    ]
    write_rows(here / "rows.jsonl.gz", rows)
    documents = {}
    for row in rows:
        for text in row["pos"] + row["neg"]:
            documents.setdefault(canonical(text), text)
    corpus = Corpus(read_rows(here / "rows.jsonl.gz"))
    assert list(corpus) == list(documents.values()) == corpus[:]
    numbers = corpus.numbers(text_id(text) for text in reversed(documents))
    assert numbers.tolist() == list(range(len(documents)))[::-1]
    asked = ["not there", *documents, "nor this"]
    assert corpus.numbers(map(text_id, asked)).tolist() == list(range(len(documents)))


@pytest.mark.slow
def test_memory_of_documents(here):
    """10,000 rows of 9 texts: at most 300 bytes a row beside the vectors."""
    rows = (
        {
            "query": f"q {i}",
            "pos": [f"{i} 0 {'x' * 200}"],
            "neg": [f"{i} {j} {'x' * 200}" for j in range(1, 9)],
        }
        for i in range(10000)
    )
    write_rows(here / "rows.jsonl", rows)
    tracemalloc.start()
    found = read_rows(here / "rows.jsonl")
    corpus, known = Corpus(found), KnownPositives([found])
    mined = Mined(len(found), 7)
    mined.positive_scores = [np.zeros(10000)]
    _, peak = tracemalloc.get_traced_memory()
    listed = [dict(row) for row in found]
    everything, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus) == 90000
    assert len(known.queries) == 10000
    assert mined.count_short() == 10000
    assert peak < 300 * 10000
    assert everything > 1800 * len(listed)  # control


# ---- the command


def mining(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--model", "teacher", *map(str, flags)])
    mine.main()


def contents(folder):
    """Every file below a folder: its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_input_is_overwritten(here, monkeypatch):
    """By its own name, by a link, as a corpus, as a file of the user's that is in the way."""
    write_rows(here / "rows.jsonl", ROWS)
    for folder in ("a", "b", "c"):
        (here / folder).mkdir()
        write_rows(here / folder / "rows.jsonl", ROWS[:1])
    os.link(here / "rows.jsonl", here / "c" / "same.jsonl")
    (here / "c/rows.jsonl").unlink()
    os.symlink(here / "rows.jsonl", here / "c/rows.jsonl")
    before = contents(here)
    refused = [
        (["--data", "rows.jsonl", "--out", "."], "rows.jsonl: would overwrite the input"),
        (["--data", "rows.jsonl", "--out", "c"], "c/rows.jsonl: would overwrite the input"),
        (
            ["--data", "rows.jsonl", "--corpus", "a/rows.jsonl", "--out", "a"],
            "a/rows.jsonl: would overwrite the input",
        ),
        (["--data", "rows.jsonl", "--out", "b"], "b/rows.jsonl: is in the way, not from this"),
        (
            ["--data", "a/rows.jsonl", "b/rows.jsonl", "--out", "d"],
            "d/rows.jsonl: would be written twice",
        ),
    ]
    for flags, message in refused:
        with pytest.raises(InputError, match="^" + message):
            mining(monkeypatch, *flags)
        assert contents(here) == before
    mining(monkeypatch, "--data", "rows.jsonl", "--out", "d")  # control
    assert len(read_rows(here / "d/rows.jsonl")) == 3


def test_mined_rows_are_of_their_file_and_unchanged(here, monkeypatch):
    """Not of another file of the same name; not when somebody wrote in them, or half is gone."""
    for folder in ("a", "b"):
        (here / folder).mkdir()
        write_rows(here / folder / "rows.jsonl", ROWS)
    flags = ("--out", "d", "--data")
    mining(monkeypatch, *flags, "a/rows.jsonl")
    target = here / "d/rows.jsonl"
    mined = target.read_bytes()
    with pytest.raises(InputError, match="^d/rows.jsonl: was made of .*a/rows.jsonl; use another"):
        mining(monkeypatch, *flags, "b/rows.jsonl")
    assert target.read_bytes() == mined
    for changed in (mined[: len(mined) // 2], b"", mined + b"{}"):
        target.write_bytes(changed)
        with pytest.raises(InputError, match="^d/rows.jsonl: was changed since it was made"):
            mining(monkeypatch, *flags, "a/rows.jsonl")
        assert target.read_bytes() == changed
    target.unlink()
    mining(monkeypatch, *flags, "a/rows.jsonl")  # control
    assert target.read_bytes() == mined


def test_a_table_that_has_changed_is_mined_again(here, monkeypatch):
    """It is known by its name, not by what it was converted to."""
    for count in (4, 5):
        lines = [f"q {i},true {i}" for i in range(count)]
        (here / "qa.csv").write_text("\n".join(["question,answer", *lines]) + "\n")
        mining(monkeypatch, "--data", "qa.csv", "--out", "d")
        assert len(read_rows(here / "d/qa.jsonl")) == count


def test_products_with_hardly_any_memory():
    """More parts than pairs."""
    ids = np.array([1, 0, 1])
    shards = [torch.eye(3)]
    found = mine.inner_products(torch.eye(3), np.array([0, 1, 1]), shards, ids, 8)
    assert found.tolist() == [0, 0, 1]


def test_what_is_half_written_is_mined_again(here, monkeypatch):
    """Killed when other settings' rows are written: what was there before is no longer done."""
    write_rows(here / "rows.jsonl", ROWS)
    flags = ("--data", "rows.jsonl", "--out", "out", "--negatives")
    mining(monkeypatch, *flags, 2)
    two = contents(here / "out")
    write_json = mine.files.write_json

    def killed(path, content):
        if content["plan"] is not None:
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(mine.files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        mining(monkeypatch, *flags, 1)
    monkeypatch.setattr(mine.files, "write_json", write_json)
    assert contents(here / "out") != two
    mining(monkeypatch, *flags, 2)
    (rows,) = (here / "out").glob("*.jsonl")
    assert rows.read_bytes() == two[rows]


def test_one_process_writes_a_folder(here, monkeypatch):
    write_rows(here / "rows.jsonl", ROWS)
    (here / "out").mkdir()
    with locked(here / "out"), pytest.raises(InputError, match="^out: in use by another process$"):
        mining(monkeypatch, "--data", "rows.jsonl", "--out", "out")
    mining(monkeypatch, "--data", "rows.jsonl", "--out", "out")  # control
    assert (here / "out/rows.jsonl").exists()


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--bound", "nan", r"a number in \(-inf, inf\), got nan"),
        ("--memory", "0", r"a number in \(0, inf\), got 0.0"),
        ("--memory", "nan", r"a number in \(0, inf\), got nan"),
        ("--top-k", "0", r"a number in \[1, inf\), got 0"),
        ("--negatives", "0", "1 or more, got 0"),
        ("--negatives", "-1", r"a number in \[0, inf\), got -1"),
        ("--max-length", "0", r"a number in \[1, inf\), got 0"),
        ("--seed", "-1", r"a number in \[0, 1e18\), got -1"),
    ],
)
def test_ranges_of_flags(here, monkeypatch, flag, value, expected):
    with pytest.raises(InputError, match=f"^{flag}: expected {expected}"):
        mining(monkeypatch, flag, value)


def test_an_adapter_is_its_base_too(here):
    """The digest by which vectors are found: other weights of the base, other vectors."""
    (here / "base").mkdir()
    (here / "base/config.json").write_text('{"text_config": {"model_type": "mistral"}}')
    (here / "base/model.safetensors").write_bytes(b"one")
    (here / "adapter").mkdir()
    config = {"base_model_name_or_path": "base"}
    (here / "adapter/adapter_config.json").write_text(json.dumps(config))
    args = argparse.Namespace(max_length=1, dtype="float32")
    first = mine.find_teacher("adapter", args).digest
    assert mine.find_teacher("adapter", args).digest == first  # control
    (here / "base/model.safetensors").write_bytes(b"two")
    assert mine.find_teacher("adapter", args).digest != first
    (here / "base/config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(InputError, match="says how to pool"):
        mine.find_teacher("adapter", args)


def test_inputs_that_can_only_be_read(here, monkeypatch):
    write_rows(here / "rows.jsonl", ROWS)
    (here / "more.jsonl").write_text('{"text": "far more"}\n')
    for name in ("rows.jsonl", "more.jsonl", "teacher/config.json"):
        (here / name).chmod(0o444)
    mining(monkeypatch, "--data", "rows.jsonl", "--corpus", "more.jsonl", "--out", "out")
    assert len(read_rows(here / "out/rows.jsonl")) == 3


def test_command(here, monkeypatch, capsys):
    write_rows(here / "rows.jsonl.gz", ROWS)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["mine.py", "--data", "rows.jsonl.gz", *flags])
        mine.main()
        return capsys.readouterr().out

    teacher = ("--model", "teacher", "--dtype", "float32")
    assert "kept 4" in run(*teacher, "--out", "one", "--negatives", "2")
    done = run(*teacher, "--out", "one", "--negatives", "2")
    assert done == "one/rows.jsonl.gz: already mined with these settings\n"
    assert "kept 2" in run(*teacher, "--out", "one", "--negatives", "1")  # other settings: again
    run(*teacher, "--out", "two", "--negatives", "1", "--memory", "0.00004")  # one query at a time
    one = here / "one/rows.jsonl.gz"
    two = here / "two/rows.jsonl.gz"
    assert one.read_bytes() == two.read_bytes()
    assert [len(row["neg"]) for row in read_rows(one)] == [1, 0, 1]
    report = json.loads((here / "one/rows.jsonl.gz.json").read_text())
    assert report["counts"]["kept"] == 2
    (here / "teacher/config.json").write_text("{}")  # another teacher: mined again
    assert "kept 2" in run(*teacher, "--out", "one", "--negatives", "1")

    with pytest.raises(InputError, match="runs/stage1: no finished run"):
        run()
    with pytest.raises(OSError, match="none.jsonl"):
        run(*teacher, "--corpus", "none.jsonl")
    (here / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty.jsonl"):
        run(*teacher, "--corpus", "empty.jsonl")
    assert (here / "empty.jsonl").read_bytes() == b""
    with pytest.raises(InputError, match="argument --rule: invalid choice: 'odd'"):
        run("--rule", "odd")


@pytest.mark.parametrize("place", ["maps", "rows", "out"])
def test_a_place_that_cannot_be_written_is_one_line(here, monkeypatch, capsys, place):
    """A full disk under the vectors, under the rows; a file where the folder has to be."""
    write_rows(here / "rows.jsonl", ROWS)
    (here / "taken").touch()
    renamed = mine.files.renamed

    def full(path):
        if path.suffix == {"maps": ".safetensors", "rows": ".jsonl"}.get(place):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return renamed(path)

    out = "taken" if place == "out" else "out"
    flags = ("--data", "rows.jsonl", "--out", out)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(mine.files, "renamed", full)
        patch.setattr(signal, "signal", lambda *_: None)
        commands.run_command(lambda: mining(monkeypatch, *flags))
    assert end.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]

    assert "File exists" in line or "No space left on device" in line
    assert not (here / "out/rows.jsonl").exists()
    mining(monkeypatch, "--data", "rows.jsonl", "--out", "out")  # control
    assert (here / "out/rows.jsonl").exists()


def test_one_teacher_is_in_memory(monkeypatch):
    """Two of 7B would not fit: the first has gone when the second is loaded."""

    class Model:
        def encode(self, texts, tasks, **options):
            assert options == {"max_length": 64, "progress": True}
            return texts

    made, alive = [], []

    def load(folder, *rest):
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        model = Model()
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(mine.NVEmbed, "from_pretrained", load)
    monkeypatch.setattr(mine.dialects, "is_sentence_transformer", lambda folder: False)
    for folder in ("one", "two", "one"):
        teacher = mine.Teacher(folder, "", 64, "float32")
        assert mine.load_teacher(teacher)(["a"], [""]) == ["a"]
        assert mine.load_teacher(teacher) is mine.load_teacher(teacher)
    mine.load_teacher.cache_clear()
    assert alive == [0, 0, 0]
