"""Compression: the solver against explicit inverses, layer errors on the default base's own states, masks through
training, distillation, depth, quantised files, embeddings for an index; each with a control that fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import eval as evaluation
import numpy as np
import nvembed
import pytest
import torch
import train
from conftest import ROOT
from nvembed import InputError, NVEmbed
from safetensors.torch import load_file, save_file
from test_ranks import batch_rows, torchrun, worst
from test_train import a_batch, command, learned, log, recipe, settings, some_rows, told  # noqa: F401

from data import prepare

TEXTS = ["river stone engine paper", "doctor bread", "a letter from the island in winter, with music"]
SMALL = {"lora_dropout": 0.0, "distill": 1.0, "in_batch": False, "temperature": 0.2}


# ----------------------------------------------------------------------------------------------------- solver


def problem(rows=12, width=64, seed=0):
    """A layer's weight and the inputs it reads, correlated as a network's are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, width)) @ (rng.standard_normal((width, width)) * np.linspace(0.1, 2, width))
    return rng.standard_normal((rows, width)), x.T @ x


def brain_surgeon(weight, gram, group, decide):
    """Column by column with the inverse of what is left of the Hessian written out: w_k -= e / [H^-1]_jj [H^-1]_jk.
    decide(columns, [H^-1]_jj of each) -> function (weight, place in the group) -> new weight."""
    w, h = weight.copy(), gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    first = [np.linalg.inv(h[j:, j:])[0] for j in range(len(h))]
    for j in range(len(h)):
        if j % group == 0:
            new = decide(
                w[:, j : j + group], np.array([first[k][0] for k in range(j, min(j + group, len(h)))])
            )
        for row in range(len(w)):
            before = w[row, j]
            w[row, j] = new(before, j % group, row)
            w[row, j + 1 :] -= (before - w[row, j]) / first[j][0] * first[j][1:]
    return w


