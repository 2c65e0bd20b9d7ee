"""experiments/ablate.py: the declared cells, runs that cells share, seeds, the compact table."""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import train
from small_suite import FakeModel, cells, error, output, suite  # noqa: F401

from data.files import read_json, write_json, write_rows
from data.recipes import read_recipe
from eval import PUBLISHED, SETTINGS
from experiments import ablate

DECLARED = read_json(ablate.ABLATIONS)


def shown(monkeypatch, capsys, *args):
    """python experiments/ablate.py ARGS -> its table as {first cell: other cells}."""
    return cells(output(monkeypatch, capsys, *args, main=ablate.main))


# ---- what is declared


def test_every_cell_is_used_and_every_grid_is_there():
    grids = DECLARED["grids"]
    assert list(grids) == [
        *("pooling", "stages", "labels", "mining", "data"),
        *("false-negatives", "matryoshka", "stage2", "growth", "compression"),
    ]
    entries = {entry for grid in grids.values() for entry in grid}
    assert {entry.split(":")[0] for entry in entries} == set(DECLARED["cells"])
    words = {word for entry in entries for word in entry.split(":")[1:]}
    assert words == {"int8", "int4"} and words < set(SETTINGS)
    assert len(grids["pooling"]) == 16  # four poolings, two masks, after each of two stages


def test_cells_are_changes_of_the_local_recipe():
    recipe = read_recipe(ablate.ROOT / "data/local.json", DECLARED["preset"])
    names = {dataset["name"] for dataset in recipe["datasets"]}
    known = {field.name for field in fields(train.Settings)}
    for cell in DECLARED["cells"].values():
        assert cell.keys() <= {"steps", "settings", "without", "labels", "mine"}
        assert set(cell.get("without", [])) < names and cell.get("settings", {}).keys() <= known
        for step in cell["steps"]:
            if "compress" in step:
                assert step.keys() == {"compress"}
            else:
                assert step["stage"] in (1, 2, 3) and step.keys() - {"stage"} <= known


def test_cells_named_by_how_often_their_steps_are_repeated():
    """NAME-xN has N times the steps of the preset, in each stage."""
    recipe = read_recipe(ablate.ROOT / "data/local.json", DECLARED["preset"])
    for name in DECLARED["grids"]["growth"]:
        times = int(name.rpartition("-x")[2])
        stages = [step["stage"] for step in DECLARED["cells"][name]["steps"]]
        assert stages == ([1] if "stage1" in name else [1, 2])
        for step in DECLARED["cells"][name]["steps"]:
            settings = recipe["stages"][str(step["stage"])] | step
            assert settings["steps"] == times * 14


def test_recovery_follows_training():
    """Stage 3 has a teacher: the last run that was trained."""
    for name, cell in DECLARED["cells"].items():
        stages = [step.get("stage") for step in cell["steps"]]
        assert 3 not in stages or stages.index(3) > stages.index(2), name


def test_published_rows_of_the_cells():
    printed = PUBLISHED["ablations"]
    grids = DECLARED["grids"]
    both = [cell for cell in grids["pooling"] if not cell.endswith("stage1")]
    assert {*both, *grids["stages"], *grids["labels"]} <= printed.keys()
    assert printed["latent-bidirectional"]["mean"] == 72.31
    assert printed["labels"]["Clustering mean"] == 53.04


# ---- a grid, its commands replaced


@pytest.fixture
def commands(suite, tmp_path, monkeypatch):
    """The commands of a grid, noted; each writes what it is asked for.

    `commands.failing` names an argument of a command that fails.
    """
    noted = SimpleNamespace(ran=[], failing=None)

    def run(line, stdout, **how):
        arguments = line[1:]
        noted.ran.append(arguments)
        if noted.failing in arguments:
            stdout.write("error: no luck\n")
            return SimpleNamespace(returncode=2)
        out = Path(after(arguments, "--out"))
        if arguments[0] == "mine.py":
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{Path(arguments[-1]).name}.json").write_text("{}")
        else:
            shutil.copytree(tmp_path / "model", out, dirs_exist_ok=True)
            (out / "model.safetensors").write_bytes(json.dumps(arguments).encode())
        return SimpleNamespace(returncode=0)

    declared = tmp_path / "ablations.json"
    declared.write_text(json.dumps(DECLARED | {"evaluation": ["--task=sts"]}))
    monkeypatch.setattr(ablate, "ABLATIONS", declared)
    monkeypatch.setattr(ablate.subprocess, "run", run)
    return noted


