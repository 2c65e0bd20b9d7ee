"""Stage 3: what pruning lost is recovered by distillation, and zeros stay zero; with controls."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from helpers import (
    SMALL,
    a_batch,
    command,
    learned,
    log,
    settings,
    some_rows,
    tangled_rows,
    told,
    torchrun,
    worst,
)
from safetensors.torch import load_file, save_file

import nvembed
import train
from data.commands import InputError
from data.runs import RunLog, checkpoint
from experiments import compress
from nvembed import NVEmbed

TEXTS = [
    "river stone engine paper",
    "doctor bread",
    "a letter from the island in winter, with music",
]
STAGE = SMALL | {
    "lr": 3e-4,
    "lora_rank": 0,
    "lora_dropout": 0.0,
    "distill": 1.0,
    "keep_zeros": True,
    "in_batch": False,
    "temperature": 0.2,
}


@pytest.fixture(scope="module", autouse=True)
def no_yardstick():
    """The speed of this machine's products is not what these tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "measure_peak", lambda *_: 1e12)
        yield


@pytest.fixture(scope="module")
def stage3_recipe(recipe, tmp_path_factory):
    """The recipe of all tests with a stage 3."""
    found = json.loads(recipe.read_text())
    found["datasets"][0]["file"] = str(recipe.parent / "rows.jsonl")
    found["stages"]["3"] = STAGE
    path = tmp_path_factory.mktemp("stage3") / "recipe.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    """Sparsity -> a folder of the tiny base, its decoder pruned."""
    folders = {}
    for sparsity in ("0.5", "2:4"):
        model = NVEmbed.from_pretrained(base)
        tokens = model.tokenize([row["pos"][0] for row in some_rows(16)])
        compress.prune_decoder(model, tokens, "sparsegpt", compress.read_sparsity(sparsity))
        folders[sparsity] = tmp_path_factory.mktemp("pruned") / "model"
        model.save_pretrained(folders[sparsity], torch.float32)
    return folders


@pytest.fixture(scope="module")
def stage3(stage3_recipe, base, pruned):
    """train.py --stage 3 -> (exit status, stdout, stderr)."""

    def run(out, *flags, init=pruned["0.5"], teacher=base):
        given = ("--stage", 3, "--init", init, "--teacher", teacher, "--out", out)
        return command(stage3_recipe, *given, *flags)

    return run


@pytest.fixture(scope="module")
def recovered(stage3, tmp_path_factory):
    run = tmp_path_factory.mktemp("recovered") / "run"
    code, _, err = stage3(run)
    assert code == 0, err
    return run


def weights(folder):
    """The decoder's projections in a model folder."""
    found = load_file(folder / "model.safetensors")
    return {name: t for name, t in found.items() if name.split(".")[-2] in nvembed.PROJECTIONS}


# ---- zeros


@pytest.mark.parametrize("sparsity", ("0.5", pytest.param("2:4", marks=pytest.mark.slow)))
def test_zeros_survive_recovery(stage3, pruned, sparsity, tmp_path):
    code, _, err = stage3(tmp_path, "--weight-decay", 0.1, "--steps", 3, init=pruned[sparsity])
    assert code == 0, err
    before, after = weights(pruned[sparsity]), weights(tmp_path)
    assert len(before) == 3 * 7
    for name, weight in before.items():
        zeros = weight == 0
        assert zeros.float().mean() == 0.5 and torch.equal(after[name] == 0, zeros)
        assert (after[name] != weight)[~zeros].float().mean() > 0.9  # it was trained
        if sparsity == "2:4":
            assert (zeros.view(len(zeros), -1, 4).sum(dim=-1) == 2).all()
    assert len(NVEmbed.from_pretrained(tmp_path).encode(TEXTS)) == 3
    assert not (tmp_path / "adapter").exists()


def test_without_keep_zeros_they_are_filled(stage3, tmp_path):
    code, _, err = stage3(tmp_path, "--no-keep-zeros", "--steps", 3)
    assert code == 0, err
    for weight in weights(tmp_path).values():
        assert (weight == 0).float().mean() < 0.01


@pytest.mark.slow
def test_recovery_learns(recovered, base, pruned):
    """Ten steps bring the embeddings of the training texts nearer to the teacher's."""
    texts = [row["pos"][0] for row in some_rows(40)]
    teacher = NVEmbed.from_pretrained(base).encode(texts)
    cosines = {}
    for name, folder in (("before", pruned["0.5"]), ("after", recovered)):
        embeddings = NVEmbed.from_pretrained(folder).encode(texts)
        cosines[name] = (embeddings * teacher).sum(axis=1).mean()
    assert cosines["before"] + 0.01 < cosines["after"] < 0.999


