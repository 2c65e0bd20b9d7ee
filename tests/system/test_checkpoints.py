"""Kills, full disks and damaged files: a run goes on exactly, and nothing good is lost."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import FILES, command, learned, log, stopped_run, told
from safetensors.torch import load_file, save_file

import nvembed
import train
from data import folders, runs
from data.commands import InputError
from data.runs import checkpoint

KILLS = int(os.environ.get("NVEMBED_TEST_KILLS", 3))


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def full(*_, **__):
    raise OSError(28, "No space left on device")


# ---- resume


def test_ten_steps_are_five_and_five(recipe, whole, stopped, tmp_path, monkeypatch):
    again = shutil.copytree(stopped, tmp_path / "again")
    control = shutil.copytree(stopped, tmp_path / "control")
    code, _, err = command(recipe, "--out", again)
    assert code == 0, err
    assert learned(again) == learned(whole)
    true_reseed = train.reseed  # control: it goes on with other random numbers
    monkeypatch.setattr(train, "reseed", lambda *key: true_reseed(9, *key))
    assert command(recipe, "--out", control)[0] == 0
    tensors, figures = learned(control)
    true_tensors, true_figures = learned(whole)
    for name, tensor in true_tensors.items():
        assert tensors[name] != tensor or name.endswith(".step"), name
    assert figures[:6] == true_figures[:6]
    assert all(a != b for a, b in zip(figures[6:], true_figures[6:], strict=True))


@pytest.mark.slow
def test_resume_is_exact_when_compiled(recipe, whole, tmp_path):
    """4 steps are 2 and 2 there too; what is compiled is not what is eager, bit for bit."""
    one, two = tmp_path / "whole", tmp_path / "halves"
    flags = ("--compile", "--steps", "4")
    assert command(recipe, "--out", one, *flags)[0] == 0
    stopped_run(recipe, two, 2, *flags)
    assert command(recipe, "--out", two, *flags)[0] == 0
    assert learned(one) == learned(two)
    losses = [line["loss"] for line in log(one)[1:5]]
    eager = [line["loss"] for line in log(whole)[1:5]]
    assert losses == pytest.approx(eager, rel=2e-2)
    assert losses != eager  # control: another schedule of lr, other sums


def lines_of(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(KILLS))
def test_resume_is_exact_after_sigkill(recipe, whole, tmp_path, kill):
    """Killed at a random moment, then finished: bit for bit the run that was never stopped."""
    run, rng = tmp_path / "run", random.Random(kill)
    line = [sys.executable, ROOT / "train.py", "--recipe", recipe, "--out", run]
    line = [str(part) for part in [*line, "--save-every", 2]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(line, **quiet)
    wanted = rng.randint(1, 11)  # lines of its log: one that says what it is, then steps 0 to 9
    while process.poll() is None and lines_of(run / "log.jsonl") <= wanted:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    if (run / "latest").exists():  # whole, whatever was being written
        folder = checkpoint(run)
        assert all(load_file(folder / name) for name in FILES[:2])
        step = json.loads((folder / FILES[2]).read_text())["step"]
        assert folder.name == f"step_{step:06d}"
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert learned(run) == learned(whole)
    left = sorted(path.name for path in run.glob("*step_*"))
    assert left == ["step_000010"]  # nothing is left behind


def test_half_a_log_line_does_not_stop_a_resume(recipe, whole, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert learned(run) == learned(whole)


CHANGES = (
    ("--lr", 0.5, "lr = 0.01, now 0.5"),
    ("--lora-dropout", 0.2, "lora_dropout = 0.1, now 0.2"),
    ("--steps", 11, "steps = 10, now 11"),
)


def test_a_run_that_is_older_than_a_setting_had_its_default(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = checkpoint(run) / "state.json"
    state = json.loads(path.read_text())
    assert state["settings"].pop("false_negatives") == 2.0
    path.write_text(json.dumps(state))
    line = told(command(recipe, "--out", run, "--false-negatives", "0.1"))
    assert "was begun with false_negatives = 2.0, now 0.1" in line
    code, _, err = command(recipe, "--out", run, "--false-negatives", "2")  # control
    assert code == 0, err


def test_finished_runs_and_changed_settings(recipe, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, out, err = command(recipe, "--out", run)
    assert code == 0, err
    assert "finished already" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    for flag, value, message in CHANGES:
        assert message in told(command(recipe, "--out", run, flag, value))
    code, out, err = command(recipe, "--out", run, "--restart", "--steps", 1)
    assert code == 0, err
    assert [line["step"] for line in log(run)] == [0, 1]


def test_a_checkpoint_of_version_1_goes_on(recipe, whole, stopped, tmp_path):
    """Its state.json names settings that are gone and lacks those that are new."""
    run = shutil.copytree(stopped, tmp_path / "run")
    path = checkpoint(run) / "state.json"
    state = json.loads(path.read_text())
    for name in ("keep_zeros", "content"):
        del state["settings"][name]
    del state["record"]
    state["settings"] |= {"short": "pad", "prune": "none", "quantize": "none", "drop_blocks": 0}
    path.write_text(json.dumps(state))
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert learned(run) == learned(whole)


# ---- damaged files


@pytest.mark.parametrize("name", FILES)
def test_truncated_checkpoint(recipe, stopped, tmp_path, name):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = checkpoint(run) / name
    path.write_bytes(path.read_bytes()[:-100])
    assert name in told(command(recipe, "--out", run))


def test_checkpoint_of_another_shape(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = checkpoint(run) / FILES[1]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3)}, path)
    line = told(command(recipe, "--out", run))
    assert FILES[1] in line
    assert name in line


# ---- killed while writing


class Mortal:
    """Lets so many operations on files happen, then raises Killed."""

    def __init__(self, moment):
        self.left = moment

    def wrap(self, function):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call


def loads_whole(run, targets):
    """Whether `latest` names a checkpoint that can be read and is of the step it says."""
    try:
        stored = [load_file(checkpoint(run) / name) for name in FILES[:2]]
        step = json.loads((checkpoint(run) / FILES[2]).read_text())["step"]
    except (OSError, InputError):
        return False
    return sum(map(len, stored)) == targets and checkpoint(run).name == f"step_{step:06d}"


OPERATIONS = (
    (runs, "save_file"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "rename"),
)


def kill_points(save, template, state, targets):
    """Kills save(...) of step 2 before each of its operations on files.

    -> the moments at which no whole checkpoint could be loaded, and the number of moments.
    """
    lost, moment, finished = [], 0, False
    while not finished:
        run = shutil.copytree(template, template.parent / f"{save.__name__}{moment}")
        mortal = Mortal(moment)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in OPERATIONS:
                patch.setattr(owner, name, mortal.wrap(getattr(owner, name)))
            with contextlib.suppress(Killed):
                save(run, 2, *state, {"step": 2})
                finished = True
        if not loads_whole(run, targets):
            lost.append(moment)
        moment += 1
        train.save_checkpoint(run, 2, *state, {"step": 2})  # what comes after a resume
        left = sorted(path.name for path in run.iterdir())
        assert left == ["latest", "step_000002"] or save is hasty
    return lost, moment


def hasty(run, step, *rest):
    """The control: `latest` is written before what it names."""
    (run / "latest").write_text(f"step_{step:06d}\n")
    train.save_checkpoint(run, step, *rest)


def test_killed_while_saving(tmp_path):
    model = torch.nn.Linear(2, 2)
    state = model, torch.optim.AdamW(model.parameters())
    (tmp_path / "run").mkdir()
    train.save_checkpoint(tmp_path / "run", 1, *state, {"step": 1})
    lost, moments = kill_points(train.save_checkpoint, tmp_path / "run", state, 2 + 6)
    assert lost == []
    assert moments > 15
    assert len(kill_points(hasty, tmp_path / "run", state, 2 + 6)[0]) > 5


def test_a_step_that_is_saved_stays(tmp_path, monkeypatch):
    """A signal in the step after it saves the same again; a kill then must not lose it."""
    model = torch.nn.Linear(2, 2)
    rest = model, torch.optim.AdamW(model.parameters()), {"step": 1}
    train.save_checkpoint(tmp_path, 1, *rest)
    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, Mortal(0).wrap(getattr(owner, name)))
    train.save_checkpoint(tmp_path, 1, *rest)
    with pytest.raises(Killed):  # control
        train.save_checkpoint(tmp_path, 2, *rest)
    monkeypatch.undo()
    assert loads_whole(tmp_path, 2 + 6)


def test_disk_full_keeps_the_last_checkpoint(recipe, stopped, whole, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    before = learned(run)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_file", full)
        line = told(command(recipe, "--out", run))
    assert "No space left on device" in line
    assert f"last good checkpoint: {run / 'step_000005'}" in line
    assert learned(run)[0] == before
    assert [path.name for path in run.glob("*step_*")] == ["step_000005"]
    assert command(recipe, "--out", run)[0] == 0
    assert learned(run) == learned(whole)


def test_disk_full_at_the_export(recipe, unexported, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(folders, "save_torch_state_dict", full)
        assert "No space left on device" in told(command(recipe, "--out", unexported))
    assert command(recipe, "--out", unexported)[0] == 0
    assert (unexported / "config.json").exists()


def test_disk_full_in_the_log(recipe, stopped, whole, tmp_path, monkeypatch):
    run = shutil.copytree(stopped, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunLog, "write", full)
        assert "No space left on device" in told(command(recipe, "--out", run))
    assert command(recipe, "--out", run)[0] == 0
    assert learned(run) == learned(whole)


def test_killed_while_exporting(recipe, unexported, monkeypatch):
    """A run counts as finished only when everything of it is written."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(nvembed, "save_adapter", killed)
        command(recipe, "--out", unexported)
    assert command(recipe, "--out", unexported)[0] == 0
    assert (unexported / "adapter" / "adapter_model.safetensors").exists()
