"""Files come back as written; whatever is wrong with one is one line with its place and field."""

import gzip
import json
import re

import pytest

from data import commands, files
from data.commands import InputError
from data.rows import read_rows

ROW = {"query": "q", "pos": ["p"], "neg": ["n"]}


def test_fields_of_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    lines = files.json_lines(path, text=str)
    assert next(lines) == (f"{path}:1", {"text": "a"})
    with pytest.raises(InputError, match=f"^{path}:2: field 'text': expected str$"):
        next(lines)


def test_rows_come_back_and_bytes_repeat(tmp_path, monkeypatch):
    rows = [ROW | {"query": f"é日 {i}", "pos_scores": [0.5], "prompt": "x"} for i in range(50)]
    first = tmp_path / "a.jsonl.gz"
    second = tmp_path / "b.jsonl.gz"
    files.write_rows(first, rows)
    monkeypatch.setattr("time.time", lambda: 1e9)
    files.write_rows(second, rows)
    assert list(read_rows(first)) == rows
    assert first.read_bytes() == second.read_bytes()
    stamped = gzip.compress(first.read_bytes())  # control: by default gzip stores the time
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert stamped != gzip.compress(first.read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.write_rows(path, [ROW])
    with pytest.raises(KeyboardInterrupt), files.renamed(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(read_rows(path)) == [ROW]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "expected a JSON file: "),
        (b"\xff", "expected a JSON file: "),
        (b"[1]", "expected a JSON object, got list"),
        (None, "expected a JSON file: "),
    ],
)
def test_bad_json(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: {message}")) as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)
    files.write_json(path, {"a": 1})  # control
    assert files.read_json(path) == {"a": 1}


def test_only_bad_input_is_one_line(capsys):
    """A command turns InputError into a line and status 2; our mistakes keep their traceback."""

    def bad_input():
        raise InputError("file: field 'a': expected int")

    def mistake():
        raise NameError("name 'x' is not defined")

    with pytest.raises(SystemExit) as exit_of:
        commands.run_command(bad_input)
    assert exit_of.value.code == 2
    assert capsys.readouterr().err == "error: file: field 'a': expected int\n"
    with pytest.raises(NameError):
        commands.run_command(mistake)


def test_optional_package():
    assert commands.optional_package("json", "--flag") is json
    message = "^--flag: expected the package no_such: pip install no_such$"
    with pytest.raises(InputError, match=message):
        commands.optional_package("no_such.part", "--flag")