def after(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def test_a_grid_shares_runs_and_goes_on(commands, monkeypatch, capsys):
    table = shown(monkeypatch, capsys, "--grid", "stages", "--jobs", "2")
    assert len(commands.ran) == 3 * (2 + 1 + 1 + 2)
    assert {arguments[0] for arguments in commands.ran} == {"train.py"}
    cells_of_grid = {"latent-bidirectional", "one-stage", "one-stage-in-batch", "reversed"}
    assert {*cells_of_grid, "reversed, paper"} < table.keys()
    assert "±" in table["reversed"][0]

    commands.ran.clear()
    assert shown(monkeypatch, capsys, "--grid", "stages") == table and not commands.ran

    output(monkeypatch, capsys, "--grid", "labels", main=ablate.main)
    stages = [after(arguments, "--stage") for arguments in commands.ran]
    assert stages == ["2", "2", "2"]  # stage 1 does not depend on the labels
    recipe = read_json(f"{Path('runs/ablations/labels/1').readlink()}.json")
    files = {Path(dataset["file"]).name for dataset in recipe["datasets"]}
    assert recipe["seed"] == 1 and {"trec_names.jsonl.gz", "topics_names.jsonl.gz"} <= files
    assert set(recipe["stages"]) == {"2"}
    given = recipe["stages"]["2"]
    assert given["steps"] < 30 and not given["in_batch"]


def test_a_grid_with_fewer_seeds(commands, monkeypatch, capsys):
    table = shown(monkeypatch, capsys, "--grid", "stages", "--seeds", "1")
    assert len(commands.ran) == 2 + 1 + 1 + 2
    assert "±" not in table["reversed"][0]
    message = error(monkeypatch, capsys, "--grid", "stages", "--seeds", "0", main=ablate.main)
    assert message == "error: --seeds: expected a number in [1, inf), got 0"
    output(monkeypatch, capsys, "--grid", "stages", "--seeds", "2", main=ablate.main)
    assert shown(monkeypatch, capsys, "--grid", "stages", "--seeds", "1") == table  # of one seed


def test_a_grid_at_some_dims(commands, suite, monkeypatch, capsys):
    """--dims is of the evaluation only: the runs are those of the whole vectors."""
    whole = shown(monkeypatch, capsys, "--grid", "matryoshka")
    assert len(commands.ran) == 3 * (2 + 2)
    folder = Path("runs/ablations/matryoshka/1")
    assert read_json(folder.resolve().with_suffix(".json"))["stages"]["2"]["dims"] == [64, 128, 256]
    commands.ran.clear()
    short = shown(monkeypatch, capsys, "--grid", "matryoshka", "--dims", "2")
    assert not commands.ran and suite.calls and short.keys() == whole.keys()
    assert short["matryoshka"] != whole["matryoshka"]
    suite.calls.clear()
    assert shown(monkeypatch, capsys, "--grid", "matryoshka", "--dims", "2") == short
    assert not suite.calls


def test_mining_is_done_once_a_rule(commands, monkeypatch, capsys):
    commands.failing = "naive"
    message = error(monkeypatch, capsys, "--grid", "mining", main=ablate.main)
    assert "exit status 2: error: no luck" in message
    done = [arguments for arguments in commands.ran if "naive" not in arguments]
    commands.failing = None
    commands.ran.clear()
    output(monkeypatch, capsys, "--grid", "mining", main=ablate.main)
    ran = commands.ran + done
    mined = [arguments for arguments in ran if arguments[0] == "mine.py"]
    trained = [arguments for arguments in ran if arguments[0] == "train.py"]
    assert len(mined) == 6 and len(trained) == 18  # once a rule, not once a seed
    used = [after(arguments, "--mined") for arguments in trained]
    assert {used.count(folder) for folder in used} == {3}
    assert {after(arguments, "--out") for arguments in mined} == set(used)


def test_compressed_models_are_recovered_from_their_teacher(commands, monkeypatch, capsys):
    table = shown(monkeypatch, capsys, "--grid", "compression")
    assert {"latent-bidirectional", "latent-bidirectional:int8"} < table.keys()
    seed = [a for a in commands.ran if read_json(f"{after(a, '--out')}.json")["seed"] == 1]
    by_out = {after(arguments, "--out"): arguments for arguments in seed}
    assert len(by_out) == len(seed) == 2 + 6 + 1 + 4  # stages 1, 2; prune; drop; recover

    folder = Path("runs/ablations").resolve()
    recovered = by_out[str((folder / "sparsegpt-50-recovered/1").readlink())]
    assert recovered[0] == "train.py" and after(recovered, "--stage") == "3"
    pruned = by_out[after(recovered, "--init")]
    assert after(recovered, "--init") == str((folder / "sparsegpt-50/1").readlink())
    assert pruned[0] == "experiments/compress.py" and after(pruned, "--prune") == "sparsegpt"
    stage2 = str((folder / "latent-bidirectional/1").readlink())
    assert after(recovered, "--teacher") == after(pruned, "--model") == stage2
    control = by_out[str((folder / "recovered/1").readlink())]
    assert after(control, "--init") == after(control, "--teacher") == stage2
    rounds = {name for name, cell in DECLARED["cells"].items() if "int" in str(cell)}
    assert not rounds  # quantised models are the cell's own, rounded when they are loaded


def test_a_run_is_named_by_all_that_makes_it(tmp_path):
    """Recipe, beginning, mined rows; the recipe stands beside the run."""
    recipe = {"base": "smollm2:8", "seed": 0, "datasets": [], "stages": {"1": {"steps": 14}}}
    run, file = ablate.name_run(tmp_path, recipe, "smollm2:8", ())
    assert run == tmp_path / "a253e843f945"
    assert not run.exists()
    assert read_json(file) == recipe
    mined = ("--mined", Path("/x/mined"))
    assert ablate.name_run(tmp_path, recipe, Path("/x/run"), mined)[0].name == "f8c70f82f1e9"


def test_a_run_is_named_by_the_content_of_its_rows(tmp_path):
    """The recipe's and the mined ones; runs are shared as long as both are the same."""
    for name in ("rows.jsonl", "mined/rows.jsonl"):
        write_rows(tmp_path / name, [{"query": "q", "pos": ["p"]}])
    recipe = {"datasets": [{"file": str(tmp_path / "rows.jsonl")}]}
    mined = ("--mined", tmp_path / "mined")

    def names():
        return [ablate.name_run(tmp_path, recipe, "model", more)[0] for more in ((), mined)]

    before = names()
    write_rows(tmp_path / "mined/rows.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    after_mining = names()
    assert after_mining[0] == before[0] and after_mining[1] != before[1]
    write_rows(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["other"]}])
    assert not set(names()) & {*before, *after_mining}


