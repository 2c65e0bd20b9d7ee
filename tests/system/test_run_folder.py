"""What a run may touch, what it is, and how it ends: no file of a user is lost, no run is mixed."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import FILES, command, learned, log, some_rows, told, torchrun
from safetensors.torch import load_file, save_file

import nvembed
import train

from data import runs
from data.ranks import Stopped
from data.files import read_json, write_json, write_rows
from data.runs import checkpoint, fingerprint

# ---- files of a user


def users_files(folder):
    """Files that no run writes, some named almost like one's."""
    names = ("my.jsonl", "step_by_step/notes.txt", "notes/log.jsonl", "model-mine.safetensors")
    names += ("adapter/notes/mine.txt", "step_000099/mine.txt")
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"my {name}\n")
    return {folder / name: f"my {name}\n" for name in names}


def test_restart_removes_only_what_a_run_wrote(recipe, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    mine = users_files(run)
    kept = {path.relative_to(run) for path in run.rglob("*")}
    code, _, err = command(recipe, "--out", run, "--restart", "--steps", 1)
    assert code == 0, err
    assert {path: path.read_text() for path in mine} == mine
    assert [line["step"] for line in log(run)] == [0, 1]  # control: the run itself is another
    assert checkpoint(run).name == "step_000001"
    assert not (run / "step_000010").exists()
    ours = {path.relative_to(run) for path in run.rglob("*")}
    changed = {str(path).replace("step_000010", "step_000001") for path in kept}
    assert {str(path) for path in ours} == changed


def test_a_restart_that_is_killed_can_be_repeated(whole, tmp_path, monkeypatch):
    """Before any file that it removes: what is left is no model, and is still known as a run."""
    unlink = Path.unlink
    done, stop = False, 0
    while not done:
        run = shutil.copytree(whole, tmp_path / str(stop))
        removed = []

        def killed(path, **how):
            if len(removed) == stop:
                raise KeyboardInterrupt
            removed.append(path)
            unlink(path, **how)

        monkeypatch.setattr(Path, "unlink", killed)
        with contextlib.suppress(KeyboardInterrupt):
            runs.remove_run(run)
            done = True
        monkeypatch.setattr(Path, "unlink", unlink)
        assert stop < 2 or not (run / "finished").exists()
        runs.check_folder(run, [])
        runs.remove_run(run)
        assert not any(run.iterdir())
        stop += 1
    assert stop > 8


@pytest.mark.parametrize("flag", ([], ["--restart"]))
def test_a_folder_that_is_no_run_is_refused(recipe, tmp_path, flag):
    mine = users_files(tmp_path / "exp")
    line = told(
        command(recipe, "--data", recipe.parent / "rows.jsonl", "--out", tmp_path / "exp", *flag)
    )
    assert f"--out {tmp_path / 'exp'}: expected an empty folder or a run, found adapter" in line
    assert {path: path.read_text() for path in mine} == mine
    assert len([path for path in (tmp_path / "exp").rglob("*") if path.is_file()]) == len(mine)


@pytest.mark.parametrize("flag", ([], ["--restart"]))
def test_a_run_is_not_its_own_beginning(recipe, base, whole, tmp_path, flag):
    run = shutil.copytree(whole, tmp_path / "run")
    model = shutil.copytree(base, tmp_path / "model")
    link = tmp_path / "link"
    link.symlink_to(run)
    before = [fingerprint(folder) for folder in (run, model)]
    for init, out in ((run, run), (model, model), (run, link), (run / "adapter", run)):
        line = told(command(recipe, "--init", init, "--out", out, *flag))
        assert f"--out {out}: expected another folder than that of model" in line
    assert [fingerprint(folder) for folder in (run, model)] == before
    assert learned(run) == learned(whole)


def test_checkpoints_remove_only_checkpoints(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "step_by_step").mkdir()
    (run / "step_000001").mkdir()  # without state.json: none of ours
    assert command(recipe, "--out", run)[0] == 0
    left = sorted(path.name for path in run.glob("step_*"))
    assert left == ["step_000001", "step_000010", "step_by_step"]


def test_a_card_that_a_user_wrote_is_kept(recipe, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "README.md").write_text("# Mine\n")
    assert command(recipe, "--out", run, "--restart", "--steps", 1)[0] == 0
    assert (run / "README.md").read_text() == "# Mine\n"


LATEST = ("", "step_000003\n", "../elsewhere", "\udce9\udcff")


@pytest.mark.parametrize("latest", LATEST)
def test_latest_that_names_no_checkpoint(recipe, stopped, tmp_path, latest):
    """One line that names those that there are; with one of them written in, the run goes on."""
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "latest").write_bytes(latest.encode(errors="surrogateescape"))
    line = told(command(recipe, "--out", run))
    assert f"{run}/latest: expected the name of a checkpoint, one of ['step_000005']" in line
    (run / "latest").write_text("step_000005\n")
    assert command(recipe, "--out", run)[0] == 0


