"""Compression: methods by hand, layer errors on the default base, depth, the command."""

import contextlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import SMALL, some_rows
from safetensors.torch import load_file

import nvembed
from data.base import resolve
from data.commands import InputError, run_command
from data.card import PROMPTS
from data.files import read_json, write_json, write_rows
from data.rows import read_rows
from experiments import compress
from nvembed import NVEmbed

TEXTS = [
    "river stone engine paper",
    "doctor bread",
    "a letter from the island in winter, with music",
]


# ---- methods


@pytest.fixture(scope="module")
def problem():
    """A layer's weight (12, 64) and X^T X of correlated inputs."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((64, 64)) * np.linspace(0.1, 2, 64)
    x = rng.standard_normal((400, 64)) @ mixing
    weight = rng.standard_normal((12, 64))
    return torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x).float()


def pruned(weight, gram, method, sparsity):
    return compress.prune(weight, gram, method, compress.read_sparsity(sparsity))


def test_magnitude_and_wanda_by_hand(problem):
    weight, gram = problem
    found = {}
    scores = {"magnitude": weight.abs(), "wanda": weight.abs() * gram.diagonal().sqrt()}
    for method, score in scores.items():
        threshold = score.sort(dim=1).values[:, 16:17]
        expected = weight * (score >= threshold)
        found[method] = pruned(weight, gram, method, "0.25")
        torch.testing.assert_close(found[method], expected, rtol=1e-6, atol=0)
    differ = (found["magnitude"] == 0) != (found["wanda"] == 0)
    assert differ.float().mean() > 0.05  # control: the two rules differ


@pytest.mark.parametrize("method", compress.METHODS)
def test_two_of_four(problem, method):
    weight, gram = problem
    zeros = (pruned(weight, gram, method, "2:4") == 0).view(12, 16, 4).sum(dim=-1)
    assert (zeros == 2).all()
    zeros = (pruned(weight, gram, method, "0.5") == 0).view(12, 16, 4).sum(dim=-1)
    assert zeros.sum() == 12 * 32 and (zeros != 2).any()  # control


def test_dtype_and_zeros_are_kept(problem):
    weight, gram = problem
    new = pruned(weight.bfloat16(), gram, "sparsegpt", "0.75")
    assert new.dtype == torch.bfloat16 and (new == 0).float().mean() == 0.75


def test_inputs_that_were_never_read(problem):
    """A gram of zeros has no inverse, but its damped form has."""
    weight, _ = problem
    new = pruned(weight, torch.zeros(64, 64), "sparsegpt", "0.5")
    assert new.isfinite().all() and (new == 0).float().mean() == 0.5


@pytest.mark.parametrize("text", ("0", "1", "1.5", "-0.5", "nan", "3:4", "half", ""))
def test_bad_sparsity(text):
    with pytest.raises(InputError, match="expected a share between 0 and 1, or 2:4, got"):
        compress.read_sparsity(text)
    assert compress.read_sparsity(".5") == (0.5, None)
    assert compress.read_sparsity("2:4") == (0.5, 4)


# ---- the default base


def output_error(weight, new, gram):
    """|X (W - W')^T| / |X W^T|, by X^T X."""
    apart, weight, gram = (weight - new).double(), weight.double(), gram.double()
    squares = torch.trace(apart @ gram @ apart.T) / torch.trace(weight @ gram @ weight.T)
    return float(squares.sqrt())


@pytest.fixture(scope="module")
def first_block():
    """Of the default base's first block: name, rows of the weight, grams of texts and of others."""
    model = NVEmbed.from_pretrained(resolve("smollm2:8"))
    rows = read_rows(ROOT / "data" / "wikipedia_question.jsonl.gz")[:128]
    tokens = model.tokenize([row["pos"][0] for row in rows], "", 48)
    block = model.embedding_model.layers[0]
    with torch.no_grad():
        gram = compress.input_grams(block, compress.embed(model, tokens[:96]))
        other = compress.input_grams(block, compress.embed(model, tokens[96:]))
    layers = compress.projections(block)
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return [(name, layers[name].weight[:192], gram[name], other[name]) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ("0.5", "2:4"))
def test_layer_errors_on_the_default_base(first_block, sparsity):
    """The relative output error on texts that were not calibrated on: SparseGPT's is the least."""
    table = {}
    for name, weight, gram, other in first_block:
        errors = {}
        for method in compress.METHODS:
            new = pruned(weight, gram, method, sparsity)
            errors[method] = output_error(weight, new, other)
            zeros = (new == 0).view(len(new), -1, 4).sum(dim=-1)
            assert (zeros >= 2).all() == (sparsity == "2:4")
            assert 0.5 <= (new == 0).float().mean() < 0.51
        table[name] = {method: round(error, 4) for method, error in errors.items()}
        assert errors["sparsegpt"] < errors["wanda"] and errors["sparsegpt"] > 0.005, table
        assert errors["sparsegpt"] < 0.9 * errors["magnitude"], table
    print(json.dumps(table, indent=1))


def test_grams_are_those_of_the_inputs(base):
    model = NVEmbed.from_pretrained(base)
    block = model.embedding_model.layers[0]
    tokens = model.tokenize(TEXTS)
    inputs = []
    block.mlp.up_proj.register_forward_hook(lambda layer, args, out: inputs.append(args[0]))
    batches = compress.embed(model, tokens)
    with torch.no_grad():
        grams = compress.input_grams(block, batches)
    x = torch.cat(inputs)
    assert len(grams) == 7 and len(x) == sum(len(text.ids) for text in tokens)
    torch.testing.assert_close(grams["mlp.up_proj"], x.T @ x)
    torch.testing.assert_close(grams["mlp.gate_proj"], x.T @ x)
    assert not block.mlp.up_proj._forward_pre_hooks


def test_blocks_in_turn_are_the_decoder(base):
    model = NVEmbed.from_pretrained(base)
    (batch,) = batches = compress.embed(model, model.tokenize(TEXTS))
    for block in model.embedding_model.layers:
        batches = compress.run_block(block, batches)
    tokens = sorted(model.tokenize(TEXTS), key=lambda text: -len(text.ids))
    ids = torch.tensor([i for text in tokens for i in text.ids])
    expected = model.embedding_model(ids, batch.lengths, torch.float32)
    assert torch.equal(model.embedding_model.norm(batches[0].hidden), expected)


# ---- depth


def test_the_block_that_does_nothing_is_dropped(base):
    model = NVEmbed.from_pretrained(base, pooling="mean")
    block = model.embedding_model.layers[1]
    block.self_attn.o_proj.weight.data *= 1e-3
    block.mlp.down_proj.weight.data *= 1e-3
    before, layers = model.encode(TEXTS), list(model.embedding_model.layers)
    compress.drop_blocks(model, model.tokenize(TEXTS), 1)
    assert [*model.embedding_model.layers] == [layers[0], layers[2]]
    assert model.config.num_hidden_layers == 2
    assert ((model.encode(TEXTS) * before).sum(axis=1) > 0.999).all()
    model.embedding_model.layers = torch.nn.ModuleList(layers[:2])  # control
    assert ((model.encode(TEXTS) * before).sum(axis=1) < 0.99).all()


# ---- the command


@pytest.fixture(scope="module")
def recipe(recipe, tmp_path_factory):
    """The recipe of all tests with a stage 3."""
    found = json.loads(recipe.read_text())
    found["datasets"][0]["file"] = str(recipe.parent / "rows.jsonl")
    found["stages"]["3"] = SMALL | {"lora_rank": 0}
    path = tmp_path_factory.mktemp("compress") / "recipe.json"
    path.write_text(json.dumps(found))
    return path


def command(recipe, model, out, *flags):
    """experiments/compress.py in this process -> (exit status, stdout, stderr)."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    arguments = ["--recipe", recipe, "--model", model, "--out", out, "--calibration", 16, *flags]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["compress.py", *map(str, arguments)])
        try:
            run_command(compress.main)
        except SystemExit as error:
            code = error.code
    return code, stdout.getvalue(), stderr.getvalue()


def weights(folder):
    """The decoder's projections in a model folder."""
    found = load_file(folder / "model.safetensors")
    return {name: t for name, t in found.items() if name.split(".")[-2] in nvembed.PROJECTIONS}


@pytest.mark.parametrize("flags", ((), ("--sparsity", "2:4"), ("--prune", "wanda")))
def test_pruned_folder(recipe, base, tmp_path, flags):
    code, out, err = command(recipe, base, tmp_path / "pruned", *flags)
    assert code == 0, err
    assert "3 blocks, 50.0% of their weights are zero" in out
    whole = NVEmbed.from_pretrained(base)
    whole.save_pretrained(tmp_path / "whole", torch.float32)
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "pruned")
    assert len(after) == 3 * 7 and before.keys() == after.keys()
    for name, weight in after.items():
        zeros = weight == 0
        assert zeros.float().mean() == 0.5 and not (before[name] == 0).any()
        if "2:4" in flags:
            assert (zeros.view(len(zeros), -1, 4).sum(dim=-1) == 2).all()
        moved = (weight != before[name])[~zeros].float().mean()
        assert moved == 0 if "wanda" in flags else moved > 0.9  # SparseGPT makes up for the zeros
    embeddings = NVEmbed.from_pretrained(tmp_path / "pruned").encode(TEXTS)
    cosines = (embeddings * whole.encode(TEXTS)).sum(axis=1)
    assert (cosines > 0.3).all() and (cosines < 0.999).all()