# ---- own cells


def declare(**changes):
    """Cells of one step in place of the declared ones, and a grid "own" of them all."""
    cells = {name: {"steps": [{"stage": 1}]} | cell for name, cell in changes.items()}
    own = {"seeds": 1, "evaluation": ["--task=sts"], "grids": {"own": list(cells)}, "cells": cells}
    ablate.ABLATIONS.write_text(json.dumps(DECLARED | own))


def test_cells_of_one_rule_and_other_sets_mine_both(commands, monkeypatch, capsys):
    mine = ["--rule", "naive"]
    declare(few={"mine": mine, "without": ["wikipedia_title"]}, all={"mine": mine})
    output(monkeypatch, capsys, "--grid", "own", main=ablate.main)
    mined = [line[line.index("--data") + 1 :] for line in commands.ran if line[0] == "mine.py"]
    assert len(mined) == 2 and set(mined[0]) < set(mined[1])
    assert {Path(file).name for file in set(mined[1]) - set(mined[0])} == {
        "wikipedia_title.jsonl.gz"
    }


def test_typos_are_refused_before_anything_is_trained(commands, monkeypatch, capsys):
    declare(good={}, bad={"without": ["title"]})
    message = error(monkeypatch, capsys, "--grid", "own", main=ablate.main)
    assert "ablations.json: cells: bad: without: expected one of [" in message
    assert message.endswith("got 'title'")

    own = read_json(ablate.ABLATIONS)
    write_json(ablate.ABLATIONS, own | {"grids": {"own": ["good", "goood:int8"]}})
    message = error(monkeypatch, capsys, "--grid", "own", main=ablate.main)
    assert message.endswith("grids: expected cells of ['good', 'bad'], got 'goood'")

    write_json(ablate.ABLATIONS, own | {"evaluation": []})
    message = error(monkeypatch, capsys, "--grid", "own", "--task", "typo", main=ablate.main)
    assert message.startswith("error: --task typo: expected one of all, ")
    assert not commands.ran