def test_a_run_without_its_log_goes_on(recipe, whole, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "log.jsonl").unlink()
    assert command(recipe, "--out", run)[0] == 0
    assert learned(run)[0] == learned(whole)[0]


def test_a_state_that_is_not_ours(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (checkpoint(run) / FILES[2]).write_text('{"step": 4}')
    assert "state.json: field 'settings': missing" in told(command(recipe, "--out", run))


def test_files_have_the_mode_of_new_files(recipe, whole, tmp_path):
    (tmp_path / "new").touch()
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in whole.rglob("*") if path.is_file()}
    assert modes == {expected}
    assert len(list(whole.rglob("*.safetensors"))) == 4  # control: these were the private ones


# ---- two commands, one folder

HOLD = """
import sys, time
from data.files import locked
with locked(sys.argv[1]):
    print(flush=True)
    time.sleep(99)
"""


def test_a_folder_in_use_is_refused(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    before = learned(run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, run], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    holder.stdout.readline()
    assert f"{run}: in use by another process" in told(command(recipe, "--out", run))
    assert learned(run) == before
    holder.kill()  # the lock goes with it
    holder.communicate()
    assert command(recipe, "--out", run)[0] == 0


# ---- what a run is


def test_a_run_is_of_its_rows(recipe, tmp_path):
    """The same file name in another folder, or the same file edited, is another run."""
    rows = some_rows(40, seed=1)
    paths = [tmp_path / name / "my.jsonl" for name in ("one", "two", "zip")]
    paths[2] = paths[2].with_suffix(".jsonl.gz")
    other = [*rows[:-1], rows[-1] | {"pos": ["another text"]}]
    for path, content in zip(paths, (rows, other, rows), strict=True):
        write_rows(path, content)
    run = tmp_path / "run"
    flags = ("--steps", 2, "--out", run, "--data")
    assert command(recipe, *flags, paths[0])[0] == 0
    code, out, _ = command(recipe, *flags, paths[2])
    assert code == 0
    assert "finished already" in out  # the same rows, zipped
    line = told(command(recipe, *flags, paths[1]))
    assert f"{run}: was begun with other content: rows of my" in line
    shutil.copy(paths[1], paths[0])
    assert "other content: rows of my" in told(command(recipe, *flags, paths[0]))


def test_a_run_is_of_how_its_recipe_uses_rows(recipe, tmp_path):
    """Instruction, symmetry, number of samples, order: each told by its name."""
    path = tmp_path / "recipe.json"
    original = read_json(recipe)
    (first,) = original["datasets"]
    write_rows(tmp_path / "more.jsonl", some_rows(40, seed=2))
    more = first | {"name": "more", "file": "more.jsonl"}
    original["datasets"] = [first | {"file": str(recipe.parent / first["file"])}, more]
    run = tmp_path / "run"
    flags = ("--steps", 1, "--out", run)

    def after(**changes):
        first, *others = original["datasets"]
        write_json(path, original | {"datasets": [first | changes, *others]})
        return command(path, *flags)

    assert after()[0] == 0
    name = original["datasets"][0]["name"]
    changed = {"instruction": "Another task", "symmetric": True, "samples": 20}
    for field, value in changed.items():
        assert f"begun with other content: {field} of {name}" in told(after(**{field: value}))
    original["datasets"].reverse()
    assert "begun with other content: data sets and their order" in told(after())
    original["datasets"].reverse()
    assert "finished already" in after()[1]

    # an earlier version wrote less down
    state_path = checkpoint(run) / "state.json"
    state = read_json(state_path)
    content = state["settings"]["content"]
    state["settings"]["content"] = {key: content[key] for key in content if "rows of" in key}
    state_path.write_text(json.dumps(state))
    assert "finished already" in after()[1]


def test_a_run_with_another_mask_or_pooling_begins_anew(recipe, tmp_path):
    """From its merged model, and the change is told; with the same ones its adapters go on."""
    first = tmp_path / "first"
    assert command(recipe, "--steps", 1, "--causal", "--pooling", "mean", "--out", first)[0] == 0
    flags = ("--steps", 1, "--init", first, "--out")
    code, _, err = command(recipe, *flags, tmp_path / "same", "--causal", "--pooling", "mean")
    assert code == 0 and "->" not in err
    assert read_json(checkpoint(tmp_path / "same") / "state.json")["base"] != str(first)
    code, _, err = command(recipe, *flags, tmp_path / "other")
    assert code == 0
    assert "pooling mean -> latent" in err and "causal True -> False" in err
    assert read_json(checkpoint(tmp_path / "other") / "state.json")["base"] == str(first)


def test_a_run_goes_on_with_other_free_settings(recipe, whole, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    free = ("--micro-tokens", 128, "--recompute", "--save-every", 3, "--eval-every", 2)
    free += ("--shard-ranks", 1)
    code, _, err = command(recipe, "--out", run, *free)
    assert code == 0, err
    assert [line["step"] for line in log(run)] == list(range(11))
    assert "lr = 0.01, now 0.02" in told(command(recipe, "--out", run, "--lr", 0.02))  # control


def test_a_relative_base_that_was_renamed(recipe, base, whole, tmp_path, monkeypatch):
    """The run goes on from another working directory, and from a base of another name."""
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    steps = ("--steps", 4, "--save-every", 1)
    whole_step = train.timed_step

    def interrupted(*args):
        if args[4] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return whole_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "timed_step", interrupted)
        assert command(recipe, "--init", "base", "--out", "run", *steps)[0] == 130
    adapter = json.loads((checkpoint(run) / FILES[2]).read_text())
    assert adapter["base"] == str(tmp_path / "base")
    monkeypatch.chdir("/")
    (tmp_path / "base").rename(tmp_path / "renamed")
    code, _, err = command(recipe, "--init", tmp_path / "renamed", "--out", run, *steps)
    assert code == 0, err
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "renamed")
    straight = tmp_path / "straight"
    assert command(recipe, "--init", tmp_path / "renamed", "--out", straight, *steps)[0] == 0
    assert learned(run) == learned(straight)


