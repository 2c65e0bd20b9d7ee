"""The same optimisation on 1, 2 and 4 ranks (gloo, CPU): loss, gradients, cached gradients under FSDP2,
checkpoints; each with a control that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nvembed
import pytest
import torch
import train
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_train import WORDS, learned, log, recipe, settings, some_rows, tangled_rows, whole  # noqa: F401

SAME = {"lora_dropout": 0.0, "temperature": 0.2}


def torchrun(ranks, *line, wait=True):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *line]
    kind = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(list(map(str, line)), env=os.environ | {"OMP_NUM_THREADS": "1"}, **kind)
    return (process.communicate(timeout=300)[0], process.returncode) if wait else process


def batch_rows():
    """Eight rows with duplicates among positives and negatives; the texts of the first four are the
    longest."""
    rows = tangled_rows(2) + some_rows(1, 2, seed=5)
    for row in rows[:4]:
        row["neg"] = [" ".join([*WORDS, text]) for text in row["neg"]]
    return rows


@pytest.fixture(scope="module")
def gradients(base, tmp_path_factory):
    """run(ranks, jobs) -> the tensors that each job writes; all jobs start from the same random adapters."""
    folder = tmp_path_factory.mktemp("gradients")
    for lora_rank, name in ((4, "lora"), (0, "full")):
        (folder / name).mkdir()
        model, _ = train.build(base, settings(lora_rank=lora_rank), "cpu")
        start = {n: p.detach().clone() for n, p in train.trained(model).items()}
        for n, p in start.items():
            if n.endswith("lora_B"):
                p.normal_(std=0.05)
        save_file(start, folder / name / "start.safetensors")

    def run(ranks, jobs, kind="lora"):
        for i, job in enumerate(jobs):
            rank = {} if kind == "lora" else {"lora_rank": 0}
            job["settings"] = vars(settings(**(SAME | rank | job.get("settings", {}))))
            job |= {
                "base": str(base),
                "rows": job.get("rows", batch_rows()),
                "out": f"{ranks}_{i}.safetensors",
            }
            job.setdefault("cached", True)
        (folder / kind / "job.json").write_text(json.dumps(jobs))
        out, code = torchrun(ranks, ROOT / "tests" / "ranks.py", folder / kind)
        assert code == 0, out
        return [load_file(folder / kind / job["out"]) for job in jobs]

    return run


def worst(one, other):
    """Largest relative error of a gradient, |difference| / |gradient|; none of them may be zero."""
    names = one.keys() - {"loss", "forwards"}
    assert names == other.keys() - {"loss", "forwards"} and all(one[n].norm() > 0 for n in names)
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in names)


@pytest.fixture(scope="module")
def alone(gradients):
    jobs = [{"settings": {"micro_tokens": 10**6}}, {"settings": {"in_batch": False}}]
    return gradients(1, jobs)


@pytest.mark.parametrize("ranks", (2, 4))
def test_gradients_are_those_of_one_process(gradients, alone, ranks):
    jobs = [{"settings": {"micro_tokens": 10**6}}, {"settings": {"in_batch": False}}, {}]
    if ranks == 4:
        jobs.append({"settings": {"shard_ranks": 2}})  # two copies of the weights, each over two ranks
    one, own, cached, *hybrid, control = gradients(ranks, [*jobs, {"control": "gather"}])
    assert one["forwards"] == 1 and cached["forwards"] > 2
    for found in (one, cached, *hybrid):
        assert worst(alone[0], found) <= 1e-5
        torch.testing.assert_close(found["loss"], alone[0]["loss"], rtol=1e-5, atol=0)
    assert worst(alone[1], own) <= 1e-5  # each row's own negatives only
    assert worst(alone[0], control) > 1e-2
    assert control["loss"][0] == pytest.approx(float(cached["loss"][0]), rel=1e-6)


def test_cached_is_plain_under_fsdp(gradients):
    """With dropout, on two ranks whose numbers of micro-batches differ; without its replay it fails."""
    on = {"settings": {"lora_dropout": 0.1}}
    jobs = [on | {"cached": False}, dict(on), on | {"control": "replay"}]
    plain, cached, control = gradients(2, jobs)
    assert worst(plain, cached) <= 1e-5 and plain["loss"][0] == pytest.approx(
        float(cached["loss"][0]), rel=1e-6
    )
    assert worst(plain, control) > 1e-3
    assert cached["forwards"] == 2 * plain["forwards"] > 4


def test_ranks_run_in_step_whatever_the_lengths(gradients, alone, base):
    """Rank 0's texts fill more micro-batches than rank 1's."""
    model, _ = train.build(base, settings(), "cpu")
    data = train.Dataset("set", "Find it", False, batch_rows(), [])
    counts = []
    for half in (slice(0, 4), slice(4, 8)):
        texts = [text for row in data.rows[half] for text in (row["query"], row["pos"][0], *row["neg"])]
        counts.append(len(nvembed.pack(model.tokenize(texts, "", 48), 64)))
    assert counts[0] > counts[1] + 1
    assert worst(alone[0], gradients(2, [{}])[0]) <= 1e-5


def test_full_fine_tuning_and_recompute(gradients):
    dropped = {"cached": False, "settings": {"lora_dropout": 0.1}}
    again = [
        {"settings": {"recompute": True}},
        dropped | {"settings": {"lora_dropout": 0.1, "recompute": True}},
    ]
    for ours, theirs in zip(gradients(2, [{}, dropped]), gradients(2, again), strict=True):
        assert worst(ours, theirs) <= 1e-5
    one, two = gradients(1, [{}], "full")[0], gradients(2, [{}], "full")[0]
    assert worst(one, two) <= 1e-5
    assert "embedding_model.embed_tokens.weight" in one


def curve(run, name="loss"):
    return [line[name] for line in log(run)[1:]]


def test_curves_on_one_and_two_ranks(recipe, tmp_path):  # noqa: F811
    runs = {}
    for dropout in (0.0, 0.1):
        for ranks in (1, 2):
            runs[dropout, ranks] = tmp_path / f"{dropout}_{ranks}"
            flags = ("--steps", 30, "--lr", 1e-3, "--lora-dropout", dropout, "--out", runs[dropout, ranks])
            out, code = torchrun(ranks, ROOT / "train.py", "--recipe", recipe, *flags)
            assert code == 0 and f"global batch 4 = {ranks} rank" in out, out
    gap = {
        d: max(abs(a - b) for a, b in zip(curve(runs[d, 1]), curve(runs[d, 2]), strict=True))
        for d in (0.0, 0.1)
    }
    assert gap[0.0] <= 1e-4 < gap[0.1] < 0.5, gap  # control: dropout masks follow the ranks
    print("largest difference of a loss between 1 and 2 ranks, by dropout:", gap)
    first, second = (log(runs[0.0, ranks]) for ranks in (1, 2))
    assert first[-1]["held_out_loss"] == pytest.approx(second[-1]["held_out_loss"], abs=1e-4)
    for name in ("accuracy", "lr", "grad_norm"):
        assert curve(runs[0.0, 1], name) == pytest.approx(curve(runs[0.0, 2], name), rel=1e-3)
    assert (runs[0.0, 2] / "config.json").exists() and (runs[0.0, 2] / "adapter").exists()


def test_resume_on_two_ranks(recipe, tmp_path):  # noqa: F811
    """10 = 5 + 5, bit for bit, after SIGTERM to every rank; and on one rank, as near as curves are."""
    whole, again, alone = (tmp_path / name for name in ("whole", "again", "alone"))  # noqa: F811
    how = (ROOT / "train.py", "--recipe", recipe, "--save-every", 1)
    assert torchrun(2, *how, "--out", whole)[1] == 0
    process = torchrun(2, *how, "--out", again, wait=False)
    while not (again / "latest").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert 1 <= json.loads((train.checkpoint(again) / "state.json").read_text())["step"] < 10
    shutil.copytree(again, alone)
    out, code = torchrun(2, *how, "--out", again)
    assert code == 0, out
    assert learned(again) == learned(whole)
    assert torchrun(1, *how, "--out", alone)[1] == 0  # dropout masks follow the ranks: not equal, but a run
    assert [line["step"] for line in log(alone)] == list(range(11)) and learned(alone) != learned(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", 3], "batch: expected a multiple of the 2 ranks, got 3"),
        (["--shard-ranks", 3], "shard_ranks: expected a divisor of the 2 ranks, got 3"),
    ],
)
def test_bad_layouts(recipe, tmp_path, flags, message):  # noqa: F811
    out, code = torchrun(2, ROOT / "train.py", "--recipe", recipe, "--out", tmp_path / "run", *flags)
    assert code != 0 and f"error: {message}" in out
