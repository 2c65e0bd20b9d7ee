"""python nvembed.py: the model card's example with the default base or a model of one's own."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import nvembed
from data.base import base
from data.commands import run_command
from data.files import read_json
from data.machine import fast_dtype


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["nvembed.py", *map(str, args)])
    run_command(nvembed.main)


def scores_of(out):
    rows = [[float(score) for score in line.split()] for line in out.splitlines()[-2:]]
    assert np.shape(rows) == (2, 2)
    assert np.abs(rows).max() <= 100.001
    assert np.std(rows) > 0.01
    return rows


def test_command_prints_the_model_card_scores(released, monkeypatch, capsys):
    run(monkeypatch, released)
    card = read_json(ROOT / "data/model_card.json")
    model = nvembed.NVEmbed.from_pretrained(released, dtype=fast_dtype())
    queries = model.encode(card["queries"], card["instruction"])
    expected = 100 * queries @ model.encode(card["documents"]).T
    np.testing.assert_allclose(scores_of(capsys.readouterr().out), expected, atol=1e-3)


@pytest.mark.slow
def test_command_without_an_argument_uses_the_default_base(monkeypatch, capsys):
    run(monkeypatch)
    out, err = capsys.readouterr()
    first = scores_of(out)
    np.testing.assert_allclose(first, [[80.8, 50.4], [64.2, 70.7]], atol=0.5)  # README's
    assert "smollm2" in err  # its fresh pooling layer
    run(monkeypatch, base(24))
    assert scores_of(capsys.readouterr().out) == first


def error_of_command(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_command_with_two_arguments(released, monkeypatch, capsys):
    assert "unrecognized arguments" in error_of_command(monkeypatch, capsys, released, released)


def test_command_on_a_missing_model(monkeypatch, capsys):
    (line,) = error_of_command(monkeypatch, capsys, "nosuchfolder").splitlines()
    assert line.startswith("error: ")
    assert "nosuchfolder" in line


@pytest.mark.slow
def test_command_in_a_process_of_its_own():
    line = [sys.executable, str(ROOT / "nvembed.py"), "nosuchfolder"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nosuchfolder" in line


def test_examples_of_the_help_run(released, monkeypatch, capsys):
    """With a tiny model in the place of the default base and of the run."""
    lines = [line.strip() for line in nvembed.__doc__.splitlines() if "python nvembed" in line]
    monkeypatch.setattr("data.base.resolve", lambda name: asked.append(name) or str(released))
    asked = []
    for line in lines:
        command = line.split("  ")[0]
        run(monkeypatch, *command.split()[2:])
        scores_of(capsys.readouterr().out)
    assert asked == ["smollm2:24", "runs/stage2"]
    assert read_json(ROOT / "data/local.json")["base"] == asked[0]


READ_ONLY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from nvembed import NVEmbed
from data.dialects import content_hash
os.setuid(65534)  # nobody, who may not even read where Python is
try:
    open(sys.argv[2] + "/new", "w")
except OSError:
    print("read-only")
print(NVEmbed.from_pretrained(sys.argv[2]).encode(["a"]).shape, len(content_hash(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="another user's rights are needed")
def test_a_model_that_may_only_be_read(released):
    """As another user, who may not write the folder or a file of it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        folder = shutil.copytree(released, f"{place}/m")
        for path in Path(folder).iterdir():
            path.chmod(0o444)
        os.chmod(folder, 0o555)
        line = [sys.executable, "-c", READ_ONLY, str(ROOT), folder]
        environment = os.environ | {"HOME": place}
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        os.chmod(folder, 0o755)
    assert done.stdout == "read-only\n(1, 64) 16\n", done.stderr
