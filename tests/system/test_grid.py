"""A grid of experiments/ablate.py by its real commands, on a tiny base."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, some_rows
from safetensors.torch import load_file

from data.commands import run_command
from data.files import write_rows
from experiments import ablate

FEW = SMALL | {"steps": 2, "held_out": 0, "pooling": "mean"}
LAST = FEW | {"lora_rank": 0, "lora_dropout": 0.0, "distill": 1.0, "keep_zeros": True}
TRAINED = [{"stage": 1}, {"stage": 2}]
PRUNE = {"compress": ["--prune", "magnitude", "--calibration", "4"]}


@pytest.fixture
def declared(base, tmp_path, monkeypatch):
    """Three cells, one seed, in place of ablations.json and the local recipe."""
    write_rows(tmp_path / "rows.jsonl", some_rows(12, negatives=2))
    rows = {"name": "rows", "file": str(tmp_path / "rows.jsonl"), "kind": "retrieval"}
    recipe = {
        "base": str(base),
        "seed": 0,
        "datasets": [rows | {"stages": [1, 2], "instruction": "Find it"}],
        "stages": {"1": FEW, "2": FEW, "3": LAST},
    }
    mine = ["--model", str(base), "--negatives", "1", "--max-length", "64", "--dtype", "float32"]
    cells = {
        "mined": {"mine": mine, "steps": [{"stage": 1, "negatives": 1}]},
        "pruned": {"steps": [*TRAINED, PRUNE]},
        "recovered": {"steps": [*TRAINED, PRUNE, {"stage": 3, "lr": 1e-3}]},
    }
    declared = {
        "preset": "ablation",
        "seeds": 1,
        "evaluation": ["--task=sts", "--limit=8", "--max-length=64", "--dtype=float32"],
        "grids": {"tiny": list(cells)},
        "cells": cells,
    }
    (tmp_path / "ablations.json").write_text(json.dumps(declared))
    monkeypatch.setattr(ablate, "ABLATIONS", tmp_path / "ablations.json")
    monkeypatch.setattr(ablate, "read_recipe", lambda *args: json.loads(json.dumps(recipe)))
    monkeypatch.chdir(tmp_path)


def run_grid(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--grid", "tiny", "--jobs", "2"])
    capsys.readouterr()
    run_command(ablate.main)
    return capsys.readouterr().out


def weights(cell):
    """Weights of the projections in the decoder of a cell's model."""
    state = load_file(Path(f"runs/ablations/{cell}/0/model.safetensors"))
    return torch.cat([t.flatten() for name, t in state.items() if name.endswith("_proj.weight")])


@pytest.mark.slow
def test_a_grid_of_real_commands(declared, monkeypatch, capsys):
    table = run_grid(monkeypatch, capsys)
    assert all(f"| {cell} " in table for cell in ("mined", "pruned", "recovered"))
    runs = sorted(path for path in Path("runs/ablations/runs").iterdir() if path.is_dir())
    assert len(runs) == 1 + 2 + 1 + 1  # mined; stages 1 and 2; pruned; recovered

    pruned, recovered = weights("pruned"), weights("recovered")
    zero = pruned == 0
    assert 0.45 < zero.float().mean() < 0.55 and (recovered[zero] == 0).all()
    assert (recovered[~zero] != pruned[~zero]).float().mean() > 0.9  # it was trained

    times = {path: path.stat().st_mtime_ns for run in runs for path in run.glob("*.safetensors")}
    assert run_grid(monkeypatch, capsys) == table
    assert times == {path: path.stat().st_mtime_ns for path in times}
