"""Tables of every form are read; what is missing, damaged or no table is one line."""

import gzip
import json
import re

import pytest
from huggingface_hub.errors import HTTPError
from sources import write_table

from data import tables
from data.commands import InputError

ROWS = [{"query": "a", "answer": "b"}, {"query": "c", "answer": "d"}]
LINE = b'{"query": "a", "answer": "b"}\n'
ZIPPED = gzip.compress(LINE * 5000)


def read(path, **fields):
    return list(tables.read_table({"path": str(path), "split": "train"} | fields))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_file(tmp_path, name):
    path = write_table(tmp_path / name, ROWS)
    where = [f"{path}:1", f"{path}:2"]
    rows = [row | {"config": None} for row in ROWS]
    assert read(path) == list(zip(where, rows, strict=True))
    assert len(read(path, rows=1)) == 1


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t")])
def test_file_of_columns(tmp_path, name, mark):
    path = tmp_path / name
    path.write_text(f"query{mark}answer\na{mark}b\n")
    assert read(path) == [(f"{path}:1", ROWS[0] | {"config": None})]


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t")])
def test_cells_are_texts(tmp_path, place, name, mark):
    """What looks like a number or NA too, in a folder as well; an empty one is null."""
    lines = ["id,answer,neg", "007,None,NA", "12,1.50,"]
    (tmp_path / name).write_text("\n".join(lines).replace(",", mark) + "\n")
    rows = [row for _, row in read(tmp_path / name if place == "file" else tmp_path)]
    assert rows == [
        {"config": None, "id": "007", "answer": "None", "neg": "NA"},
        {"config": None, "id": "12", "answer": "1.50", "neg": None},
    ]


def test_texts_of_json_are_as_they_are(tmp_path):
    """Dates too; one list or lines; what only some rows have is null in the others."""
    rows = [{"a": "2021-05-03"}, {"a": "2021-05-04", "b": "x"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    for path in (tmp_path / "list.json", write_table(tmp_path / "lines.jsonl", rows)):
        found = [row for _, row in read(path)]
        assert found == [{"config": None, "b": None} | row for row in rows]


@pytest.mark.parametrize("name", ["qa[1].parquet", "qa[2].json", "qa*.jsonl", "qa[3].csv"])
def test_a_name_is_no_pattern(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text("query,answer\na,b\nc,d\n")
    else:
        write_table(path, ROWS)
    assert [row for _, row in read(path)] == [row | {"config": None} for row in ROWS]


def test_configs_of_a_converted_branch(tmp_path):
    """The hub's branch of Parquet files names no configs: each is a folder of its splits."""
    for config, row in zip("xy", ROWS, strict=True):
        folder = tmp_path / config / "train"
        folder.mkdir(parents=True)
        write_table(folder / "0000.parquet", [row])
    found = read(tmp_path, config=["y", "x"], revision="refs/convert/parquet")
    assert [row for _, row in found] == [ROWS[1] | {"config": "y"}, ROWS[0] | {"config": "x"}]


def test_folder_of_two_configs(tmp_path):
    """As a clone of a hub repository; a row knows its config."""
    header = "---\nconfigs:\n"
    for config, row in zip("xy", ROWS, strict=True):
        write_table(tmp_path / f"{config}.jsonl", [row])
        header += f"- config_name: {config}\n  data_files: {config}.jsonl\n"
    (tmp_path / "README.md").write_text(header + "---\n")
    assert read(tmp_path, config=["y", "x"]) == [
        (f"{tmp_path}:y:1", ROWS[1] | {"config": "y"}),
        (f"{tmp_path}:x:1", ROWS[0] | {"config": "x"}),
    ]
    with pytest.raises(InputError, match=f"^{tmp_path}:z: BuilderConfig 'z' not found"):
        read(tmp_path, config="z")
    with pytest.raises(InputError, match=f"^{tmp_path}:x: Bad split: test"):
        read(tmp_path, config="x", split="test")


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("empty.jsonl", b"", ": expected at least one row"),
        ("a.txt", b"text", ": expected a file of "),
        ("cut.jsonl", LINE + b'{"query"', ":2: "),
        ("words.jsonl", b"hello\n", ":1: "),
        ("latin.jsonl", b'{"query": "\xff"}\n', ":1: "),
        ("array.json", b"[1, 2", ": expected JSON: "),
        ("number.json", b"[1, 2]", ":1: expected a JSON object, got int"),
        ("null.json", b"null", ":1: expected a JSON object, got NoneType"),
        ("nulls.json", b'[null, {"query": "a"}]', ":1: expected a JSON object, got NoneType"),
        ("plain.jsonl.gz", LINE, ": "),
        ("cut.jsonl.gz", ZIPPED[:-20], ": "),
        ("damaged.jsonl.gz", ZIPPED[:30] + b"x" * 30 + ZIPPED[60:], ": "),
        ("a.parquet", b"PAR1 and nothing else", ": "),
        ("quote.csv", b'a,b\n"1,2\n', ":1: "),
        ("blank.csv", b"\n", ": expected the columns' names in the first line"),
    ],
)
def test_bad_file(tmp_path, name, content, place):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}{place}")) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_column_that_changes_its_type(tmp_path):
    """The second file of a folder has a list where the first has a number."""
    write_table(tmp_path / "train-0.parquet", [{"a": 1}] * 3)
    write_table(tmp_path / "train-1.parquet", [{"a": [1]}])
    with pytest.raises(InputError, match=f"^{tmp_path}:4: Couldn't cast array of type"):
        read(tmp_path)


