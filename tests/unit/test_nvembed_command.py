"""python nvembed.py: the model card's example with the default base or a model of one's own."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import nvembed
from data.commands import run_command


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
    scores_of(capsys.readouterr().out)


@pytest.mark.slow
def test_command_without_an_argument_uses_the_default_base(monkeypatch, capsys, real_tokenizers):
    run(monkeypatch)
    out, err = capsys.readouterr()
    first = scores_of(out)
    assert "smollm2" in err  # its fresh pooling layer
    run(monkeypatch, real_tokenizers["smollm2"].parent)
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
