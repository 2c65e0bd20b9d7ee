"""Own rows from tables: every form of a file, known and chosen names of columns, the hub.

The oracle is the table itself, as Python lists; each refusal has a control beside it.
"""

import csv
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from sources import write_table

from data import columns, tables
from data.columns import data_entry, rows_file
from data.commands import InputError
from data.files import write_rows
from data.rows import read_rows

QA = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
ROWS = [{"query": f"q{i}", "pos": [f"a{i}"], "neg": []} for i in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(data, names=None):
    entry = data_entry(str(data), names)
    return list(read_rows(entry["file"], shown=entry["shown"]))


def refused(data, names=None):
    """The one line that a table is refused with."""
    with pytest.raises(InputError) as caught:
        rows_of(data, names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_csv(path, table, mark=","):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=mark).writerows(table)
    return path


# ---- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_table_is_read_as_rows(tmp_path, name):
    assert rows_of(write_table(tmp_path / name, QA)) == ROWS


@pytest.mark.parametrize(
    "name, mark", [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.tsv.gz", "\t")]
)
def test_cells_are_texts(tmp_path, name, mark):
    """What looks like a number or NA too; quoted commas, tabs, lines and quotes; an empty cell."""
    texts = ["1642", "NA", 'He said "no",\tand\nleft.', "é"]
    table = [["\ufeffquestion", "answer", "negative"], *([t, t + "!", ""] for t in texts), []]
    found = rows_of(write_csv(tmp_path / name, table, mark))
    assert found == [{"query": t, "pos": [t + "!"], "neg": []} for t in texts]


def test_rows_of_ours_are_read_where_they_are(tmp_path, cache):
    path = tmp_path / "my.jsonl"
    write_rows(path, ROWS)
    assert rows_file(str(path)) == str(path)
    assert data_entry(str(path))["name"] == "my"
    assert not cache.exists()
    write_rows(path, QA)  # control
    assert rows_file(str(path)) != str(path) and cache.exists()


def test_a_text_is_a_list_of_one(tmp_path):
    path = tmp_path / "my.jsonl"
    write_rows(path, [{"query": "q", "pos": "p", "neg": "n"}, ROWS[0] | {"neg": ["m", "n"]}])
    assert rows_of(path) == [
        {"query": "q", "pos": ["p"], "neg": ["n"]},
        ROWS[0] | {"neg": ["m", "n"]},
    ]


def test_a_table_is_converted_once_for_each_content(tmp_path, cache, monkeypatch):
    one = write_table(tmp_path / "a.parquet", QA)
    first = rows_file(str(one))
    assert first.name == "a.jsonl" and first.is_relative_to(cache)
    (tmp_path / "b").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "b" / "a.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(columns, "convert", None)
        assert rows_file(str(tmp_path / "b" / "a.parquet")) == first
    write_table(tmp_path / "a.parquet", QA[:2])
    assert rows_of(one) == ROWS[:2]  # the same name, other content
    assert rows_of(one, "query=answer,pos=question")[0]["query"] == "a0"  # other columns
    assert len(list((cache / "tables").glob("a-*"))) == 3


def test_what_is_printed(tmp_path, capsys):
    rows_of(write_table(tmp_path / "a.parquet", [row | {"id": 1} for row in QA]))
    wanted = f"{tmp_path}/a.parquet: 3 rows; query = question, pos = answer; not used: id\n"
    assert capsys.readouterr().out == wanted
    rows_of(tmp_path / "a.parquet")
    assert capsys.readouterr().out == ""


def test_half_a_conversion_is_none(tmp_path, cache):
    path = write_table(tmp_path / "a.parquet", [*QA, {"question": "q", "answer": " "}])
    message = f"{path}:4: column 'answer': expected text, got ' '"
    assert refused(path) == message
    assert refused(path) == message
    assert not [p for p in (cache / "tables").rglob("*") if p.is_dir()]


# ---- columns


@pytest.mark.parametrize("query", columns.KNOWN["query"])
@pytest.mark.parametrize("pos", columns.KNOWN["pos"])
def test_known_names(tmp_path, query, pos):
    table = [{query: row["query"], pos: row["pos"][0]} for row in ROWS]
    assert rows_of(write_table(tmp_path / "a.jsonl", table)) == ROWS


def test_numbered_negatives_and_nulls(tmp_path):
    """As sentence-transformers' sets have them; the lists are in the order of the columns."""
    names = [f"negative_{i}" for i in range(1, 12)]
    table = [
        {"anchor": "a", "positive": "b"} | {name: name for name in names},
        {"anchor": "c", "positive": "d"} | {name: None for name in names[:-1]} | {names[-1]: "x"},
    ]
    expected = [
        {"query": "a", "pos": ["b"], "neg": names},
        {"query": "c", "pos": ["d"], "neg": ["x"]},
    ]
    for name in ("a.parquet", "a.jsonl"):
        assert rows_of(write_table(tmp_path / name, table)) == expected


def test_lists_prompts_and_scores(tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["m", "n"], "prompt": "Find it"}
    row |= {"pos_scores": [0.5], "neg_scores": [0.25, 0.125]}
    path = write_table(tmp_path / "a.parquet", [row, row | {"prompt": None, "neg_scores": None}])
    without = {name: row[name] for name in ("query", "pos", "neg", "pos_scores")}
    assert rows_of(path) == [row, without | {"neg_scores": []}]


def test_chosen_columns(tmp_path):
    """Nothing else is used, not even a known name; a.b is field b of a, or of each of a."""
    found = {"neg": "no", "t": {"title": "q"}, "p": [{"text": "x"}, {"text": "y"}], "s": 1.5}
    path = write_table(tmp_path / "a.jsonl", [found])
    assert rows_of(path, "query=t.title, pos=p.text") == [
        {"query": "q", "pos": ["x", "y"], "neg": []}
    ]
    assert rows_of(path, "query=t.title,pos=neg,neg=neg,neg=t.title,neg_scores=s,neg_scores=s") == [
        {"query": "q", "pos": ["no"], "neg": ["no", "q"], "neg_scores": [1.5, 1.5]}
    ]


def test_rows_of_a_file_may_differ(tmp_path):
    path = write_table(
        tmp_path / "a.jsonl", [QA[0], QA[1] | {"negative": "n"}, {"query": "q2", "passage": "a2"}]
    )
    assert rows_of(path) == [ROWS[0], ROWS[1] | {"neg": ["n"]}, ROWS[2]]


KNOWN_NAMES = (
    "expected query: query or question or anchor; pos: pos or positive or positives or answer or "
    "document or passage; neg: neg or negative or negatives; or --columns query=NAME,pos=NAME"
)


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "b"], "unknown column 'a' of ['a', 'b']"),
        (["query", "answer", "score"], "unknown column 'score' of ['query', 'answer', 'score']"),
        (["query", "answer", "label"], "unknown column 'label' of ['query', 'answer', 'label']"),
        (["question"], "no column for pos in ['question']"),
        (["answer", "id"], "no column for query in ['answer', 'id']"),
        (
            ["query", "document", "answer"],
            "['document', 'answer'] could each be pos in ['query', 'document', 'answer']",
        ),
        (
            ["query", "question", "answer"],
            "['query', 'question'] could each be query in ['query', 'question', 'answer']",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_that_are_not_clear(tmp_path, ending, names, message):
    path = tmp_path / f"a.{ending}"
    row = {name: "x" for name in names}
    if ending == "csv":
        write_csv(path, [names, row.values()])
    else:
        write_table(path, [row])
    assert refused(path) == f"{path}:1: {message}: {KNOWN_NAMES}"
    chosen = f"query={names[0]},pos={names[-1]}"
    assert rows_of(path, chosen) == [{"query": "x", "pos": ["x"], "neg": []}]  # control


@pytest.mark.parametrize(
    "names, message",
    [
        ("query", "expected FIELD=COLUMN of ['query', 'pos', 'neg', 'prompt', 'pos_scores', "),
        ("query=", "expected FIELD=COLUMN of ['query', "),
        ("querry=a,pos=b", "expected FIELD=COLUMN of ['query', "),
        ("", "expected FIELD=COLUMN of ['query', "),
        ("query=a", "expected pos=COLUMN too, got 'query=a'"),
        ("pos=a", "expected query=COLUMN too, got 'pos=a'"),
        ("query=a,query=b,pos=c", "expected one column for query, got ['a', 'b']"),
    ],
)
def test_bad_flag(tmp_path, names, message):
    path = write_table(tmp_path / "a.jsonl", QA)
    assert refused(path, names).startswith(f"--columns: {message}")
    with pytest.raises(InputError, match="^--columns: expected --data with it$"):
        data_entry(None, "query=a,pos=b")
    assert data_entry(None, None) is None


# ---- what is wrong is told with the user's file, row and column

BAD_ROWS = [
    ({"a": 3}, "column 'a': expected text, got 3"),
    ({"a": None}, "column 'a': expected one text, got 0"),
    ({"a": ["x", "y"]}, "column 'a': expected one text, got 2"),
    ({"b": None, "s": None}, "column 'b': expected at least one positive"),
    ({"b": ["x", ""]}, "column 'b': expected text, got ''"),
    ({"c": [1.5]}, "column 'c': expected text, got 1.5"),
    ({"p": "Instruct: x"}, "column 'p': expected the bare task: 'Instruct: ' is added to it"),
    ({"p": 3}, "column 'p': expected a string"),
    ({"s": [1, 2]}, "column 's': expected 1 numbers"),
    ({"b": "\ud800"}, "column 'b': expected text, got '\\ud800'"),
]


@pytest.mark.parametrize("change, message", BAD_ROWS)
def test_bad_row(tmp_path, change, message):
    """Row 3 of the file, which has a blank line before it."""
    row = {"a": "q", "b": "p", "c": ["n"], "p": "Find it", "s": 0.5}
    names = "query=a,pos=b,neg=c,prompt=p,pos_scores=s"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row | change) + "\n")
    assert refused(path, names) == f"{path}:3: {message}"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    assert len(rows_of(path, names)) == 2  # control


