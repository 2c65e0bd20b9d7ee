"""The same optimisation on 1, 2 and 4 ranks (gloo, CPU), each comparison with a control that fails.

Loss, gradients, cached gradients under FSDP2, curves, checkpoints.
"""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import ROOT
from helpers import batch_rows, learned, log, scored, settings, torchrun, worst
from safetensors.torch import load_file, save_file

import nvembed
import train
from data.runs import checkpoint

pytestmark = pytest.mark.slow
SAME = {"lora_dropout": 0.0, "temperature": 0.2}

# ---- gradients


@pytest.fixture(scope="module")
def gradients(base, tmp_path_factory):
    """run(ranks, jobs) -> the tensors of each job; all jobs start from the same random adapters."""
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
        own = {} if kind == "lora" else {"lora_rank": 0}
        written = []
        for i, job in enumerate(jobs):
            changes = SAME | own | job.get("settings", {})
            default = {
                "base": str(base),
                "rows": batch_rows(),
                "cached": True,
                "out": f"{ranks}_{i}.safetensors",
            }
            written.append(default | job | {"settings": vars(settings(**changes))})
        (folder / kind / "job.json").write_text(json.dumps(written))
        out, code = torchrun(ranks, ROOT / "tests" / "system" / "ranks.py", folder / kind)
        assert code == 0, out
        return [load_file(folder / kind / job["out"]) for job in written]

    return run


@pytest.fixture(scope="module")
def alone(gradients):
    jobs = [{"settings": {"micro_tokens": 10**6}}, {"settings": {"in_batch": False}}]
    return gradients(1, jobs)


@pytest.mark.parametrize("ranks", (2, 4))
def test_gradients_are_those_of_one_process(gradients, alone, ranks):
    jobs = [{"settings": {"micro_tokens": 10**6}}, {"settings": {"in_batch": False}}, {}]
    if ranks == 4:  # two copies of the weights, each over two ranks
        jobs.append({"settings": {"shard_ranks": 2}})
    one, own, cached, *hybrid, control = gradients(ranks, [*jobs, {"control": "gather"}])
    assert one["forwards"] == 1
    assert cached["forwards"] > 2
    for found in (one, cached, *hybrid):
        assert worst(alone[0], found) <= 1e-5
        torch.testing.assert_close(found["loss"], alone[0]["loss"], rtol=1e-5, atol=0)
    assert worst(alone[1], own) <= 1e-5  # each row's own negatives only
    assert worst(alone[0], control) > 1e-2
    assert control["loss"][0] == pytest.approx(float(cached["loss"][0]), rel=1e-6)


def test_false_negatives_on_two_ranks(gradients, alone):
    """Which columns are left out does not depend on the ranks."""
    on = {"settings": {"false_negatives": 0.02}}
    (one,) = gradients(1, [on])
    two, control = gradients(2, [on, on | {"control": "columns"}])
    assert worst(one, two) <= 1e-5
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=0)
    assert one["loss"][0] < alone[0]["loss"][0] - 0.01  # something is left out
    assert worst(one, control) > 1e-2


def test_dims_on_two_ranks(gradients, alone):
    """The gradient of prefixes comes back from the documents of other ranks."""
    on = {"settings": {"dims": [8, 32]}}
    (one,) = gradients(1, [on])
    two, control = gradients(2, [on, on | {"control": "gather"}])
    assert worst(one, two) <= 1e-5
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=0)
    assert min(worst(one, alone[0]), worst(one, control)) > 1e-2


def test_kd_on_two_ranks(gradients, alone):
    """Of eight rows the first rank has three with scores, the second two."""
    on = {"rows": scored(batch_rows()), "settings": {"kd": 1.0}}
    (one,) = gradients(1, [on])
    two, control = gradients(2, [on, on | {"control": "kd"}])
    assert worst(one, two) <= 1e-5
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=0)
    assert min(worst(one, alone[0]), worst(one, control)) > 1e-2


def test_cached_is_plain_under_fsdp(gradients):
    """With dropout, on ranks whose numbers of micro-batches differ; without its replay it fails."""
    on = {"settings": {"lora_dropout": 0.1}}
    compiled = {"settings": on["settings"] | {"compile": True}}
    jobs = [on | {"cached": False}, on, compiled, on | {"control": "replay"}]
    plain, cached, fast, control = gradients(2, jobs)
    assert worst(plain, cached) <= 1e-5
    assert worst(plain, fast) <= 1e-4
    assert fast["graphs"] > 0 == cached["graphs"]
    assert plain["loss"][0] == pytest.approx(float(cached["loss"][0]), rel=1e-6)
    assert worst(plain, control) > 1e-3
    assert cached["forwards"] == 2 * plain["forwards"] > 4