def test_same_seed_same_weights(recipe, base, tmp_path):
    for name, flags in (("one", ()), ("two", ()), ("three", ("--seed", 1))):
        assert command(recipe, base, tmp_path / name, *flags)[0] == 0
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], three[name]) for name in one)  # other rows were read


def test_fewer_blocks(recipe, base, tmp_path):
    out = tmp_path / "short"
    flags = ("--prune", "none", "--drop-blocks", 1)
    code, stdout, err = command(recipe, base, out, *flags)
    assert code == 0, err
    assert "2 blocks, 0.0% of their weights are zero" in stdout
    short = NVEmbed.from_pretrained(out)
    assert short.config.num_hidden_layers == len(short.embedding_model.layers) == 2
    assert len(weights(out)) == 2 * 7 and len(short.encode(TEXTS)) == 3


def test_settings_of_the_recipe_and_flags(recipe, base, tmp_path):
    assert command(recipe, base, tmp_path / "half", "--export-dtype", "float16")[0] == 0
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.float16}
    assert command(recipe, base, tmp_path / "whole")[0] == 0
    assert {t.dtype for t in weights(tmp_path / "whole").values()} == {torch.float32}
    zeros = [t == 0 for t in weights(tmp_path / "half").values()]
    theirs = [t == 0 for t in weights(tmp_path / "whole").values()]
    assert all(torch.equal(a, b) for a, b in zip(zeros, theirs, strict=True))
    found = json.loads(recipe.read_text())
    found["stages"]["3"]["export_dtype"] = "float8"
    (tmp_path / "recipe.json").write_text(json.dumps(found))
    code, _, err = command(tmp_path / "recipe.json", base, tmp_path / "out")
    assert code == 2 and "export_dtype: expected one of ('auto', 'float32'" in err
    found["stages"]["3"] |= {"export_dtype": "auto", "dtype": "bfloat16"}  # as it computes
    (tmp_path / "recipe.json").write_text(json.dumps(found))
    assert command(tmp_path / "recipe.json", base, tmp_path / "auto")[0] == 0
    assert {t.dtype for t in weights(tmp_path / "auto").values()} == {torch.bfloat16}