def test_flags_that_are_given_override_those_of_the_file(commands, monkeypatch, capsys):
    declare(one={})
    assert shown(monkeypatch, capsys, "--grid", "own")["run"] == ["STS mean", "mean"]
    other = shown(monkeypatch, capsys, "--grid", "own", "--task", "TREC")
    assert other["run"] == ["Classification mean", "mean"]


def test_a_grid_that_cannot_run(commands, monkeypatch, capsys):
    """What would fail after hours of training; ranks, whose commands would wait for each other."""
    declare(one={})
    own = read_json(ablate.ABLATIONS)
    write_json(ablate.ABLATIONS, own | {"grids": {"own": ["one", "one:int8"]}})
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    message = error(monkeypatch, capsys, "--grid", "own", main=ablate.main)
    assert message == "error: one:int8: expected the package torchao: pip install torchao"
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = error(monkeypatch, capsys, "--grid", "own", main=ablate.main)
    assert message.startswith("error: --grid: expected one process")
    assert not commands.ran


def test_models_of_one_last_name_are_told_apart():
    names = ablate.short_names(["runs/a/0", "runs/b/0", "runs/stage2"])
    assert list(names.values()) == ["runs/a/0", "runs/b/0", "stage2"]


def test_a_grid_that_is_not_there(commands, monkeypatch, capsys):
    message = error(monkeypatch, capsys, "--grid", "poolings", main=ablate.main)
    assert "--grid poolings: expected all or one of ['pooling', " in message
    with pytest.raises(SystemExit):
        output(monkeypatch, capsys, main=ablate.main)  # neither --grid nor --compare


# ---- seeds


def test_seeds_are_averaged_with_their_deviation_and_the_papers_row(suite, monkeypatch, capsys):
    means = []
    for seed in range(3):
        run = Path(f"reversed/{seed}")
        shutil.copytree("model", run)
        (run / "model.safetensors").write_bytes(bytes([seed + 1]))
        vectors = np.eye(8, dtype=np.float32)
        monkeypatch.setattr(
            FakeModel, "embed", lambda self, text, s=seed: vectors[len(text) * (s + 1) % 8]
        )
        table = cells(output(monkeypatch, capsys, "--model", run))
        means.append(float(table["mean"][1]))
    table = shown(monkeypatch, capsys, "--compare", "reversed")
    mean, deviation = (float(x) for x in table["reversed"][-1].split(" ± "))
    assert mean == pytest.approx(np.mean(means), abs=0.01) and len(set(means)) > 1
    assert deviation == pytest.approx(np.std(means, ddof=1), abs=0.01) and deviation > 0.1
    assert table["run"][0] == "Retrieval mean" and table["reversed, paper"][0] == "61.91"

    assert suite.calls
    suite.calls.clear()
    output(monkeypatch, capsys, "--compare", "reversed", main=ablate.main)
    assert not suite.calls  # all were there


def test_what_a_models_name_stands_for(tmp_path):
    for run in ("10", "0", "2", "1_Pooling", "kept_000010"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.json").write_text("{}")
    cell = str(tmp_path)
    assert ablate.runs_by_seed(cell) == [f"{cell}/0", f"{cell}/2", f"{cell}/10"]
    with_word = [f"{cell}/0:int8", f"{cell}/2:int8", f"{cell}/10:int8"]
    assert ablate.runs_by_seed(f"{cell}:int8") == with_word
    assert ablate.runs_by_seed(f"{cell}/0:mean") == [f"{cell}/0:mean"]
    assert ablate.runs_by_seed("smollm2:8:mean") == ["smollm2:8:mean"]
    assert ablate.runs_by_seed("bm25") == ["bm25"]


def test_scores_over_seeds():
    assert ablate.over_seeds([50.0]) == "50.00"
    assert ablate.over_seeds([50.0, 52.0]) == "51.00 ± 1.41"
    assert ablate.over_seeds([np.nan]) == "-"
