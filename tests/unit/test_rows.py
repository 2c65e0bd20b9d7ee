"""Rows are those of their file, whatever tool wrote it; what is wrong is told with its line."""

import gzip
import json
import re

import threading
import tracemalloc

import numpy as np
import pytest

from data import rows as rows_module
from data.commands import InputError
from data.files import write_rows
from data.rows import canonical, check_row, read_rows, text_id

ROW = {"query": "q", "pos": ["p"], "neg": ["n"]}
TEXTS = "expected a list of non-empty strings"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"query": "q", "pos": ["p"]', "expected a JSON object: "),
        ("[]", "expected a JSON object, got list"),
        ('{"pos": ["p"]}', "field 'query': expected a non-empty string"),
        ('{"query": 3, "pos": ["p"]}', "field 'query': expected a non-empty string"),
        ('{"query": " ", "pos": ["p"]}', "field 'query': expected a non-empty string"),
        ('{"query": "q"}', f"field 'pos': {TEXTS}"),
        ('{"query": "q", "pos": "p"}', f"field 'pos': {TEXTS}"),
        ('{"query": "q", "pos": []}', "field 'pos': expected at least one positive"),
        ('{"query": "q", "pos": ["p"], "neg": [""]}', f"field 'neg': {TEXTS}"),
        ('{"query": "q", "pos": ["p"], "prompt": 1}', "field 'prompt': expected a string"),
        (
            '{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}',
            "field 'pos_scores': expected 1 numbers",
        ),
        (
            '{"query": "q", "pos": ["p"], "pos_scores": 1}',
            "field 'pos_scores': expected 1 numbers",
        ),
        (
            '{"query": "q", "pos": ["p"], "pos_scores": [NaN]}',
            "field 'pos_scores': expected 1 numbers",
        ),
        (
            '{"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [-1e39]}',
            "field 'neg_scores': expected 1 numbers",
        ),
        (
            '{"query": "q", "pos": ["p"], "pos_scores": [true]}',
            "field 'pos_scores': expected 1 numbers",
        ),
        ('{"query": "q", "pos": ["p"], "negs": ["n"]}', "unknown field 'negs': expected one of "),
        ('{"query": "q", "positive": ["p"]}', "unknown field 'positive': expected one of "),
        ('{"query": "q", "pos": ["\\ud800"]}', "field 'pos': half of a surrogate pair is no text"),
        (
            '{"query": "q", "pos": ["p"], "prompt": "Instruct: find"}',
            "field 'prompt': expected the bare task",
        ),
        ("[" * 10000, "expected a JSON object: "),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_bad_row(tmp_path, name, line, message):
    path = tmp_path / name
    content = ((json.dumps(ROW) + "\n") * 2 + line + "\n").encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}:3: {message}")) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_bad_file_of_rows(tmp_path):
    whole = gzip.compress((json.dumps(ROW) + "\n").encode() * 1000)
    damaged = whole[:20] + b"\xff" * 20 + whole[40:]
    contents = {
        "cut.jsonl.gz": whole[:-20],
        "damaged.jsonl.gz": damaged,
        "plain.jsonl.gz": b"{}\n",
        "latin.jsonl": b"\xff\n",
        "empty.jsonl": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jsonl").mkdir()
    for name in (*contents, "folder.jsonl", "missing.jsonl"):
        path = tmp_path / name
        with pytest.raises(
            InputError, match="^" + re.escape(str(path)) + "(:1)?: expected"
        ) as caught:
            read_rows(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "whole.jsonl.gz").write_bytes(whole)  # control
    assert list(read_rows(tmp_path / "whole.jsonl.gz")) == [ROW] * 1000


# ---- what other tools write


def test_what_other_tools_write_is_read(tmp_path):
    """A byte order mark, Windows line ends, blank lines, null for what is missing."""
    path = tmp_path / "rows.jsonl"
    lines = [
        "\ufeff" + json.dumps({"query": "a", "pos": ["p"], "neg": None, "prompt": None}) + "\r",
        "",
        json.dumps({"query": "b", "pos": ["p"], "pos_scores": None, "_id": 7, "type": "x"}),
        "  ",
        "",
    ]
    path.write_text("\n".join(lines), "utf-8")
    rows = read_rows(path)
    assert rows[0] == {"query": "a", "pos": ["p"], "neg": []}
    assert rows[1] == {"query": "b", "pos": ["p"], "neg": [], "_id": 7, "type": "x"}
    assert len(rows) == 2
    assert rows.where(1) == f"{path}:3"


def test_a_null_query_is_missing():
    with pytest.raises(InputError, match="^here: field 'query': expected a non-empty string$"):
        check_row({"query": None, "pos": ["p"]}, "here")


# ---- rows stay in their file


@pytest.fixture
def hundred():
    return [ROW | {"query": f"é {i}", "pos": ["x" * i + "y"]} for i in range(100)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_a_sequence(tmp_path, cache, hundred, name):
    path = tmp_path / name
    write_rows(path, iter(hundred))
    rows = read_rows(path)
    assert list(rows) == hundred
    assert rows[np.int64(7)] == hundred[7]
    assert rows[-1] == hundred[-1]
    assert list(rows[10:20:3]) == hundred[10:20:3]
    some = rows.select([5, 90, 5])
    assert list(some) == [hundred[5], hundred[90], hundred[5]]
    assert list(some.select(np.array([1]))) == [hundred[90]]
    assert [some.where(i) for i in range(3)] == [f"{path}:6", f"{path}:91", f"{path}:6"]
    assert len(rows.select([])) == 0
    with pytest.raises(IndexError):
        rows[100]


def test_the_digest_is_of_the_rows(tmp_path, cache, hundred):
    digests = {}
    for name, content in (("a.jsonl", hundred), ("b.jsonl.gz", hundred), ("c.jsonl", hundred[1:])):
        write_rows(tmp_path / name, content)
        digests[name[0]] = read_rows(tmp_path / name).digest
    assert digests["a"] == digests["b"] != digests["c"]


def test_a_gz_is_unpacked_once(tmp_path, cache, hundred, monkeypatch):
    write_rows(tmp_path / "a.jsonl.gz", hundred)
    first = read_rows(tmp_path / "a.jsonl.gz")
    (unpacked,) = (cache / "rows").iterdir()
    monkeypatch.setattr(rows_module, "unpack", None)
    assert list(read_rows(tmp_path / "a.jsonl.gz")) == list(first)
    unpacked.unlink()  # what is in use stays readable
    assert first[3] == hundred[3]


def test_a_cache_that_cannot_be_written(tmp_path, cache, hundred):
    cache.write_text("no folder")
    write_rows(tmp_path / "a.jsonl.gz", hundred)
    rows = read_rows(tmp_path / "a.jsonl.gz")
    assert list(rows) == hundred
    assert rows.where(9) == f"{tmp_path}/a.jsonl.gz:10"


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_file_that_changes_while_in_use(tmp_path, hundred, change):
    path = tmp_path / "rows.jsonl"
    write_rows(path, hundred)
    rows = read_rows(path)
    content = path.read_bytes()
    path.write_bytes(content[:-20] if change == "shorter" else content.replace(b"xy", b"zy"))
    with pytest.raises(InputError, match=f"^{path}: changed while it was in use$"):
        rows[99]
    assert rows[0] == hundred[0]  # control: this one is as it was


def test_threads_share_rows(tmp_path, hundred):
    write_rows(tmp_path / "rows.jsonl", hundred)
    rows = read_rows(tmp_path / "rows.jsonl")
    wrong = []

    def read():
        for _ in range(20):
            wrong.extend(i for i in range(100) if rows[i] != hundred[i])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_row_takes_few_bytes(tmp_path):
    """20,000 rows of 1 KB: at most 40 bytes each stay, of 32 and a rest; lists take over 1,000."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, ({"query": f"q {i}", "pos": ["x" * 1000]} for i in range(20000)))
    tracemalloc.start()
    rows = read_rows(path)
    kept, peak = tracemalloc.get_traced_memory()
    as_list = list(rows)
    listed, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 40 * len(rows)
    assert peak < 100 * len(rows)
    assert listed > 1000 * len(as_list)  # control


# ---- one rule for equal texts


def test_texts_that_differ_in_case_or_space_are_one():
    assert canonical(" Straße\u00a0A \n b") == canonical("STRASSE a b")
    assert text_id("A  b\n") == text_id("a B")
    assert text_id("a b") != text_id("ab")