def test_the_prompts_of_the_model_are_kept(recipe, base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    prompts = {"query": "Instruct: Find it\nQuery: ", "document": ""}
    write_json(model / PROMPTS, {"prompts": prompts})
    assert command(recipe, model, tmp_path / "out", "--prune", "magnitude")[0] == 0
    assert read_json(tmp_path / "out" / PROMPTS)["prompts"] == prompts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "3:4"], "--sparsity: expected a share between 0 and 1, or 2:4, got 3:4"),
        (["--sparsity", "1.5"], "--sparsity: expected a share between 0 and 1, or 2:4, got 1.5"),
        (["--calibration", 0], "--calibration: expected a number in [1, inf), got 0"),
        (["--calibration", -5], "--calibration: expected a number in [1, inf), got -5"),
        (["--drop-blocks", 3], "--drop-blocks: expected less than the 3 blocks, got 3"),
        (["--drop-blocks", -1], "--drop-blocks: expected a number in [0, inf), got -1"),
        (["--prune", "none"], "--prune none: expected --drop-blocks, or nothing is compressed"),
        (["--max-length", 4], "max_length 4: tokens ["),
    ],
)
def test_bad_settings(recipe, base, tmp_path, flags, message):
    code, _, err = command(recipe, base, tmp_path / "out", *flags)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "out").exists()


