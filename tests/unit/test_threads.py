"""Idle threads sleep soon by default, and as the environment says where it says so."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SHOW = "import nvembed, os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "30000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_spinning(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    line = [sys.executable, "-c", SHOW]
    done = subprocess.run(line, cwd=ROOT, env=clean | given, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


COMMANDS = ("nvembed.py", "train.py", "mine.py", "eval.py")
EXPERIMENTS = ("ablate.py", "compress.py", "merge.py", "plot.py")


@pytest.mark.parametrize("script", (*COMMANDS, *[f"experiments/{name}" for name in EXPERIMENTS]))
def test_it_is_set_before_torch_is_imported(script):
    lines = (ROOT / script).read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    before = imports[: imports.index("import data.threads  # before torch")]
    loading_torch = ("torch", "data.", "nvembed", "mteb", "eval ", "train")
    assert not [line for line in before for name in loading_torch if name in line]
