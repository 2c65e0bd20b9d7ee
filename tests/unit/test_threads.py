"""What is set before torch: idle threads sleep soon unless told otherwise; Ctrl-C always counts."""

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


IN_A_DESTRUCTOR = """
import sys; sys.argv = ["train.py"]
import data.threads, os, signal, time
from data.commands import run_command

class Bar:
    def __del__(self):
        {error}

def main():
    Bar()
    for _ in range(20):
        time.sleep(0.1)
    print("went on")

run_command(main)
"""
CTRL_C = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    ("error", "status", "out", "last"),
    [
        (CTRL_C, 130, "", "stopped; the same command goes on"),
        ("1 / 0", 0, "went on\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_interrupt_in_a_destructor_counts(error, status, out, last):
    script = IN_A_DESTRUCTOR.format(error=error)
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr.splitlines()[-1] == last