def test_ranks_run_in_step_whatever_the_lengths(gradients, alone, base):
    """Rank 0's texts fill more micro-batches than rank 1's."""
    model, _ = train.build(base, settings(), "cpu")
    counts = []
    for half in (batch_rows()[:4], batch_rows()[4:]):
        texts = []
        for row in half:
            texts += [row["query"], row["pos"][0], *row["neg"]]
        counts.append(len(nvembed.pack(model.tokenize(texts, "", 48), 64)))
    assert counts[0] > counts[1] + 1
    assert worst(alone[0], gradients(2, [{}])[0]) <= 1e-5


def test_full_fine_tuning_and_recompute(gradients):
    dropout = {"lora_dropout": 0.1}
    jobs = [{}, {"cached": False, "settings": dropout}]
    again = [
        {"settings": {"recompute": True}},
        {"cached": False, "settings": dropout | {"recompute": True}},
    ]
    for ours, theirs in zip(gradients(2, jobs), gradients(2, again), strict=True):
        assert worst(ours, theirs) <= 1e-5
    (one,) = gradients(1, [{}], "full")
    (two,) = gradients(2, [{}], "full")
    assert worst(one, two) <= 1e-5
    assert "embedding_model.embed_tokens.weight" in one


# ---- runs


def curve(run, name="loss"):
    return [line[name] for line in log(run)[1:]]


def test_curves_on_one_and_two_ranks(recipe, tmp_path):
    runs = {}
    for dropout in (0.0, 0.1):
        for ranks in (1, 2):
            run = runs[dropout, ranks] = tmp_path / f"{dropout}_{ranks}"
            flags = ("--steps", 30, "--lr", 1e-3, "--lora-dropout", dropout, "--out", run)
            out, code = torchrun(ranks, ROOT / "train.py", "--recipe", recipe, *flags)
            assert code == 0, out
            assert f"global batch 4 = {ranks} rank" in out
    gaps = {}
    for dropout in (0.0, 0.1):
        pairs = zip(curve(runs[dropout, 1]), curve(runs[dropout, 2]), strict=True)
        gaps[dropout] = max(abs(a - b) for a, b in pairs)
    assert gaps[0.0] <= 1e-4 < gaps[0.1] < 0.5, gaps  # control: dropout masks follow the ranks
    print("largest difference of a loss between 1 and 2 ranks, by dropout:", gaps)
    first, second = [log(runs[0.0, ranks])[-1]["held_out_loss"] for ranks in (1, 2)]
    assert first == pytest.approx(second, abs=1e-4)
    for name in ("accuracy", "lr", "grad_norm"):
        expected = pytest.approx(curve(runs[0.0, 2], name), rel=1e-3)
        assert curve(runs[0.0, 1], name) == expected
    assert (runs[0.0, 2] / "config.json").exists()
    assert (runs[0.0, 2] / "adapter").exists()


@pytest.mark.parametrize("kind", ("lora", "full"))
def test_resume_on_two_ranks(recipe, tmp_path, kind):
    """10 = 5 + 5, bit for bit, after SIGTERM to every rank; on one rank as near as curves are."""
    unbroken, again, alone = [tmp_path / name for name in ("unbroken", "again", "alone")]
    program = (ROOT / "train.py", "--recipe", recipe, "--save-every", 1)
    if kind == "full":  # an evaluation leaves the outermost weights whole on every rank
        program += ("--lora-rank", 0, "--eval-every", 1, "--lr", 1e-3)
    assert torchrun(2, *program, "--out", unbroken)[1] == 0
    process = torchrun(2, *program, "--out", again, wait=False)
    while not (again / "latest").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    state = json.loads((checkpoint(again) / "state.json").read_text())
    assert 1 <= state["step"] < 10
    shutil.copytree(again, alone)
    out, code = torchrun(2, *program, "--out", again)
    assert code == 0, out
    assert learned(again) == learned(unbroken)
    # dropout masks follow the ranks: not equal on one of them, but a run
    assert torchrun(1, *program, "--out", alone)[1] == 0
    assert [line["step"] for line in log(alone)] == list(range(11))
    assert learned(alone) != learned(unbroken)


BAD_LAYOUTS = (
    (["--batch", 3], "batch: expected a multiple of the 2 ranks, got 3"),
    (["--shard-ranks", 3], "shard_ranks: expected a divisor of the 2 ranks, got 3"),
    (["--keep"], "keep: expected one rank, got 2"),
)


@pytest.mark.parametrize(("flags", "message"), BAD_LAYOUTS)
def test_bad_layouts(recipe, tmp_path, flags, message):
    program = (ROOT / "train.py", "--recipe", recipe, "--out", tmp_path / "run")
    out, code = torchrun(2, *program, *flags)
    assert code != 0
    assert f"error: {message}" in out