def test_no_folder_of_others_is_written_over(recipe, base, tmp_path):
    """Not the model itself, by any name, nor a folder with other files; a second time its own."""
    model = shutil.copytree(base, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = ("--prune", "magnitude")
    for out, message in (("model", "overwrite the model"), ("link", "overwrite the model")):
        code, _, err = command(recipe, model, tmp_path / out, *flags)
        assert code == 2 and message in err
    code, _, err = command(recipe, model, tmp_path / "mine", *flags)
    assert code == 2 and "one of this command, found config.json" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for _ in range(2):
        code, _, err = command(recipe, model, tmp_path / "out", *flags)
        assert code == 0, err


def test_a_file_is_no_folder_to_write(recipe, base, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, _, err = command(recipe, base, tmp_path / "out", "--prune", "magnitude")
    assert code == 2 and err == f"error: --out {tmp_path}/out: expected a folder, got a file\n"
    assert (tmp_path / "out").read_text() == "mine"


def test_rows_without_negatives_or_scores(recipe, base, tmp_path):
    """Training needs them, in mined rows; their texts are calibrated on as they are."""
    found = json.loads(recipe.read_text())
    write_rows(tmp_path / "rows.jsonl", some_rows(16, negatives=0))
    found["datasets"][0]["file"] = str(tmp_path / "rows.jsonl")
    found["stages"]["3"] |= {"in_batch": False, "kd": 1.0}
    (tmp_path / "recipe.json").write_text(json.dumps(found))
    code, out, err = command(tmp_path / "recipe.json", base, tmp_path / "out", "--prune", "wanda")
    assert code == 0 and "50.0% of their weights are zero" in out, err


def test_unknown_method(recipe, base, tmp_path):
    code, _, err = command(recipe, base, tmp_path / "out", "--prune", "smallest")
    assert code == 2 and "--prune: invalid choice: 'smallest'" in err


def test_runs_are_not_overwritten(recipe, base, tmp_path):
    (tmp_path / "latest").write_text("step_000002\n")
    code, _, err = command(recipe, base, tmp_path)
    assert code == 2 and f"error: --out {tmp_path}: expected a new folder, an empty one" in err
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_no_run_yet(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(recipe, "runs/stage2", tmp_path / "out")
    assert code == 2 and "error: runs/stage2: no finished run; run train.py --stage 2 first" in err


def test_adapters_are_refused(recipe, base, tmp_path):
    adapted = NVEmbed.from_pretrained(base)
    nvembed.add_lora(adapted, 4, 8, 0.0)
    nvembed.save_adapter(adapted, tmp_path / "adapter", str(base))
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    code, _, err = command(recipe, tmp_path / "adapter", tmp_path / "out")
    assert code == 2 and f"error: {tmp_path / 'adapter'}: expected plain weights" in err


def test_states_that_overflow(recipe, base, tmp_path):
    model = NVEmbed.from_pretrained(base)
    mlp = model.embedding_model.layers[1].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight.data[0] = 1e30  # finite, but the product of the two outputs is not
    model.save_pretrained(tmp_path / "broken", torch.float32)
    code, _, err = command(recipe, tmp_path / "broken", tmp_path / "out")
    assert code == 2 and "layers.1.mlp.down_proj: its inputs are not finite" in err


def test_a_mistake_of_ours_shows_its_traceback(recipe, base, tmp_path, monkeypatch):
    def broken(*arguments):
        return undefined_name  # noqa: F821

    monkeypatch.setattr(compress, "prune", broken)
    with pytest.raises(NameError, match="undefined_name"):
        command(recipe, base, tmp_path / "out")

    def refused(*arguments):  # control: bad input is one line and no traceback
        raise InputError("weight: expected another one")

    monkeypatch.setattr(compress, "prune", refused)
    code, _, err = command(recipe, base, tmp_path / "out")
    assert code == 2 and "error: weight: expected another one" in err and "Traceback" not in err
