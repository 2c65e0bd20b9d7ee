"""Files come back as written; whatever is wrong with one is one line with its place and field."""

import gzip
import json
import os
import re
import tracemalloc
import zlib

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
        (b"[" * 10**5, "expected a JSON file: maximum recursion depth exceeded"),
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


# ---- files of others, and of those who were killed


def test_files_have_the_mode_of_any_new_one(tmp_path):
    """safetensors writes for the owner alone; a group that shares a cache has to read it."""
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    with files.renamed(tmp_path / "map") as temporary:
        temporary.touch(0o600)
        assert temporary.stat().st_mode != expected  # control
    assert (tmp_path / "map").stat().st_mode == expected


def test_what_a_killed_process_left_is_removed(tmp_path):
    """By the next that writes the same file, but not what another process is writing now."""
    folders = {}
    for name in ("killed", "writing", "young"):
        folders[name] = tmp_path / f".rows.jsonl.{name}"
        folders[name].mkdir()
        (folders[name] / "rows.jsonl").write_text("half")
    (tmp_path / ".rows.jsonl.user").write_text("a file of the user's")
    for name in ("killed", "writing"):
        os.utime(folders[name], (0, 0))
    with files.locked(folders["writing"]):
        files.write_rows(tmp_path / "rows.jsonl", [ROW])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".rows.jsonl.writing", ".rows.jsonl.young", ".rows.jsonl.user", "rows.jsonl"}


def test_what_another_thread_removes_meanwhile(tmp_path, monkeypatch):
    gone = tmp_path / ".rows.jsonl.gone"
    monkeypatch.setattr(files.Path, "glob", lambda *args: [gone])
    files.write_rows(tmp_path / "rows.jsonl", [ROW])
    assert list(read_rows(tmp_path / "rows.jsonl")) == [ROW]


def test_locks(tmp_path):
    with files.locked(tmp_path), pytest.raises(InputError, match="in use by another process$"):
        with files.locked(tmp_path):
            pass
    with files.locked(tmp_path):  # control: it ends with the block
        pass


def test_outputs_are_no_inputs(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.touch()
    os.symlink(one, other)
    os.link(one, tmp_path / "third")
    for output in (one, other, tmp_path / "third", tmp_path / "x" / ".." / "one"):
        with pytest.raises(InputError, match="would overwrite the input"):
            files.check_outputs([tmp_path / "new", output], [one])
    with pytest.raises(InputError, match="would be written twice"):
        files.check_outputs([one, one], [])
    files.check_outputs([one, tmp_path / "new"], [tmp_path / "four", tmp_path / "x/one"])  # control


def test_half_of_a_surrogate_pair_is_not_written(tmp_path):
    files.write_rows(tmp_path / "rows.jsonl", [ROW])
    with pytest.raises(InputError, match="rows.jsonl: no text: .* surrogates not allowed"):
        files.write_rows(tmp_path / "rows.jsonl", [ROW | {"query": "\ud800"}])
    assert list(read_rows(tmp_path / "rows.jsonl")) == [ROW]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_written_one_by_one(tmp_path, name):
    """100 rows of 1 MB: at most a few of them are in memory."""
    tracemalloc.start()
    files.write_rows(tmp_path / name, (ROW | {"query": f"{i}" * 10**6} for i in range(100)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7


def test_gzipped_rows_are_those_of_gzip(tmp_path):
    """The shipped files stay as they are, whatever writes them."""
    files.write_rows(tmp_path / "rows.jsonl", [ROW] * 1000)
    files.write_rows(tmp_path / "rows.jsonl.gz", [ROW] * 1000)
    content = (tmp_path / "rows.jsonl").read_bytes()
    packed = (tmp_path / "rows.jsonl.gz").read_bytes()
    assert packed == zlib.compress(content, 9, wbits=31)
