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