def test_gradient_under_the_mask(pruned):
    """keep_zeros gives the gradient of a model whose weights are W * (W != 0), by autograd."""
    s = settings(**STAGE | {"micro_tokens": 10**6, "clip": 1e9})
    model, _ = train.build(pruned["0.5"], s, "cpu")
    batch = a_batch(model, tangled_rows(2), s)
    leaves, masked = {}, {}
    for name, parameter in model.named_parameters():
        leaves[name] = parameter.detach().clone().requires_grad_()
        mask = parameter.detach() != 0 if name.endswith("_proj.weight") else 1
        masked[name] = leaves[name] * mask
    embeddings = torch.func.functional_call(model, masked, (batch.tokens,))
    loss, _ = train.batch_loss(embeddings, batch, s)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    expected = dict(zip(leaves, gradients, strict=True))

    train.backward(model, batch, s)
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    train.zero_pruned_gradients(model)
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert worst(expected, ours) <= 1e-4 < 0.1 < worst(expected, plain)  # control: all gradients
    for name, gradient in ours.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(gradient == 0, leaves[name] == 0)

    # What is clipped, and logged, is the norm of this gradient.
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    optimizer = torch.optim.AdamW(train.trained(model).values(), lr=0.0)
    model.zero_grad()
    record = train.train_step(model, optimizer, batch, s, 0)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_adapters_would_fill_zeros(stage3, tmp_path):
    message = "keep_zeros: expected lora_rank 0, got 4: LoRA fills zeros"
    assert message in told(stage3(tmp_path / "run", "--lora-rank", 4))


@pytest.mark.slow
def test_a_shorter_model_is_recovered(stage3, base, tmp_path):
    """The student has a block less than its teacher; it has no zeros, so LoRA may train it."""
    model = NVEmbed.from_pretrained(base)
    compress.drop_blocks(model, model.tokenize(TEXTS), 1)
    model.save_pretrained(tmp_path / "short", torch.float32)
    flags = ("--no-keep-zeros", "--lora-rank", 4, "--steps", 2)
    code, _, err = stage3(tmp_path / "run", *flags, init=tmp_path / "short")
    assert code == 0, err
    found = NVEmbed.from_pretrained(tmp_path / "run")
    assert found.config.num_hidden_layers == len(found.embedding_model.layers) == 2
    assert len(found.encode(TEXTS)) == 3 and (tmp_path / "run" / "adapter").exists()


# ---- distillation


def double_loop(embeddings, teacher, batch, s):
    """The losses of distillation written out."""
    distance = 0
    for x, y in zip(embeddings, teacher, strict=True):
        distance = distance + (1 - x @ y)
    distance = distance / len(embeddings)
    rows = len(batch.valid)
    divergence = 0
    for i in range(rows):
        p, q = (
            torch.softmax(torch.stack([x[i] @ d for d in x[rows:]]) / s.temperature, 0)
            for x in (teacher, embeddings)
        )
        for a, b in zip(p, q, strict=True):
            divergence = divergence + a * torch.log(a / b)
    return s.distill * (distance / s.temperature + divergence / rows)


def test_distillation_equals_a_double_loop(base):
    s = settings(**STAGE | {"distill": 0.7})
    model = NVEmbed.from_pretrained(base)
    rows = some_rows(4)
    rows[1]["neg"] = rows[1]["neg"][:1]  # a short list: one document less
    batch = a_batch(model, rows, s)
    found = []
    for _ in range(2):
        near = 1 + 0.3 * torch.randn(len(batch.tokens), 8, dtype=torch.float64)
        found.append(torch.nn.functional.normalize(near, dim=1))
    embeddings, teacher = found
    embeddings.requires_grad_()
    plain, _ = train.batch_loss(embeddings, batch, s)
    batch.teacher = teacher
    loss, _ = train.batch_loss(embeddings, batch, s)
    expected = plain + double_loop(embeddings, teacher, batch, s)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and loss > plain + 0.05
    (ours,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, embeddings)
    torch.testing.assert_close(ours, theirs)
    batch.teacher = embeddings.detach()  # of itself there is nothing to learn
    loss, _ = train.batch_loss(embeddings, batch, s)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)


def test_a_teacher_is_what_its_folder_says(base, tmp_path):
    """Its own pooling and mask, not the student's; but vectors and tokens like the student's."""
    s = settings(**STAGE)
    student = NVEmbed.from_pretrained(base)
    NVEmbed.from_pretrained(base, pooling="mean", causal=True).save_pretrained(tmp_path / "mean")
    found = train.load_teacher(str(tmp_path / "mean"), s, "cpu", student).config
    assert (found.pooling, found.causal) == ("mean", True)

    narrow = replace(student.config, hidden_size=student.config.hidden_size // 2, head_dim=8)
    NVEmbed(narrow, student.tokenizer).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match="narrow: expected vectors of 64 numbers, got 32"):
        train.load_teacher(str(tmp_path / "narrow"), s, "cpu", student)
    student.tokenizer.add_tokens(["another"])
    with pytest.raises(InputError, match="mean: expected the student's vocabulary, got another"):
        train.load_teacher(str(tmp_path / "mean"), s, "cpu", student)