def test_bad_folder(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/missing: "):
        read(tmp_path / "missing")
    with pytest.raises(InputError, match=f"^{tmp_path}: "):  # no files
        read(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(LINE)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(InputError, match=f"^{tmp_path}: "):  # no YAML
        read(tmp_path)
    (tmp_path / "README.md").unlink()
    assert len(read(tmp_path)) == 1  # control


def test_folder_of_code(tmp_path):
    """A repository whose rows are made by its own code is refused."""
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text("raise SystemExit\n")
    with pytest.raises(InputError, match=f"^{folder}: Dataset scripts are no longer supported"):
        read(folder)


def test_no_network():
    with pytest.raises(InputError, match="^no/such-set: Couldn't reach"):
        read("no/such-set")


def test_connection_that_fails_on_the_way(monkeypatch):
    """Between two rows. Control: a mistake of ours keeps its traceback."""
    errors = []

    def rows(*_, **__):
        yield ROWS[0]
        raise errors[0]

    monkeypatch.setattr(tables, "open_table", rows)
    for error in (ConnectionError("Server Disconnected"), HTTPError("no route")):
        errors[:] = [error]
        with pytest.raises(InputError, match=f"^hub/set:2: {error}$"):
            read("hub/set")
    errors[:] = [NameError("name 'x' is not defined")]
    with pytest.raises(NameError):
        read("hub/set")


# ---- fields of a row


def test_fields():
    row = {"a": {"b": "x "}, "list": [{"b": "y"}, {"b": None}], "n": 3, "t": "z", "empty": ""}
    assert tables.get(row, "a.b", "here") == "x "
    assert tables.get(row, "list.b", "here") == ["y", None]
    assert tables.texts_of(row, "a.b", "here") == ["x"]
    assert tables.texts_of(row, "list.b", "here") == ["y", ""]
    assert tables.texts_of(row, ["t", "empty", "a.b"], "here") == ["z x"]
    assert tables.ids_of(row, "n", "here") == ["3"]
    assert tables.get(row | {"a.b": "dot"}, "a.b", "here") == "dot"
    row |= {"null": None, "some": [None, {"b": 1}, {"b": None}]}
    assert tables.get(row, "null.b", "here") is None
    assert tables.get(row, "some.b", "here") == [1, None]
    assert tables.ids_of(row, "some.b", "here") == ["1"]
    assert tables.ids_of(row, "null", "here") == []
    for name in ("b", "a.c", "list.c", "t.b", "some.c"):
        with pytest.raises(InputError, match=f"^here: field '{name}': missing, found "):
            tables.get(row, name, "here")
    with pytest.raises(InputError, match="^here: field 'n': expected a string or strings, got"):
        tables.texts_of(row, "n", "here")