def test_a_dot_in_the_name_of_a_column(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [["q.text", "body", "rest"], ["q", "a", "x"]])
    assert rows_of(path, "query=q.text,pos=body") == [{"query": "q", "pos": ["a"], "neg": []}]
    assert capsys.readouterr().out.endswith("pos = body; not used: rest\n")


def test_scores_in_a_csv_are_numbers(tmp_path):
    header = ["query", "pos", "neg", "pos_scores", "neg_scores"]
    path = write_csv(tmp_path / "a.csv", [header, ["q", "1", "n", "0.9", "-1e-1"]])
    row = {"query": "q", "pos": ["1"], "neg": ["n"], "pos_scores": [0.9], "neg_scores": [-0.1]}
    assert rows_of(path) == [row]
    path = write_csv(tmp_path / "b.csv", [header, ["q", "1", "n", "high", "0"]])
    assert refused(path).startswith(f"{path}:1: column 'pos_scores': expected 1 numbers")


def test_a_date_that_python_has_not(tmp_path):
    """In a column that is not asked for."""
    table = pyarrow.table({"question": ["q"], "answer": ["a"], "when": [2**58]})
    when = pyarrow.array([2**58], pyarrow.timestamp("us"))
    table = table.set_column(2, "when", when)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    message = refused(tmp_path / "a.parquet", "query=question,pos=answer")
    assert message == f"{tmp_path / 'a.parquet'}: date value out of range"


