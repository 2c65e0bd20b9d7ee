"""data/prepare.py as a command: killed at any file and started again it writes the same bytes."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import mine
import pytest
import train
from sources import small_recipe

from data import prepare
from data.commands import InputError
from data.files import ROOT, begin, json_lines, locked, read_json, write_rows
from data.recipes import read_recipe
from data.rows import read_rows


def contents(folder):
    """Name -> bytes of each file in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def command(monkeypatch, *args):
    """prepare.py in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    prepare.main()


def refusals(monkeypatch, capsys, *args):
    """What prepare.py prints of the sets that it cannot make."""
    capsys.readouterr()
    with pytest.raises(InputError, match="^not made: "):
        command(monkeypatch, *args)
    return capsys.readouterr().err


def run(*args, seed="0", **environment):
    """prepare.py in a process of its own, whose hashes of strings are salted by the seed."""
    line = [sys.executable, ROOT / "data/prepare.py", *args]
    environment = os.environ | {"PYTHONHASHSEED": seed} | environment
    line = [str(part) for part in line]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


def test_interrupted_and_resumed(tmp_path, monkeypatch, capsys):
    """Killed before any of the files takes its name, and started again; what is done stays."""
    recipe = small_recipe(tmp_path / "source")
    command(monkeypatch, "--recipe", recipe, "--out", tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) == 4 * 3 + 2
    replace = os.replace
    renames = []
    stop = 0

    def killed(*paths):
        renames.append(paths)
        if len(renames) == stop + 1:
            raise KeyboardInterrupt
        replace(*paths)

    for stop in range(len(whole) + 4):  # each report is there twice: unfinished, finished
        renames.clear()
        out = tmp_path / f"stop{stop}"
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            command(monkeypatch, "--recipe", recipe, "--out", out)
        monkeypatch.setattr(os, "replace", replace)
        finished = {
            path.name: path.stat().st_mtime_ns
            for path in out.glob("*.json")
            if read_json(path)["plan"]
        }
        capsys.readouterr()
        command(monkeypatch, "--recipe", recipe, "--out", out)
        assert contents(out) == whole
        assert capsys.readouterr().out.count("already made so") == len(finished)
        for name, time in finished.items():
            assert (out / name).stat().st_mtime_ns == time


def test_another_setting_is_another_file(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path / "source")
    out = tmp_path / "rows"
    command(monkeypatch, "--recipe", recipe, "--out", out, "--only", "Emotion")
    before = contents(out)
    command(monkeypatch, "--recipe", recipe, "--out", out, "--only", "Emotion", "--labels", "names")
    after = contents(out)
    endings = ("jsonl.gz", "json", "dropped.jsonl")
    assert set(after) - set(before) == {f"Emotion_names.{ending}" for ending in endings}
    assert before.items() <= after.items()


def test_a_changed_source_is_made_anew(tmp_path, monkeypatch, capsys):
    """A local file with other rows; one that was only touched is as it was."""
    recipe = small_recipe(tmp_path / "source")
    flags = ("--recipe", recipe, "--out", tmp_path / "rows", "--only", "Emotion")
    command(monkeypatch, *flags)
    capsys.readouterr()
    table = tmp_path / "source/tables/Emotion.jsonl"
    os.utime(table)
    command(monkeypatch, *flags)
    assert "already made so" in capsys.readouterr().out
    before = contents(tmp_path / "rows")
    table.write_text(table.read_text().replace(" 5", " 555"))
    command(monkeypatch, *flags)
    assert "already made so" not in capsys.readouterr().out
    assert contents(tmp_path / "rows")["Emotion.jsonl.gz"] != before["Emotion.jsonl.gz"]


def test_one_set_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    """Two cannot be made: the others are, and the command says at its end which are not."""
    recipe = small_recipe(tmp_path / "source")
    for name in ("FiQA", "Emotion"):
        (tmp_path / f"source/tables/{name}.jsonl").write_text("[1]\n")
    flags = ("--recipe", recipe, "--out", tmp_path / "rows")
    with pytest.raises(InputError, match="^not made: FiQA, Emotion; the reasons are above$"):
        command(monkeypatch, *flags)
    told = capsys.readouterr()
    assert "FiQA.jsonl:1: expected" in told.err
    assert "Emotion.jsonl:1: expected" in told.err
    assert told.out.count(" kept ") == 2
    assert {"STS12.jsonl.gz", "IMDB.jsonl.gz"} < contents(tmp_path / "rows").keys()


def test_a_corpus_that_is_gone_is_made_again(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path / "source")
    flags = ("--recipe", recipe, "--out", tmp_path / "rows", "--only", "FiQA")
    command(monkeypatch, *flags)
    before = contents(tmp_path / "rows")
    (tmp_path / "rows/FiQA.corpus.jsonl.gz").unlink()
    command(monkeypatch, *flags)
    assert contents(tmp_path / "rows") == before


def test_prepare_overwrites_nothing_of_the_user(tmp_path, monkeypatch, capsys):
    """A source of the name of its rows; a file that is in the way; a folder in use."""
    recipe = small_recipe(tmp_path / "source")
    tables = tmp_path / "source/tables"
    content = json.loads(recipe.read_text())
    table = tables / "Emotion.jsonl.gz"
    table.write_bytes(gzip.compress((tables / "Emotion.jsonl").read_bytes()))
    content["datasets"][2]["source"]["path"] = str(table)
    recipe.write_text(json.dumps(content))
    before = contents(tables)
    flags = ("--recipe", recipe, "--only", "Emotion", "--out")
    told = refusals(monkeypatch, capsys, *flags, tables)
    assert "Emotion.jsonl.gz: would overwrite the input" in told
    assert contents(tables) == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "Emotion.json").write_text('{"mine": 1}')
    told = refusals(monkeypatch, capsys, *flags, out)
    assert "Emotion.json: is in the way, not from this command\n" in told
    (out / "Emotion.json").unlink()
    with locked(out):
        told = refusals(monkeypatch, capsys, *flags, out)
    assert "out: in use by another process\n" in told
    assert not contents(out)
    (out / "Emotion.dropped.jsonl").write_text("mine\n")
    told = refusals(monkeypatch, capsys, *flags, out)
    assert "Emotion.dropped.jsonl: is in the way, not from this" in told
    assert contents(out) == {"Emotion.dropped.jsonl": b"mine\n"}
    (out / "Emotion.dropped.jsonl").unlink()
    command(monkeypatch, *flags, out)  # control
    assert len(contents(out)) == 3


def test_leakage_never_empties_its_input(tmp_path, monkeypatch):
    rows, against = tmp_path / "a.jsonl", tmp_path / "a.dropped.jsonl"
    write_rows(rows, [{"query": "one question about it", "pos": ["its answer"]}])
    write_rows(against, [{"text": "one question about it"}])
    os.link(rows, tmp_path / "same.jsonl")
    before = contents(tmp_path)
    for out in ("a.jsonl", "same.jsonl", "./a.jsonl", "a.dropped.jsonl"):
        with pytest.raises(InputError, match="would overwrite the input"):
            command(monkeypatch, "--leakage", rows, "--against", against, "--out", tmp_path / out)
        assert contents(tmp_path) == before
    with pytest.raises(InputError, match="^--threshold: expected a number in .0, 1., got nan$"):
        command(monkeypatch, "--leakage", rows, "--against", against, "--threshold", "nan")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    recipe = small_recipe(tmp_path / "source")
    for seed in "12":
        done = run("--recipe", recipe, "--out", tmp_path / seed, seed=seed)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    bad = run("--recipe", recipe, "--only", "MSMARCO")
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("error: --only: expected one of ['FiQA',")


def test_training_finds_what_it_wrote(tmp_path, monkeypatch, capsys):
    """In the cache; for a set that is not there one line says what to run."""
    recipe = small_recipe(tmp_path / "source")
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    command(monkeypatch, "--recipe", recipe, "--only", "FiQA")
    told = capsys.readouterr().out
    assert told.endswith("read 5, label or score 1, missing id 1, kept 3\n")
    entries = read_recipe(recipe)["datasets"]
    settings = train.Settings(batch=2, held_out=0)
    assert len(train.read_datasets(entries, 1, settings)[0].rows) == 3
    hint = "python data/prepare.py --recipe RECIPE makes it"
    with pytest.raises(InputError, match=f"STS12.jsonl.gz: expected .*{hint}$"):
        train.read_datasets(entries, 2, settings)


def test_mining_searches_the_corpora_of_a_recipe(tmp_path, monkeypatch):
    """Of its sets of retrieval and STS; classes have no negatives to mine."""
    recipe = small_recipe(tmp_path / "source")
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    command(monkeypatch, "--recipe", recipe)
    searched = {}

    def noted(rows, teachers, entry, args, corpus):
        searched[entry["name"]] = corpus
        return [{"query": "q", "pos": ["p"]}], {"kept": 1}

    monkeypatch.setattr(mine, "mine", noted)
    monkeypatch.setattr(mine, "find_teacher", lambda *_: mine.Teacher("t", "t", 1, "float32"))
    line = ["mine.py", "--recipe", str(recipe), "--model", "t", "--out", str(tmp_path / "mined")]
    monkeypatch.setattr(sys, "argv", line)
    mine.main()
    entries = [entry for entry in read_recipe(recipe)["datasets"] if "corpus" in entry]
    assert [entry["name"] for entry in entries] == ["FiQA", "STS12"]
    assert searched == {entry["name"]: [entry["corpus"]] for entry in entries}


def test_mining_refuses_rows_of_another_recipe(tmp_path, monkeypatch):
    """Before it encodes anything: the teacher is not even looked for."""
    recipe = small_recipe(tmp_path / "source")
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    command(monkeypatch, "--recipe", recipe, "--only", "FiQA", "STS12")
    content = json.loads(recipe.read_text())
    content["datasets"][0]["samples"] = 2
    recipe.write_text(json.dumps(content))
    line = ["mine.py", "--recipe", str(recipe), "--model", "absent"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(InputError, match="FiQA.jsonl.gz: was not made by the recipe's 'samples'"):
        mine.main()
    command(monkeypatch, "--recipe", recipe, "--only", "FiQA", "STS12")
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(InputError, match="absent"):  # control
        mine.main()


@pytest.mark.parametrize("field, value", [("samples", 2), ("source", None), ("leakage", None)])
def test_training_refuses_rows_of_another_recipe(tmp_path, monkeypatch, field, value):
    """What says which rows there are was changed since, or prepare.py was killed."""
    recipe = small_recipe(tmp_path / "source")
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    command(monkeypatch, "--recipe", recipe, "--only", "Emotion")
    (entry,) = [e for e in read_recipe(recipe)["datasets"] if e["name"] == "Emotion"]
    path, settings = Path(entry["file"]), train.Settings(batch=2, held_out=0)
    same = entry | {"instruction": "another", "note": "which changes no row"}
    assert len(train.read_datasets([same], 2, settings)[0].rows) == 23  # control
    message = f"^{path}: was not made by the recipe's '{field}'; data/prepare.py makes it anew$"
    changed = entry | {field: value or entry[field] | {"rows": 9}}
    with pytest.raises(InputError, match=message):
        train.read_datasets([changed], 2, settings)
    mined = tmp_path / "mined"
    mined.mkdir()
    (mined / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=message):  # what was mined from them is as old
        train.read_datasets([changed], 2, settings, mined)
    begin(mined / f"{path.name}.json")
    with pytest.raises(InputError, match=f"^{mined / path.name}: is half made; mine again$"):
        train.read_datasets([entry], 2, settings, mined)
    begin(path.parent / "Emotion.json")
    with pytest.raises(InputError, match=f"^{path}: was not made by the recipe's 'source'; "):
        train.read_datasets([entry], 2, settings)


def test_leakage_of_two_files(tmp_path, monkeypatch, capsys):
    """Any rows against any file: counts, the rows kept, and those dropped with what they share."""
    against = ROOT / "data/eval/trec.jsonl.gz"
    leak = [row["text"] for _, row in json_lines(against)][7]
    honest = {"query": "an honest question about nothing", "pos": ["p"]}
    copied = {"query": "q", "pos": [leak + " ."]}
    rows = tmp_path / "rows.jsonl"
    kept = tmp_path / "kept.jsonl"
    write_rows(rows, [honest, copied])
    command(monkeypatch, "--leakage", rows, "--against", against, "--out", kept)
    assert capsys.readouterr().out == "{'rows': 2, 'kept': 1, 'dropped': 1}\n"
    assert [row["query"] for row in read_rows(kept)] == [honest["query"]]
    ((_, dropped),) = json_lines(tmp_path / "kept.dropped.jsonl")
    assert dropped == copied | {"overlap": 1.0}
    with pytest.raises(InputError, match=f"^{tmp_path}/no.jsonl: expected"):
        command(monkeypatch, "--leakage", rows, "--against", tmp_path / "no.jsonl")
    with pytest.raises(InputError, match="^--leakage: expected --against too$"):
        command(monkeypatch, "--leakage", rows)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--against", "x", "--out", "y"], "--out: expected none without --recipe and --leakage"),
        (["--labels", "names"], "--labels: expected none without --recipe and --leakage"),
        (["--threshold", "0"], "--threshold: expected none without --recipe and --leakage"),
        (["--recipe", "r", "--by", "runs"], "--by: expected none with --recipe"),
        (["--leakage", "x", "--only", "a"], "--only: expected none with --leakage"),
        (["--leakage", "x", "--recipe", "r"], "--recipe: expected none with --leakage"),
    ],
)
def test_no_flag_is_ignored(monkeypatch, flags, message):
    monkeypatch.setattr(prepare, "BUILDERS", {})  # nothing is built, whatever happens
    with pytest.raises(InputError, match=f"^{message}$"):
        command(monkeypatch, *flags)


def test_unknown_part(monkeypatch):
    with pytest.raises(InputError, match="^--only: expected one of .'base', 'minilm', 'sets'"):
        command(monkeypatch, "--only", "sts")


@pytest.mark.slow
def test_shipped_sets_are_rebuilt(tmp_path, monkeypatch, capsys):
    """The shipped files come out byte for byte, and the rows that mining starts from."""
    shipped = {path.name: path.read_bytes() for path in (ROOT / "data/eval").glob("*.jsonl.gz")}
    monkeypatch.setattr(prepare.sets, "DATA", tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/squad.jsonl.gz").write_bytes(shipped["squad.jsonl.gz"])
    command(monkeypatch, "--only", "sets")
    assert capsys.readouterr().out == (
        "sets: {'trec': (55, 4029), 'spam': (113, 3938), 'sentiment': (14, 2010), "
        "'articles': (2713, 5599)}\n"
    )
    built = contents(tmp_path / "eval")
    assert set(shipped) - set(built) == {"debian.jsonl.gz", "sts.jsonl.gz"}
    assert built.items() <= shipped.items()
    training = contents(tmp_path)
    assert len(training) == 6
    for name, content in training.items():
        assert content == (ROOT / "data" / name).read_bytes(), name