def half(columns, inverse):
    """The half of 64 columns whose loss w^2 / [H^-1]_jj is least becomes zero."""
    loss = columns**2 / inverse
    cut = np.sort(loss.ravel())[loss.size // 2]
    return lambda w, place, row: w * (loss[row, place] >= cut)


def two_of_four(columns, inverse):
    order = (columns**2 / inverse).argsort(axis=1)
    return lambda w, place, row: w * (place in order[row, 2:])


def four_bits(columns, inverse):
    scale = torch.tensor(np.abs(columns).max(axis=1) / 7).float().bfloat16().double().numpy()
    return lambda w, place, row: np.clip(np.rint(w / scale[row]), -7, 7) * scale[row]


def linear(weight):
    layer = nvembed.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(weight).float()
    return layer


def output_error(weight, new, gram):
    """|X (W - W')^T| / |X W^T| by X^T X."""
    apart, weight, gram = (torch.as_tensor(x).double() for x in (weight - new, weight, gram))
    return float((torch.trace(apart @ gram @ apart.T) / torch.trace(weight @ gram @ weight.T)).sqrt())


@pytest.mark.parametrize("kind", ("0.5", "2:4", "int4"))
def test_solver_equals_explicit_inverses(kind):
    weight, gram = problem()
    decide, group = {"0.5": (half, 64), "2:4": (two_of_four, 4), "int4": (four_bits, 64)}[kind]
    expected, plain = (
        brain_surgeon(weight, gram, group, decide),
        brain_surgeon(weight, np.eye(64), group, decide),
    )
    gram_ = torch.from_numpy(gram).float()
    if kind == "int4":
        ours = nvembed.quantize(linear(weight), gram_, kind).dense(torch.float32).numpy()
    else:
        ours = nvembed.prune(linear(weight), gram_, "sparsegpt", kind).weight.detach().numpy()
    assert np.abs(ours - expected).max() <= 2e-3 < 0.1 < np.abs(ours - plain).max()
    error = [output_error(weight, new, gram) for new in (ours, expected, plain)]
    assert error[0] == pytest.approx(error[1], rel=1e-2) and error[0] < 0.9 * error[2], error


def test_magnitude_and_wanda_by_hand():
    weight, gram = problem()
    gram_ = torch.from_numpy(gram).float()
    for method, score in (("magnitude", np.abs(weight)), ("wanda", np.abs(weight) * np.sqrt(np.diag(gram)))):
        ours = nvembed.prune(linear(weight), gram_, method, "0.25").weight.detach().numpy()
        expected = weight * (score >= np.sort(score, axis=1)[:, 16:17])
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert (nvembed.prune(linear(weight), gram_, "wanda", "0.25").weight.detach().numpy() != ours).sum() == 0
    other = nvembed.prune(linear(weight), gram_, "magnitude", "0.25").weight.detach().numpy()
    assert ((other == 0) != (ours == 0)).mean() > 0.05  # control: the two rules differ


def test_zeros_stay_zero_when_rounded():
    weight, gram = problem()
    layer = nvembed.prune(linear(weight), torch.from_numpy(gram).float(), "sparsegpt", "2:4")
    zeros = layer.weight.detach() == 0
    for form in nvembed.FORMATS:
        rounded = nvembed.quantize(layer, torch.from_numpy(gram).float(), form).dense(torch.float32)
        assert (rounded[zeros] == 0).all() and (rounded != 0).float().mean() > 0.4


@pytest.fixture(scope="module")
def real():
    """The first block of the default base's first layers: it, grams of training rows, and of others."""
    model = NVEmbed.from_pretrained(prepare.resolve("smollm2:8"))
    rows = prepare.read_rows(ROOT / "data" / "wikipedia_question.jsonl.gz")[:128]
    tokens = model.tokenize([row["pos"][0] for row in rows], "", 48)
    found = [next(nvembed.calibrated(model, part, 1024)) for part in (tokens[:96], tokens[96:])]
    names = [(part[name], name) for part, name in nvembed.projections(found[0][0]) if name[0] in "qogd"]
    return [
        (name, layer.weight.detach()[:192], found[0][1][layer], found[1][1][layer]) for layer, name in names
    ]


def test_layer_errors_on_the_default_base(real):
    """On texts that were not calibrated on, the relative output error of four projections' first rows."""
    worse, table = [], {}
    for name, weight, gram, other in real:
        found = {}
        for sparsity in ("0.5", "2:4"):
            for method in ("magnitude", "wanda", "sparsegpt"):
                new = nvembed.prune(linear(weight.numpy()), gram, method, sparsity).weight.detach()
                found[f"{method} {sparsity}"] = output_error(weight, new, other)
                zeros = (new == 0).view(len(new), -1, 4).sum(dim=-1)
                assert (zeros >= 2).all() == (sparsity == "2:4") and 0.5 <= (new == 0).float().mean() < 0.51
        for form in ("int4", "int8"):
            for rounding, by in (("nearest", torch.eye(len(gram))), ("gptq", gram)):
                new = nvembed.quantize(linear(weight.numpy()), by, form).dense(torch.float32)
                found[f"{rounding} {form}"] = output_error(weight, new, other)
        for better, base in (("sparsegpt", "magnitude"), ("sparsegpt", "wanda"), ("gptq", "nearest")):
            for kind in ("int4", "int8") if better == "gptq" else ("0.5", "2:4"):
                ratio = found[f"{better} {kind}"] / found[f"{base} {kind}"]
                worse.append(ratio >= (1 if base != "magnitude" else 0.9))
        table[name] = found
    print(json.dumps({n: {k: round(v, 4) for k, v in f.items()} for n, f in table.items()}, indent=1))
    assert not any(worse) and table["q_proj"]["gptq int8"] < 0.005 < table["q_proj"]["sparsegpt 0.5"]


# -------------------------------------------------------------------------------------------------- stage three


@pytest.fixture(scope="module")
def three(recipe, tmp_path_factory):  # noqa: F811
    """(recipe with a stage 3, finished stage 1)."""
    folder = tmp_path_factory.mktemp("three")
    found = json.loads(recipe.read_text())
    found["datasets"][0]["file"] = str(recipe.parent / "rows.jsonl")
    found["stages"]["3"] = (
        found["stages"]["1"] | SMALL | {"prune": "sparsegpt", "calibration": 16, "lr": 5e-3}
    )
    (folder / "recipe.json").write_text(json.dumps(found))
    code, _, err = command(folder / "recipe.json", "--out", folder / "stage1")
    assert code == 0, err
    return folder / "recipe.json", folder / "stage1"


def stage3(three, out, *flags):
    return command(three[0], "--stage", 3, "--init", three[1], "--out", out, *flags)


@pytest.fixture(scope="module")
def recovered(three, tmp_path_factory):
    run = tmp_path_factory.mktemp("recovered") / "run"
    code, _, err = stage3(three, run)
    assert code == 0, err
    return run


def weights(folder):
    found = load_file(folder / "model.safetensors")
    return {n: t for n, t in found.items() if n.split(".")[-2] in nvembed.PROJECTIONS}


@pytest.mark.parametrize("kind", ("lora", "full", "2:4"))
def test_masks_survive_recovery(three, recovered, kind, tmp_path):
    run = recovered if kind == "lora" else tmp_path / "run"
    flags = {"lora": [], "full": ["--lora-rank", 0, "--weight-decay", 0.1], "2:4": ["--sparsity", "2:4"]}[
        kind
    ]
    if kind != "lora":
        code, _, err = stage3(three, run, "--steps", 3, *flags)
        assert code == 0, err
    before, after = weights(run / "pruned"), weights(run)
    assert len(before) == 3 * 7
    for name, weight in before.items():
        zeros = weight == 0
        assert zeros.float().mean() == 0.5 and torch.equal(after[name] == 0, zeros)
        assert (after[name] != weight)[~zeros].float().mean() > 0.9  # it was trained
        if kind == "2:4":
            assert (zeros.view(len(zeros), -1, 4).sum(dim=-1) == 2).all()
    assert NVEmbed.from_pretrained(run).config.pruned and not (run / "adapter").exists()
    if kind == "lora":  # it learns
        losses = [line["loss"] for line in log(run)[1:]]
        assert sum(losses[-3:]) < sum(losses[:3])
    if kind == "full":  # controls: without its mask the adapted weight is filled, and so is a trained one
        free = NVEmbed.from_pretrained(run / "pruned", pruned=False)
        nvembed.add_lora(free, 4, 8, 0.0)
        layer = free.embedding_model.layers[0].mlp.up_proj
        torch.nn.init.normal_(layer.lora_B)
        assert (layer.merged() == 0).float().mean() < 0.01
        layer.masked = True
        assert (layer.merged() == 0).float().mean() == 0.5


@pytest.mark.parametrize("lora_rank", (4, 0))
def test_gradient_under_the_mask(three, recovered, lora_rank):
    """That of (W + s B A) * mask by autograd; nothing flows to what was pruned."""
    s = settings(**SMALL, lora_rank=lora_rank)
    model, _ = train.build(recovered / "pruned", s, "cpu")
    layer, x = model.embedding_model.layers[1].mlp.gate_proj, torch.randn(5, 64)
    if lora_rank:
        torch.nn.init.normal_(layer.lora_B)
    names = ("lora_A", "lora_B") if lora_rank else ("weight",)
    (layer.train()(x, x).pow(2).sum()).backward()
    copies = {n: getattr(layer, n).detach().clone().requires_grad_() for n in names}
    weight, mask = layer.weight.detach(), layer.weight.detach() != 0
    low = layer.lora_scale * copies["lora_B"] @ copies["lora_A"] if lora_rank else copies["weight"] - weight
    (x @ ((weight + low) * mask).T).pow(2).sum().backward()
    for name in names:
        torch.testing.assert_close(getattr(layer, name).grad, copies[name].grad)
    if not lora_rank:
        assert (layer.weight.grad[~mask] == 0).all() and (layer.weight.grad[mask] != 0).all()


def test_prune_only_and_depth(three, recovered, tmp_path):
    """--steps 0 writes the pruned model itself; --drop-blocks a model that has fewer blocks."""
    assert stage3(three, tmp_path / "pruned", "--steps", 0)[0] == 0
    ours, theirs = weights(tmp_path / "pruned"), weights(recovered / "pruned")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    code, _, err = stage3(three, tmp_path / "short", "--prune", "none", "--drop-blocks", 1, "--steps", 2)
    assert code == 0, err
    short = NVEmbed.from_pretrained(tmp_path / "short")
    assert short.config.num_hidden_layers == len(short.embedding_model.layers) == 2
    assert not short.config.pruned and len(weights(tmp_path / "short")) == 2 * 7
    assert len(short.encode(TEXTS)) == 3 and (tmp_path / "short" / "adapter").exists()


def test_the_block_that_does_nothing_is_dropped(base):
    model = NVEmbed.from_pretrained(base, pooling="mean")
    for part, name in nvembed.projections(model.embedding_model.layers[1]):
        if name in ("o_proj", "down_proj"):
            part[name].weight.data *= 1e-3
    before, layers = model.encode(TEXTS), list(model.embedding_model.layers)
    nvembed.drop_blocks(model, model.tokenize(TEXTS), 1)
    assert [*model.embedding_model.layers] == [layers[0], layers[2]]
    assert ((model.encode(TEXTS) * before).sum(axis=1) > 0.999).all()
    model.embedding_model.layers = torch.nn.ModuleList(layers[:2])  # control
    assert ((model.encode(TEXTS) * before).sum(axis=1) < 0.99).all()


def double_loop(e, t, batch, s):
    """The losses of distillation written out."""
    apart = sum(1 - x @ y for x, y in zip(e, t, strict=True)) / len(e)
    b, total = len(batch.valid), 0
    for i in range(b):
        p, q = (torch.softmax(torch.stack([x[i] @ d for d in x[b:]]) / s.temperature, 0) for x in (t, e))
        total = total + sum(a * torch.log(a / c) for a, c in zip(p, q, strict=True))
    return s.distill * (apart / s.temperature + total / b)


def test_distillation_equals_a_double_loop(base):
    s = settings(**SMALL | {"distill": 0.7})
    model, _ = train.build(base, s, "cpu")
    rows = some_rows(4)
    rows[1]["neg"] = rows[1]["neg"][:1]  # a short list: one document less
    batch = a_batch(model, rows, s)
    e, t = (
        torch.nn.functional.normalize(1 + 0.3 * torch.randn(len(batch.tokens), 8, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    e.requires_grad_()
    loss, (plain, _) = train.batch_loss(e, batch, s, t)[0], train.batch_loss(e, batch, s)
    expected = plain + double_loop(e, t, batch, s)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and loss > plain + 0.05
    (ours,), (theirs,) = (torch.autograd.grad(value, e, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert train.batch_loss(e, batch, s, e.detach())[0].item() == pytest.approx(plain.item(), abs=1e-12)


def test_distilled_gradient_on_two_ranks_and_cached(three, recovered, tmp_path):
    """Of a masked student: plain = cached = on two ranks whose numbers of texts differ."""
    s = settings(**SMALL | {"in_batch": True})
    model, _ = train.build(recovered / "pruned", s, "cpu")
    start = {n: p.detach().clone() for n, p in train.trained(model).items()}
    for n, p in start.items():
        if n.endswith("lora_B"):
            p.normal_(std=0.05)
    save_file(start, tmp_path / "start.safetensors")
    rows, found = batch_rows(), {}
    rows[0]["neg"] = rows[0]["neg"][:1]
    job = {"base": str(recovered / "pruned"), "teacher": str(three[1]), "rows": rows}
    for ranks in (1, 2):
        jobs = [job | {"settings": vars(s), "cached": cached} for cached in (False, True)]
        jobs += [job | {"settings": vars(s) | {"distill": 0.0}, "cached": True}]
        jobs = [j | {"out": f"{ranks}_{i}.safetensors"} for i, j in enumerate(jobs)]
        (tmp_path / "job.json").write_text(json.dumps(jobs))
        out, code = torchrun(ranks, ROOT / "tests" / "ranks.py", tmp_path)
        assert code == 0, out
        found |= {(ranks, i): load_file(tmp_path / j["out"]) for i, j in enumerate(jobs)}
    for key in ((1, 1), (2, 0), (2, 1)):
        assert worst(found[1, 0], found[key]) <= 3e-5, key
        torch.testing.assert_close(found[1, 0]["loss"], found[key]["loss"], rtol=1e-5, atol=0)
    assert found[1, 1]["forwards"] > found[1, 0]["forwards"]
    assert worst(found[1, 0], found[1, 2]) > 1e-2  # control: without the teacher


def test_resume_of_stage_three(three, recovered, tmp_path):
    """10 = 5 + 5, bit for bit; the second command does not prune again."""
    run, write_log = tmp_path / "run", train.write_log

    def killed(log, record):
        write_log(log, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_log", killed)
        with pytest.raises(KeyboardInterrupt):
            stage3(three, run)
    assert json.loads((train.checkpoint(run) / "state.json").read_text())["step"] == 4
    kept = os.stat(run / "pruned" / "model.safetensors").st_mtime_ns
    code, _, err = stage3(three, run)
    assert code == 0, err
    assert learned(run) == learned(recovered)
    assert os.stat(run / "pruned" / "model.safetensors").st_mtime_ns == kept
    assert "sparsity = '0.5', now '0.4'" in told(stage3(three, run, "--sparsity", "0.4"))


# ---------------------------------------------------------------------------------------------------- quantised


@pytest.fixture(scope="module")
def quantised(three, tmp_path_factory):
    """form -> (folder, embeddings of the same layers before they were saved)."""
    folder, found = tmp_path_factory.mktemp("quantised"), {}
    for form in nvembed.FORMATS:
        code, _, err = stage3(three, folder / form, "--quantize", form)
        assert code == 0, err
        model = train.load(str(three[1]), settings(), "cpu")
        tokens = model.tokenize(TEXTS)
        model.config = train.replace(model.config, quantize=form)
        nvembed.compress(model, tokens, lambda *layer: nvembed.quantize(*layer, form))  # noqa: B023
        model.save_pretrained(folder / f"{form} again", torch.float32)
        found[form] = (folder / form, folder / f"{form} again", model.encode(TEXTS))
    return found


@pytest.fixture(scope="module")
def fresh(quantised, tmp_path_factory):
    """form -> embeddings by a process that has only the folder."""
    out = tmp_path_factory.mktemp("fresh")
    code = "import sys, numpy, nvembed\nfor folder in sys.argv[1:]: "
    code += f"numpy.save(folder + '.npy', nvembed.NVEmbed.from_pretrained(folder).encode({TEXTS!r}))"
    folders = [again for _, again, _ in quantised.values()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *folders], env=env, check=True, cwd=out)
    return {form: np.load(f"{again}.npy") for form, (_, again, _) in quantised.items()}


@pytest.mark.parametrize("form", nvembed.FORMATS)
def test_saved_quantised_model_in_a_fresh_process(quantised, fresh, three, form):
    folder, _, expected = quantised[form]
    np.testing.assert_array_equal(fresh[form], expected)
    assert (
        np.abs(fresh[form] - fresh["int4" if form != "int4" else "int8"]).max() > 1e-4
    )  # control: others differ
    whole, ours = NVEmbed.from_pretrained(three[1]).encode(TEXTS), NVEmbed.from_pretrained(folder)
    cosine = (ours.encode(TEXTS) * whole).sum(axis=1)
    assert cosine.min() > (0.995 if form == "int4" else 0.9995) and (ours.encode(TEXTS) != whole).mean() > 0.5
    state = load_file(folder / "model.safetensors")
    codes = state["embedding_model.layers.0.mlp.down_proj.weight"]
    assert codes.dtype == (torch.float8_e4m3fn if "fp8" in form else torch.int8)
    assert codes.shape == (64, 48 if form == "int4" else 96)
    assert state["embedding_model.layers.0.mlp.down_proj.scale"].shape == (64, 1 if "-" in form else 3)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nvembed-x"
    in_bf16 = NVEmbed.from_pretrained(folder, dtype=torch.bfloat16).encode(TEXTS)
    assert ((in_bf16 * whole).sum(axis=1) > 0.99).all()


def test_truncated_and_mismatched_files(quantised, three, tmp_path):
    def changed(form, **text):
        folder = tmp_path / f"{form}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(quantised[form][0], folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= text
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    cut = changed("int8")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    folders = {
        cut: "expected whole safetensors",
        changed("int8", quantize="int4"): "size mismatch",
        changed("int8", quantize="int8-dynamic"): "size mismatch",
        changed("int8-dynamic", quantize="fp8-dynamic"): "expected torch.float8_e4m3fn (fp8-dynamic)",
        changed("fp8-dynamic", quantize="int8-dynamic"): "expected torch.int8 (int8-dynamic)",
        changed("int8", quantize=None): "expected torch.float32 (None), got torch.int8",
        changed("int8", quantize="int3"): "field 'quantize': expected one of (None, 'int8'",
    }
    dense = tmp_path / "dense"
    shutil.copytree(three[1], dense)
    config = json.loads((dense / "config.json").read_text())
    config["text_config"]["quantize"] = "int8"
    (dense / "config.json").write_text(json.dumps(config))
    for folder, message in (folders | {dense: "expected torch.int8 (int8)"}).items():
        with pytest.raises(InputError) as error:
            NVEmbed.from_pretrained(folder)
        assert message in str(error.value) and str(folder) in str(error.value), error.value
        assert "\n" not in str(error.value)
    assert len(NVEmbed.from_pretrained(changed("int8")).encode(TEXTS)) == 3  # control: unchanged it loads


def test_hardware_without_the_product(quantised, monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("no such kernel here")

    for form, name in (("int8-dynamic", "_int_mm"), ("fp8-dynamic", "_scaled_mm")):
        with (
            monkeypatch.context() as patch,
            pytest.raises(InputError, match=f"{form} on cpu: no such kernel"),
        ):
            patch.setattr(torch, name, missing)
            NVEmbed.from_pretrained(quantised[form][0])
        assert NVEmbed.from_pretrained(quantised[form][0])


def test_dynamic_products_are_those_of_the_codes():
    torch.manual_seed(0)
    layer, x = linear(np.random.default_rng(0).standard_normal((48, 32))), torch.randn(37, 32)
    layer.bias = torch.nn.Parameter(torch.randn(48))
    for form, bound in (("int8-dynamic", 0.01), ("fp8-dynamic", 0.04)):
        ours = nvembed.quantize(layer, torch.eye(32), form)
        out, exact = ours(x), x @ layer.weight.T + layer.bias
        assert out.shape == exact.shape
        error = float((out - exact).norm() / exact.norm())
        rounded = float((ours.dense(torch.float32) - layer.weight).norm() / layer.weight.norm())
        assert rounded / 2 < error < bound, (form, error, rounded)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune", "smallest"], "prune: expected magnitude, wanda or sparsegpt, 0.x or 2:4, got smallest"),
        (["--sparsity", "3:4"], "got sparsegpt, 3:4"),
        (["--sparsity", "1.5"], "got sparsegpt, 1.5"),
        (["--calibration", 0], "calibration: expected at least 1 row to prune by, got 0"),
        (["--drop-blocks", 3], "drop_blocks: expected less than the 3 blocks, got 3"),
        (["--quantize", "int3"], "field 'quantize': expected one of (None, 'int8'"),
        (["--lora-dropout", 0.1], "lora_dropout: expected 0"),
        (["--calibration", -5], "calibration: expected at least 1 row to prune by, got -5"),
        (
            ["--quantize", "int8", "--calibration", 0, "--drop-blocks", 1],
            "calibration: expected at least 1 row",
        ),
        (["--quantize", "int8", "--drop-blocks", 99], "drop_blocks: expected less than the 3 blocks, got 99"),
    ],
)
def test_bad_settings(three, tmp_path, flags, message):
    result = stage3(three, tmp_path / "run", *flags)
    lines = [line for line in result[2].splitlines() if line.startswith("error:")]
    assert result[0] == 2 and len(lines) == 1 and message in lines[0], result[2]
    assert not (tmp_path / "run" / "config.json").exists()


def test_runs_are_not_overwritten_and_codes_not_trained(three, quantised, tmp_path):
    assert "is a training run" in told(
        command(three[0], "--stage", 3, "--init", three[1], "--quantize", "int8", "--out", three[1])
    )
    result = command(three[0], "--init", quantised["int8"][0], "--out", tmp_path / "run")
    assert "expected plain weights" in told(result)
    adapted = NVEmbed.from_pretrained(three[1])
    nvembed.add_lora(adapted, 4, 8, 0.0)
    nvembed.save_adapter(adapted, tmp_path / "adapter", str(three[1]))
    shutil.copy(three[1] / "tokenizer.json", tmp_path / "adapter")
    result = stage3(three, tmp_path / "pruned", "--init", tmp_path / "adapter")
    assert "expected plain weights" in told(result)


# ------------------------------------------------------------------------------------------------- for an index


def vectors(count, dims=256, seed=0):
    """Unit vectors around 40 centres, with a spectrum that falls, as embeddings have."""
    rng = np.random.default_rng(seed)
    x = np.random.default_rng(1).standard_normal((40, dims))[rng.integers(40, size=count)]
    x = (x + 0.8 * rng.standard_normal((count, dims))) / (1 + np.arange(dims)) ** 0.25
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def best(queries, documents, k):
    return (queries @ documents.T).argsort(axis=1)[:, ::-1][:, :k]


def recall(found, exact):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)])


def test_int8_embeddings_are_within_half_a_step():
    x = vectors(500)
    codes = nvembed.compact(x, "int8")
    assert codes.dtype == np.int8 and (np.abs(codes).max(axis=1) == 127).all()
    top = np.abs(x).max(axis=1, keepdims=True)
    assert np.abs(codes * (top / 127) - x).max() <= (top / 254).max() * 1.001
    back = codes / np.linalg.norm(codes.astype(np.float32), axis=1, keepdims=True)
    cosine, bound = (back * x).sum(axis=1), 1 - 256 * (top[:, 0] / 254) ** 2
    assert (cosine >= bound).all() and 0.9995 < cosine.min() < 1 - 1e-7
    short = nvembed.compact(x, "int8", 64)
    assert short.shape == (500, 64) and nvembed.compact(x, "binary", 64).shape == (500, 8)
    ours = short / np.linalg.norm(short.astype(np.float32), axis=1, keepdims=True)
    first = x[:, :64] / np.linalg.norm(x[:, :64], axis=1, keepdims=True)
    assert (ours * first).sum(axis=1).min() > 0.999


def test_binary_search_with_rescoring():
    documents, queries = vectors(3000), vectors(100, seed=2)
    exact, bits = best(queries, documents, 10), nvembed.compact(documents, "binary")
    assert bits.dtype == np.uint8 and bits.nbytes * 32 == documents.nbytes
    found = {
        f: nvembed.rescored(queries, bits, nvembed.compact(documents, "int8"), 10, f) for f in (1, 4, 16)
    }
    recalls = {f: recall(ids, exact) for f, (_, ids) in found.items()}
    print("recall@10 of binary search by how many times k are rescored:", recalls)
    assert (
        recalls[1] < recalls[4] < recalls[16] and recalls[4] > 0.7 and recalls[16] > 0.97 and recalls[1] < 0.6
    )
    scores, ids = found[16]
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ documents.T, ids, axis=1), atol=2e-3)
    short = [nvembed.compact(documents, form, 128) for form in ("binary", "int8")]
    assert recall(nvembed.rescored(queries, *short, 10, 16)[1], exact) > 0.5
    assert nvembed.rescored(queries, bits[:4], documents[:4], 10)[1].shape == (100, 4)
    assert (nvembed.compact(np.zeros((2, 8), np.float32), "int8") == 0).all()
    with pytest.raises(KeyError):
        nvembed.compact(documents, "int4")
    whole, everything = nvembed.rescored(queries, bits, documents, 10, 300)  # all of them: exact search
    assert recall(everything, exact) == 1 and whole.shape == (100, 10)


# --------------------------------------------------------------------------------------------------------- cost


def test_cost_stands_beside_the_scores(quantised, three):
    found = {}
    for name, folder in (("whole", three[1]), ("int4", quantised["int4"][0])):
        found[name] = evaluation.cost(evaluation.Encoder(str(folder), dtype="float32"))
        files = os.path.getsize(Path(folder) / "model.safetensors")
        assert found[name]["MB on disk"] == f"{files / 1e6:,.1f}"
        assert float(found[name]["ms alone"]) > 0 and float(found[name]["tokens/s"].replace(",", "")) > 100
    sizes = {
        name: [float(column[x]) for x in ("MB on disk", "MB in memory")] for name, column in found.items()
    }
    assert sizes["int4"][0] < sizes["whole"][0] and sizes["int4"][1] < sizes["whole"][1]
    tasks = evaluation.find_tasks("local", "sts", 5)
    scores = {
        n: {"t": np.full((1, 3), x), "mean": np.full((1, 3), x)} for n, x in (("whole", 60.0), ("int4", 59.0))
    }
    lines = evaluation.table(tasks[:1], scores, {}, True, found).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["run", "mean", *found["whole"]]
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row == ["int4", "59.00", *found["int4"].values()]