def test_a_column_that_is_not_there(tmp_path):
    path = write_table(tmp_path / "a.parquet", QA)
    wanted = f"{path}:1: field 'b': missing, found ['question', 'answer']"
    assert refused(path, "query=question,pos=b") == wanted


@pytest.mark.parametrize(
    "content, message",
    [
        (b"question,answer\nq,a\nq\n", ":2: expected the 2 columns of the first line, got 1"),
        (b"question,answer\nq,a,b\n", ":1: expected the 2 columns of the first line, got 3"),
        (b"question,question\nq,a\n", ": expected columns of different names, got "),
        (b'question,answer\nq,a\nq,"a\n', ":2: unexpected end of data"),
        (b'question,answer\n"q"x,a\n', ":1: ',' expected after '\"'"),
        (b"question,answer\nq,\xff\n", ":1: 'utf-8' codec can't decode byte 0xff"),
        (b"question,answer\n", ": expected at least one row"),
        (b"question;answer\nq;a\n", ":1: unknown column 'question;answer' of "),
        (b"", ": expected at least one row"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.parquet", b"PAR1 and nothing else"),
        ("a.csv.gz", b"no gzip"),
        ("a.csv.gz", gzip.compress(b"question,answer\nq,a\n" * 999, mtime=0)[:-20]),
        ("a.jsonl", b'{"question": "q"'),
        ("a.json", b"[1, 2"),
    ],
)
def test_damaged_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert re.match(re.escape(str(path)) + r":(\d+:)? ", refused(path))


def test_missing_file():
    for name in ("no.csv", "no/such.parquet", "no.tsv.gz"):
        assert refused(name) == f"{name}: no such file"
    for name in ("no/such.jsonl", "no.jsonl.gz"):
        assert refused(name).startswith(f"{name}: expected a .jsonl or .jsonl.gz file: ")
        assert refused(name, "query=a,pos=b").startswith(f"{name}: expected a .jsonl or ")


@pytest.mark.parametrize(
    "data, name",
    [
        ("my.csv", "my"),
        ("a.b/my.v2.parquet", "my.v2"),
        ("my.csv.gz", "my"),
        ("org/my.set", "my.set"),
        ("org/set:triplet", "set-triplet"),
        ("org/set:triplet:dev", "set-triplet-dev"),
        ("org/set::dev", "set-dev"),
        (".", "here"),
        ("../here", "here"),
    ],
)
def test_what_rows_are_called(tmp_path, monkeypatch, data, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert columns.name_of(columns.read_name(data)) == name


def test_where_a_row_is(tmp_path):
    """Later messages too name the file of the user: a row of a table, a line of a .jsonl."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(QA[0]) + "\n\n\n" + json.dumps(QA[1]) + "\n")
    entry = data_entry(str(path))
    rows = read_rows(entry["file"], shown=entry["shown"])
    assert [rows.where(i) for i in range(2)] == [f"{path}:2", f"{path}:5"]
    path = write_table(tmp_path / "a.parquet", QA)
    entry = data_entry(str(path))
    assert read_rows(entry["file"], shown=entry["shown"]).where(2) == f"{path}:3"
    assert read_rows(entry["file"]).where(2) == f"{entry['file']}:3"  # control


# ---- folders and the hub


def test_a_folder_as_a_clone_of_the_hub(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    header = "---\nconfigs:\n"
    for config, table in (("pair", QA), ("other", QA[:1])):
        write_table(folder / f"{config}.parquet", table)
        header += f"- config_name: {config}\n  data_files:\n"
        header += f"  - split: train\n    path: {config}.parquet\n"
        header += f"  - split: dev\n    path: {config}.parquet\n"
    (folder / "README.md").write_text(header + "---\n")
    assert rows_of(f"{folder}:pair") == ROWS
    assert rows_of(f"{folder}:other:dev") == ROWS[:1]
    assert data_entry(f"{folder}:other:dev")["name"] == "set-other-dev"
    assert refused(f"{folder}:none").startswith(f"{folder}:none: BuilderConfig 'none' not found")
    assert refused(folder).startswith(f"{folder}: Please pick one among the available configs: ")
    write_table(folder / "pair.parquet", QA[:2])
    assert rows_of(f"{folder}:pair") == ROWS[:2]  # what has changed is converted anew


def test_files_of_a_folder_change_places(tmp_path):
    """The same names and contents in other folders, which say what is train."""
    folder = tmp_path / "set"
    for split, row in (("train", QA[0]), ("validation", QA[1])):
        (folder / split).mkdir(parents=True)
        write_table(folder / split / f"{row['answer']}.parquet", [row])
    assert rows_of(folder) == ROWS[:1]
    (folder / "train").rename(folder / "test")
    (folder / "validation").rename(folder / "train")
    assert rows_of(folder) == ROWS[1:2]


def test_a_folder_of_another_format_is_told_by_its_content(tmp_path):
    """datasets reads .arrow, .ndjson and more; a hidden file is none of the table's."""
    folder = tmp_path / "set"
    folder.mkdir()
    for rows in (QA[:1], QA[1:2]):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "train.ndjson").write_text("".join(lines))
        assert rows_of(folder) == [ROWS[QA.index(rows[0])]]
    before = data_entry(str(folder))["file"]
    (folder / ".git").mkdir()
    (folder / ".git/index").write_text("other")
    assert data_entry(str(folder))["file"] == before


def test_cells_of_a_folder_are_texts(tmp_path):
    (tmp_path / "set").mkdir()
    table = [["question", "answer", "negative"], ["007", "12", "None"], ["NA", "x", ""]]
    write_csv(tmp_path / "set/train.csv", table)
    assert rows_of(tmp_path / "set") == [
        {"query": "007", "pos": ["12"], "neg": ["None"]},
        {"query": "NA", "pos": ["x"], "neg": []},
    ]


@pytest.fixture
def hub(monkeypatch):
    """A hub of one data set, whose revision and rows a test changes; None: out of reach."""
    hub = {"revision": "1" * 40, "rows": QA, "asked": []}

    class Api:
        def dataset_info(self, name, timeout):
            assert timeout
            if hub["revision"] is None:
                raise ConnectionError("no route to the hub")
            return type("Info", (), {"sha": hub["revision"]})

    def open_table(table, config):
        hub["asked"].append((table["path"], config, table["split"], table["revision"]))
        yield from hub["rows"]

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(tables, "open_table", open_table)
    return hub


def test_a_data_set_of_the_hub(hub, capsys):
    assert rows_of("org/set") == ROWS == rows_of("org/set")
    assert hub["asked"] == [("org/set", None, "train", "1" * 40)]  # once, at that revision
    assert data_entry("org/set")["name"] == "set"
    assert "org/set: 3 rows; query = question, pos = answer\n" in capsys.readouterr().out
    hub["rows"] = QA[:2]
    assert rows_of("org/set:triplet:dev") == ROWS[:2]
    assert hub["asked"][1:] == [("org/set", "triplet", "dev", "1" * 40)]
    assert rows_of("org/set") == ROWS  # the same revision
    hub["revision"] = "2" * 40
    assert rows_of("org/set") == ROWS[:2]
    assert rows_of("other/set") == ROWS[:2]
    assert hub["asked"][-1][0] == "other/set"


def test_a_hub_that_is_out_of_reach(hub, capsys):
    """What was converted before is read; without that it is one line."""
    rows_of("org/set")
    hub["revision"], hub["rows"] = None, []
    assert rows_of("org/set") == ROWS
    note = "org/set: not to be had from the hub: no route to the hub; it is read as it was "
    assert capsys.readouterr().err == note + "converted before\n"
    wanted = "neither a file nor a folder, and not to be had from the hub: no route to the hub"
    assert refused("org/other") == f"org/other: {wanted}"
    assert refused("org/set", "query=answer,pos=question") == f"org/set: {wanted}"


def test_a_hub_that_fails_on_the_way(hub, monkeypatch, cache):
    def rows():
        yield QA[0]
        raise ConnectionError("Server Disconnected")

    hub["rows"] = rows()
    assert refused("org/set") == "org/set:2: Server Disconnected"
    hub["rows"] = QA
    assert rows_of("org/set") == ROWS  # nothing of the first try is left


def test_no_network():
    """As tests run, offline: one line, whatever the library raises."""
    wanted = "no/such-set: neither a file nor a folder, and not to be had from the hub: "
    assert refused("no/such-set").startswith(wanted)
    assert refused("not a name").startswith("not a name: neither a file nor a folder, and not ")