def test_a_run_does_not_go_on_from_another_base(recipe, base, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    other = shutil.copytree(base, tmp_path / "other")
    path = other / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)
    line = told(command(recipe, "--out", run, "--init", other))
    assert f"{run}: was begun with other content: init" in line


def test_an_unfinished_run_is_no_beginning(recipe, stopped, tmp_path):
    line = told(command(recipe, "--init", stopped, "--out", tmp_path / "next"))
    assert f"{stopped}: no finished run" in line


def test_a_run_says_what_it_begins_with(recipe, base, tmp_path):
    out = command(recipe, "--out", tmp_path / "run", "--steps", 1)[1]
    assert f"begins with {base}\n" in out


# ---- how a run ends


def kill_at(monkeypatch, owner, name, calls):
    """Sends this process SIGTERM at one of the calls of a function, which then goes on."""
    function, left = getattr(owner, name), [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("calls", (1, 4, 9, 60, 90))
def test_stopped_between_micro_batches(recipe, whole, tmp_path, monkeypatch, calls):
    """In the first evaluation, in a step, in a later one: the last whole step is saved."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, nvembed.NVEmbed, "forward", calls)
        code, out, err = command(recipe, "--out", run)
    step = json.loads((checkpoint(run) / FILES[2]).read_text())["step"]
    assert code == 130
    assert err.splitlines()[-1] == f"stopped after step {step}; the same command goes on from here"
    assert step == [line["step"] for line in log(run)][-1] if len(log(run)) else step == 0
    assert step < 10
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert learned(run) == learned(whole)


def test_a_signal_ends_the_export_and_the_same_command_goes_on(
    recipe, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, nvembed, "save_adapter", 1)
        code, _, err = command(recipe, "--out", run)
    assert code == 130
    assert err.splitlines()[-1].startswith("stopped")
    assert not (run / "finished").exists()
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert (run / "finished").exists()
    assert learned(run) == learned(whole)
    assert Stopped in KeyboardInterrupt.__subclasses__()


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_before_the_first_step(recipe, tmp_path, number):
    """As soon as it tells what it reads."""
    line = [sys.executable, ROOT / "train.py", "--recipe", recipe, "--out", tmp_path / "run"]
    line = [*line, "--steps", "3000"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "rows of" in process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped")


def test_weights_that_are_not_finite_are_not_saved(recipe, tmp_path):
    run = tmp_path / "run"
    flags = ("--steps", 2, "--lr", 1e38, "--save-every", 1, "--warmup", 0)
    line = told(command(recipe, "--out", run, *flags))
    assert "not finite" in line
    assert not (run / "config.json").exists()
    if (run / "latest").exists():
        stored = load_file(checkpoint(run) / FILES[0])
        assert all(tensor.isfinite().all() for tensor in stored.values())


def test_embeddings_that_are_not_finite_are_not_exported(recipe, tmp_path, monkeypatch):
    def broken(self, texts, *args, **kwargs):
        return true_encode(self, texts, *args, **kwargs) * float("nan")

    true_encode = nvembed.NVEmbed.encode
    monkeypatch.setattr(nvembed.NVEmbed, "encode", broken)
    line = told(command(recipe, "--out", tmp_path / "run", "--steps", 1))
    assert "trained, not exported: its embeddings are not finite" in line
    assert not (tmp_path / "run" / "config.json").exists()


# ---- several ranks


@pytest.mark.slow
def test_an_error_is_the_last_line_of_torchrun(recipe, tmp_path):
    flags = ("--recipe", recipe, "--out", tmp_path / "run", "--data", "no/such.jsonl")
    out, code = torchrun(2, ROOT / "train.py", *flags)
    assert code != 0
    assert out.splitlines()[-1].startswith("error: no/such.jsonl: ")


ODD = """
import os, sys
sys.path.insert(0, {root!r})
import train
from data.commands import run_command
if os.environ["RANK"] == "1":
    sys.argv += {changed!r}
run_command(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("change", ("lr", "rows"))
def test_ranks_that_differ_are_refused(recipe, tmp_path, change):
    rows = some_rows(40)
    for name in ("one", "two"):
        write_rows(tmp_path / name / "my.jsonl", rows)
        rows = [rows[1], rows[0], *rows[2:]]  # the second file: another order
    changed = {"lr": ["--lr", "0.5"], "rows": ["--data", str(tmp_path / "two" / "my.jsonl")]}
    program = tmp_path / "odd.py"
    program.write_text(ODD.format(root=str(ROOT), changed=changed[change]))
    flags = ("--recipe", recipe, "--data", tmp_path / "one" / "my.jsonl", "--out", tmp_path / "run")
    out, code = torchrun(2, program, *flags)
    assert code != 0
    assert "rank 1: expected the rows, settings, model and checkpoint of rank 0" in out
    assert not (tmp_path / "run" / "latest").exists()


@pytest.mark.slow
def test_ranks_end_with_their_torchrun(recipe, tmp_path):
    """Killed, it leaves no rank behind; meanwhile the same command is refused, then it goes on."""
    run = tmp_path / "run"
    program = (ROOT / "train.py", "--recipe", recipe, "--out", run, "--steps", 3000)
    process = torchrun(2, *program, wait=False)
    while process.poll() is None and not (run / "latest").exists():
        time.sleep(0.05)
    process.kill()
    deadline = time.monotonic() + 30
    code = 2
    while code == 2 and time.monotonic() < deadline:
        again = [sys.executable, "-c", HOLD.replace("99", "0"), run]
        code = subprocess.run(again, cwd=ROOT, capture_output=True, check=False).returncode
        code = 0 if code == 0 else 2
    assert code == 0, "a rank still holds the run's folder"
    state = json.loads((checkpoint(run) / FILES[2]).read_text())
    time.sleep(2)
    assert json.loads((checkpoint(run) / FILES[2]).read_text()) == state  # nobody trains on
    assert state["step"] < 3000