@pytest.mark.slow
def test_distilled_gradient_on_two_ranks_and_cached(base, pruned, tmp_path):
    """Plain = cached = on two ranks whose numbers of texts differ."""
    s = settings(**STAGE | {"in_batch": True, "lora_rank": 4, "keep_zeros": False})
    model, _ = train.build(pruned["0.5"], s, "cpu")
    start = {name: p.detach().clone() for name, p in train.trained(model).items()}
    for name, tensor in start.items():
        if name.endswith("lora_B"):
            tensor.normal_(std=0.05)
    save_file(start, tmp_path / "start.safetensors")
    rows = tangled_rows(2) + some_rows(1, 2, seed=5)
    rows[0]["neg"] = rows[0]["neg"][:1]
    for row in rows[:4]:
        row["neg"] = [text + " river stone engine paper window garden" for text in row["neg"]]
    job = {"base": str(pruned["0.5"]), "teacher": str(base), "rows": rows}
    found = {}
    for ranks in (1, 2):
        jobs = []
        for name, distill, cached in (("plain", 1, False), ("cached", 1, True), ("alone", 0, True)):
            how = {"settings": vars(s) | {"distill": float(distill)}, "cached": cached}
            jobs.append(job | how | {"out": f"{ranks}_{name}.safetensors"})
        (tmp_path / "job.json").write_text(json.dumps(jobs))
        out, code = torchrun(ranks, ROOT / "tests" / "system" / "ranks.py", tmp_path)
        assert code == 0, out
        for j in jobs:
            name = j["out"].removesuffix(".safetensors")
            found[name] = load_file(tmp_path / j["out"])
    reference = found["1_plain"]
    for name in ("1_cached", "2_plain", "2_cached"):
        assert worst(reference, found[name]) <= 3e-5, name
        torch.testing.assert_close(reference["loss"], found[name]["loss"], rtol=1e-5, atol=0)
    assert found["1_cached"]["forwards"] > reference["forwards"]
    assert worst(reference, found["1_alone"]) > 1e-2  # control: without the teacher


@pytest.mark.slow
def test_recovery_on_two_ranks(stage3_recipe, base, pruned, recovered, tmp_path):
    """Weights and teacher are sharded; the steps are those of one rank, and zeros stay zero."""
    flags = ("--stage", 3, "--init", pruned["0.5"], "--teacher", base, "--out", tmp_path)
    out, code = torchrun(2, ROOT / "train.py", "--recipe", stage3_recipe, *flags)
    assert code == 0, out
    losses = [record["loss"] for record in log(tmp_path)[1:]]
    expected = [record["loss"] for record in log(recovered)[1:]]
    assert losses == pytest.approx(expected, rel=1e-3)
    norms = [record["grad_norm"] for record in log(tmp_path)[1:]]
    expected = [record["grad_norm"] for record in log(recovered)[1:]]
    assert norms == pytest.approx(expected, rel=1e-2)
    ours, before = weights(tmp_path), weights(pruned["0.5"])
    assert all(torch.equal(ours[name] == 0, before[name] == 0) for name in before)


# ---- the command


@pytest.mark.slow
def test_resume_of_stage_three(stage3, recovered, pruned, base, tmp_path):
    """10 = 5 + 5 steps, bit for bit."""
    run = tmp_path / "run"
    write = RunLog.write

    def killed(log, record):
        write(log, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", killed)
        assert stage3(run)[0] == 130
    assert json.loads((checkpoint(run) / "state.json").read_text())["step"] == 4
    file = pruned["0.5"] / "model.safetensors"
    before = os.stat(file).st_mtime_ns
    code, _, err = stage3(run)
    assert code == 0, err
    assert learned(run) == learned(recovered)
    assert os.stat(file).st_mtime_ns == before
    copy = shutil.copytree(base, tmp_path / "copy")
    assert stage3(run, teacher=copy)[0] == 0  # the same by another name
    tensors = load_file(copy / "model.safetensors")
    save_file({name: t * 2 for name, t in tensors.items()}, copy / "model.safetensors")
    assert "was begun with other content: teacher" in told(stage3(run, teacher=copy))
    assert "was begun with keep_zeros = True, now False" in told(stage3(run, "--no-keep-zeros"))


def test_what_stage_three_needs(stage3_recipe, stage3, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "runs/pruned: no finished run; run experiments/compress.py first"
    assert message in told(command(stage3_recipe, "--stage", 3))
    needs_teacher = command(stage3_recipe, "--stage", 3, "--init", pruned["0.5"])
    assert "model 'runs/stage2': not a folder" in told(needs_teacher)
    result = stage3(tmp_path / "run", teacher=tmp_path / "nowhere")
    assert f"model '{tmp_path / 'nowhere'}': no such folder" in told(result)
    found = json.loads(stage3_recipe.read_text())
    found["stages"]["3"]["prune"] = "sparsegpt"  # pruning is another command now
    (tmp_path / "old.json").write_text(json.dumps(found))
    message = "stages.3: unknown setting 'prune'"
    assert message in told(command(tmp_path / "old.json", "--stage", 3))
