"""Each mining rule on planted scores, search against brute force, and the command, with controls that
fail."""

import argparse
import json
import sys

import mine
import numpy as np
import pytest
from nvembed import InputError

from data.prepare import read_rows, write_rows

SCORES = np.array(
    [[0.90, 0.80, 0.76, 0.75, 0.70, 0.10], [-0.05, -0.099, -0.1, -0.104, -0.106, -0.3]], np.float32
)
LOWEST = np.array([0.80, -0.1])  # lowest positive's score of each query
KNOWN = np.zeros_like(SCORES, bool)


def options(**changes):
    found = {"rule": "percpos", "percent": 0.95, "margin": 0.05, "threshold": 0.7, "shift": 2, "top_k": 100}
    return argparse.Namespace(**(found | {"negatives": 2, "seed": 0} | changes))


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("naive", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ("shifted", [2, 3, 4, 5], [2, 3, 4, 5]),
        ("abs", [5], [0, 1, 2, 3, 4, 5]),  # 0.70 is not < 0.70
        ("margin", [4, 5], [5]),  # < 0.75, < -0.15
        ("percpos", [3, 4, 5], [4, 5]),  # < 0.76, < -0.105: further below where the score is negative
        ("sampled", [3, 4, 5], [4, 5]),
    ],
)
def test_rules_on_planted_scores(rule, first, second):
    passed = mine.allowed(SCORES.astype(np.float64).round(6), LOWEST, KNOWN, options(rule=rule))
    assert [list(np.flatnonzero(line)) for line in passed] == [first, second]
    if rule == "percpos":  # control: 0.95 x the score would let -0.099 through
        assert not passed[1][2] and SCORES[1][2] < 0.95 * LOWEST[1]


def test_shift_counts_after_positives():
    known = KNOWN.copy()
    known[0, 0] = True
    assert list(np.flatnonzero(mine.allowed(SCORES, LOWEST, known, options(rule="shifted"))[0])) == [3, 4, 5]


def test_choose_first_and_random():
    usable = np.array([[False, True, True, False, True, True], [False] * 6])
    assert mine.choose(usable, 2).tolist() == [[False, True, True, False, False, False], [False] * 6]
    draws = [mine.choose(usable, 2, np.random.default_rng(i)) for i in range(200)]
    share = np.mean(draws, axis=0)[0]
    assert share[[0, 3]].sum() == 0 and np.abs(share[[1, 2, 4, 5]] - 0.5).max() < 0.12
    assert all(draw.sum() == 2 for draw in draws)


def test_search_equals_brute_force_with_ties():
    rng = np.random.default_rng(0)
    q, d = (rng.standard_normal((n, 16)).astype(np.float32) for n in (50, 300))
    d[200:250] = d[100:150]  # exact ties
    scores, ids = mine.search(q, d, 300, chunk=7)
    full = q @ d.T
    assert np.abs(scores - np.take_along_axis(full, ids, axis=1)).max() < 1e-5
    assert (np.diff(scores, axis=1) <= 0).all() and (np.sort(ids, axis=1) == np.arange(300)).all()
    place = ids.argsort(axis=1)
    assert (place[:, 100:150] < place[:, 200:250]).all()  # ties by lower row
    top = mine.search(q, d[:200], 10)[1]
    assert (top == (-(q @ d[:200].T)).argsort(axis=1)[:, :10]).all()


VECTORS = {"q": [1, 0], "true": [0.8, 0.6], "near": [0.79, 0.613], "fair": [0.7, 0.714], "far": [0, 1]}


def encode(texts, instruction):
    """A planted encoder: a text's first word names its vector."""
    CALLS.append((instruction, list(texts)))
    v = np.array([VECTORS[mine.same(text).split()[0]] for text in texts], np.float32)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


CALLS = []
ROWS = [
    {"query": "q one", "pos": ["true 1"], "neg": ["near copy", "fair a", "far b", "FAR   b"]},
    {
        "query": "Q  ONE",
        "pos": ["far other"],
        "neg": [],
    },  # the same query: its positive is none of the first's negatives
    {"query": "q two", "pos": ["true 2", "fair positive"], "neg": [], "prompt": "Own task"},
]


def test_false_negatives_counts_and_prompts():
    CALLS.clear()
    out, counts = mine.mine(ROWS, encode, "Task", False, options(negatives=9))
    assert out[0]["neg"] == [
        "fair a",
        "fair positive",
        "far b",
    ]  # not: near copy, true 2, far other, a duplicate
    assert out[0]["neg_scores"] == sorted(out[0]["neg_scores"], reverse=True) and out[0]["pos_scores"] == [
        0.8
    ]
    naive, _ = mine.mine(ROWS, encode, "Task", False, options(negatives=9, rule="naive"))
    assert {"near copy", "true 2"} <= set(naive[0]["neg"]) and "far other" not in naive[0]["neg"]
    assert out[2]["pos_scores"] == [0.8, pytest.approx(0.7, abs=1e-3)]
    assert out[2]["neg"] == ["far b", "far other"]  # the lowest positive decides: fair a is too near to it
    assert counts["documents"] == 7 and counts["candidates"] == 21 and counts["rows_short"] == 3
    assert counts["candidates"] == sum(counts[name] for name in ("positive", "rule", "surplus", "kept"))
    few, counts = mine.mine(ROWS, encode, "Task", False, options(negatives=1))
    assert [len(row["neg"]) for row in few] == [1, 0, 1]  # nothing scores below the second's positive, 0
    assert counts["surplus"] > 0 and counts["rows_short"] == 1
    assert counts["candidates"] == sum(counts[name] for name in ("positive", "rule", "surplus", "kept"))
    assert {task for task, texts in CALLS if "q two" in texts} == {"Own task"}
    assert {task for task, texts in CALLS if "true 1" in texts} == {""}
    CALLS.clear()
    mine.mine(ROWS, encode, "Task", True, options())
    assert {task for task, texts in CALLS if "true 1" in texts} == {"Task"}


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mine, "load_teacher", lambda *_: encode)
    write_rows(tmp_path / "rows.jsonl.gz", ROWS)
    (tmp_path / "teacher").mkdir()

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["mine.py", "--data", "rows.jsonl.gz", *flags])
        mine.main()
        return capsys.readouterr().out

    assert "kept 4" in run("--model", "teacher", "--out", "one", "--negatives", "2")
    assert "already mined so" in run("--model", "teacher", "--out", "one", "--negatives", "2")
    assert "kept 2" in run(
        "--model", "teacher", "--out", "one", "--negatives", "1"
    )  # other settings: mined again
    run("--model", "teacher", "--out", "two", "--negatives", "1")
    files = [tmp_path / out / "rows.jsonl.gz" for out in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [len(row["neg"]) for row in read_rows(files[0])] == [1, 0, 1]
    assert json.loads((tmp_path / "one" / "rows.jsonl.gz.json").read_text())["counts"]["kept"] == 2
    with pytest.raises(InputError, match="runs/stage1: no finished run"):
        run()
    with pytest.raises(SystemExit) as stop:
        run("--rule", "odd")
    assert stop.value.code == 2
