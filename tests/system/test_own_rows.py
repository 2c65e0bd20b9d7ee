"""train.py and mine.py on own tables: the same as on the same rows as .jsonl; one conversion."""

import subprocess
import sys

import mine
import pytest
from conftest import ROOT
from helpers import command, learned, some_rows, told
from sources import write_table

from data.files import write_rows
from data.rows import read_rows

ROWS = some_rows(40)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table(names):
    """The rows as a table: a column for the query, the positive and each of the two negatives."""
    columns = [[row["query"], *row["pos"], *row["neg"]] for row in ROWS]
    return [dict(zip(names, texts, strict=True)) for texts in columns]


def test_training_on_a_table(recipe, tmp_path):
    """Bit for bit what training on the rows gives, whatever the columns are called."""
    write_rows(tmp_path / "my.jsonl", ROWS)
    write_table(tmp_path / "my.parquet", table(["anchor", "positive", "negative_1", "negative_2"]))
    write_table(tmp_path / "odd.jsonl", table(["a", "b", "c", "d"]))
    write_table(tmp_path / "swapped.jsonl", table(["b", "a", "c", "d"]))
    runs = {}
    for name in ("my.jsonl", "my.parquet", "odd.jsonl", "swapped.jsonl"):
        odd = name not in ("my.jsonl", "my.parquet")
        flags = ("--columns", "query=a,pos=b,neg=c,neg=d") if odd else ()
        run = tmp_path / f"run of {name}"
        flags += ("--data", tmp_path / name, "--out", run, "--steps", 2)
        code, out, err = command(recipe, *flags)
        assert code == 0, err
        assert f": 36 rows of {tmp_path / name}, 4 held out" in out
        runs[name] = learned(run)
    assert runs["my.jsonl"] == runs["my.parquet"] == runs["odd.jsonl"]
    assert runs["my.jsonl"] != runs["swapped.jsonl"]  # control


def test_a_run_of_a_table_has_its_name_and_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "my.parquet", table(["query", "pos", "negative_1", "negative_2"]))
    flags = ("--data", "my.parquet", "--steps", 1)
    code, out, err = command(recipe, *flags)
    assert code == 0, err
    assert "my.parquet: 40 rows; query = query, pos = pos, neg = negative_1 + negative_2" in out
    code, out, _ = command(recipe, *flags)
    assert code == 0
    assert "runs/my: finished already" in out
    write_table(tmp_path / "my.parquet", table(["pos", "query", "negative_1", "negative_2"]))
    assert "runs/my: was begun with other content: rows of my" in told(command(recipe, *flags))


def test_late_errors_name_the_users_file(recipe, tmp_path):
    rows = table(["question", "answer", "negative_1", "negative_2"])
    rows[17]["prompt"] = "x " * 200
    path = write_table(tmp_path / "my.parquet", [{"prompt": "Find it"} | row for row in rows])
    flags = ("--data", path, "--out", tmp_path / "run", "--max-length", 64)
    assert f"{path}:18: field 'prompt': max_length 64: " in told(command(recipe, *flags))


def test_flags(recipe, tmp_path):
    message = "--columns: expected --data with it"
    assert message in told(command(recipe, "--columns", "query=a,pos=b", "--out", tmp_path / "run"))
    path = write_table(tmp_path / "my.csv.jsonl", [{"a": "b", "c": "d"}])
    line = told(command(recipe, "--data", path, "--out", tmp_path / "run"))
    assert line.startswith(f"error: {path}:1: unknown column 'a' of ['a', 'c']: expected query: ")
    assert not (tmp_path / "run").exists()


def mined(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mine.py", *map(str, flags)])
    mine.main()


def test_mining_of_a_table(base, tmp_path, monkeypatch, capsys):
    """The mined rows are those of the .jsonl; a table beside the output is never written over."""
    write_rows(tmp_path / "my.jsonl", [row | {"neg": []} for row in ROWS])
    answers = [{"answer": row["answer"], "question": row["question"]} for row in qa()]
    (tmp_path / "other").mkdir()
    write_table(tmp_path / "other" / "my.jsonl", answers)
    path = write_table(tmp_path / "my.parquet", answers)
    model = ("--model", base, "--dtype", "float32", "--negatives", 3)
    mined(monkeypatch, *model, "--data", tmp_path / "my.jsonl", "--out", tmp_path / "one")
    mined(monkeypatch, *model, "--data", path, "--out", tmp_path / "two")
    one = list(read_rows(tmp_path / "one" / "my.jsonl"))
    assert one == list(read_rows(tmp_path / "two" / "my.jsonl"))
    assert sum(len(row["neg"]) for row in one) > 100
    capsys.readouterr()
    mined(monkeypatch, *model, "--data", path, "--out", tmp_path / "two")
    assert (
        capsys.readouterr().out == f"{tmp_path}/two/my.jsonl: already mined with these settings\n"
    )
    other = tmp_path / "other"
    with pytest.raises(mine.InputError, match="^.*my.jsonl: would overwrite the input .*my.jsonl;"):
        mined(monkeypatch, *model, "--data", other / "my.jsonl", "--out", other)
    with pytest.raises(mine.InputError, match="^--columns: expected --data with it$"):
        mined(monkeypatch, *model, "--columns", "query=a,pos=b", "--out", tmp_path / "three")


def qa():
    return [{"question": row["query"], "answer": row["pos"][0]} for row in ROWS]


TWO = """
import sys
from data import columns
convert = columns.convert

def counted(*args):
    open(sys.argv[2], "a").write("x")
    convert(*args)

columns.convert = counted
print(columns.rows_file(sys.argv[1]))
"""


@pytest.mark.slow
def test_ranks_convert_once(tmp_path):
    """Of four processes one converts, the others wait for it and read the same file."""
    path = write_table(tmp_path / "my.parquet", qa() * 500)
    line = [sys.executable, "-c", TWO, path, tmp_path / "count"]
    started = [
        subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    out = [process.communicate()[0].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert len(set(out)) == 1 and len(read_rows(out[0])) == 20000
    assert (tmp_path / "count").read_text() == "x"
