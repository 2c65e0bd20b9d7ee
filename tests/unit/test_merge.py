"""experiments/merge.py: tensors by hand, whole models against a plain loop, what is refused."""

import contextlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.commands import run_command
from data.dialects import content_hash
from data.folders import read_weights
from experiments import ablate, merge
from nvembed import NVEmbed

TEXTS = ["a river", "the doctor's letter", "music of the winter"]


def command(*args):
    """merge.py in this process -> (exit status, stdout, stderr without bars)."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["merge.py", *map(str, args)])
        try:
            run_command(merge.main)
        except SystemExit as error:
            code = error.code
    lines = [line for line in err.getvalue().splitlines() if line and "%|" not in line]
    return code, out.getvalue(), lines


def refused(*args):
    code, _, lines = command(*args)
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


def merged(*args):
    code, out, lines = command(*args)
    assert code == 0, lines
    return out


def similar(folder, model, seed, scale=0.1):
    """A copy of a model whose weights are moved at random, as another seed's would be."""
    torch.manual_seed(seed)
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        moved = {
            name: (t + scale * t.float().std().nan_to_num() * torch.randn(t.shape)).to(t.dtype)
            for name, t in tensors.items()
        }
        save_file(moved, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(released, tmp_path_factory):
    """Three models of one config, in fp32; the first is as a released one, in three files."""
    folder = tmp_path_factory.mktemp("models")
    return [similar(folder / f"m{seed}", released, seed) for seed in range(3)]


# ---- tensors


def test_mean_of_planted_tensors():
    a, b, c = (torch.tensor(x) for x in ([1.0, -2.0, 0.0], [3.0, 6.0, 0.0], [8.0, -4.0, 3.0]))
    assert merge.mean([a, b], [1, 1]).tolist() == [2, 2, 0]
    assert merge.mean([a, b], [1, 3]).tolist() == [2.5, 4, 0]
    assert merge.mean([a, b, c], [1, 1, 1]).tolist() == pytest.approx([4, 0, 1], abs=1e-6)
    assert merge.mean([a, b, c], [0, 0, 2]).tolist() == c.tolist()
    assert merge.mean([a, b, c], [2, 0, 0]).tolist() == a.tolist()
    assert merge.mean([a, b, c], [0, 5, 0]).tolist() == b.tolist()


def test_mean_is_in_fp32():
    """Of bf16 tensors too: their own sums would round each step."""
    torch.manual_seed(0)
    tensors = [torch.randn(1000).bfloat16() for _ in range(7)]
    expected = torch.stack([t.double() for t in tensors]).mean(dim=0)
    found = merge.mean(tensors, [1.0] * 7)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-6
    assert (torch.stack(tensors).mean(dim=0) - expected).abs().max() > 1e-4  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_equal_tensors_is_that_tensor(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(10000).to(dtype)
    found = merge.mean([tensor] * 7, [0.3, 1.7, 0.1, 5.0, 0.7, 1.0, 2.0])
    assert torch.equal(found, tensor.float())
    naive = sum(tensor.float() * (1 / 7) for _ in range(7))
    assert not torch.equal(naive, tensor.float())  # control


def test_slerp_of_known_vectors():
    """A right angle, 60 degrees, other lengths; t = 0, 1, 1/2, 1/3."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    half = 0.5**0.5
    assert merge.slerp([a, b], [1, 0]).tolist() == [1, 0]
    assert merge.slerp([a, b], [0, 1]).tolist() == [0, 1]
    assert merge.slerp([a, b], [1, 1]).tolist() == pytest.approx([half, half], abs=1e-7)
    third = merge.slerp([a, b], [2, 1]).tolist()
    assert third == pytest.approx([np.cos(np.pi / 6), np.sin(np.pi / 6)], abs=1e-7)
    c = torch.tensor([0.5, 0.75**0.5])
    middle = merge.slerp([a, c], [1, 1]).tolist()
    assert middle == pytest.approx([np.cos(np.pi / 6), np.sin(np.pi / 6)], abs=1e-7)
    long = merge.slerp([2 * a, 4 * b], [1, 1]).tolist()
    assert long == pytest.approx([2 * half, 4 * half], abs=1e-6)


@pytest.mark.parametrize("noise", [3.0, 0.3, 0.03, 0.003, 0.0003])
def test_slerp_is_the_formula(noise):
    """In float64, on a matrix read as one vector; also where it gives way to the mean."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 25))
    b = a + noise * rng.standard_normal((40, 25))
    a, b = a.astype(np.float32), b.astype(np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    angle = np.arccos((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    for t in (0, 0.25, 0.5, 1):
        expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
        found = merge.slerp([torch.from_numpy(a), torch.from_numpy(b)], [1 - t, t]).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    mean = (x + y) / 2
    found = merge.slerp([torch.from_numpy(a), torch.from_numpy(b)], [1, 1]).numpy()
    assert (np.abs(found - mean).max() > 1e-3) == (noise > 0.1)  # control


def test_slerp_where_there_is_no_arc():
    a, zero = torch.tensor([1.0, 2.0]), torch.zeros(2)
    assert torch.equal(merge.slerp([a, a], [1, 2]), a)
    assert merge.slerp([a, 3 * a], [1, 1]).tolist() == [2, 4]  # parallel
    assert merge.slerp([a, -3 * a], [1, 1]).tolist() == [-1, -2]  # opposite
    assert merge.slerp([a, zero], [1, 1]).tolist() == [0.5, 1]
    assert merge.slerp([zero, zero], [1, 1]).tolist() == [0, 0]


# ---- whole models


def state(folder):
    return read_weights(folder, "cpu", torch.float32)


def test_a_model_with_itself_is_itself(models, tmp_path):
    for method, names in (("mean", [models[0]] * 3), ("slerp", [models[0]] * 2)):
        out = tmp_path / method
        merged(*names, "--out", out, "--method", method)
        before, after = state(models[0]), state(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    other = state(models[1])
    assert not any(torch.equal(before[name], other[name]) for name in before)  # control


@pytest.mark.parametrize("weights", [(), (1, 1, 2), (0.2, 0.5, 0.3)])
def test_mean_of_models_is_a_plain_loop(models, tmp_path, weights):
    flags = ("--weights", *weights) if weights else ()
    out = merged(*models, "--out", tmp_path / "out", *flags)
    share = np.array(weights or (1, 1, 1), float)
    share /= share.sum()
    states = [state(model) for model in models]
    found = state(tmp_path / "out")
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        expected = sum(w * s[name].double() for w, s in zip(share, states, strict=True))
        assert (tensor - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert (tensor - states[0][name]).abs().max() > 1e-3 * expected.abs().max()  # control
    assert out.startswith(f"{tmp_path / 'out'}: mean of {models[0]}, ")


def test_slerp_of_models_is_a_plain_loop(models, tmp_path):
    merged(*models[:2], "--out", tmp_path / "out", "--method", "slerp", "--weights", 1, 3)
    a, b, found = (state(folder) for folder in (*models[:2], tmp_path / "out"))
    for name, tensor in found.items():
        x, y = a[name].double().numpy(), b[name].double().numpy()
        angle = np.arccos((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
        expected = (np.sin(0.25 * angle) * x + np.sin(0.75 * angle) * y) / np.sin(angle)
        assert np.abs(tensor.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_merged_folder_is_a_model(models, released, tmp_path, monkeypatch):
    """In the released layout: transformers-like reference and NVEmbed embed the same from it."""
    monkeypatch.chdir(tmp_path)
    merged(*models[:2], "--out", "ab", "--weights", 1, 3)
    vectors = [NVEmbed.from_pretrained(m).encode(TEXTS, "Find it") for m in (*models[:2], "ab")]
    assert np.isfinite(vectors[2]).all()
    cosines = [(vectors[2] * other).sum(axis=1) for other in vectors[:2]]
    assert (cosines[1] > cosines[0]).all() and (cosines[1] < 0.99999).all()  # nearer to the heavy
    config = json.loads((tmp_path / "ab/config.json").read_text())
    assert config["model_type"] == "nvembed"
    original = json.loads((models[0] / "tokenizer.json").read_text())
    assert json.loads((tmp_path / "ab/tokenizer.json").read_text())["model"] == original["model"]
    made = json.loads((tmp_path / "ab/merge.json").read_text())
    hashes = [[str(model), content_hash(model)] for model in models[:2]]
    assert made == {"models": hashes, "method": "mean", "weights": [1.0, 3.0]}
    merged("ab", models[2], "--out", "abc")  # what was merged can be merged


def test_the_prompts_of_the_first_model(models, tmp_path):
    """A run has its recipe's; a released model has no such file, and then they are empty."""
    one, two = (shutil.copytree(model, tmp_path / model.name) for model in models[:2])
    name = "config_sentence_transformers.json"
    prompts = {"query": "Instruct: Find it\nQuery: ", "document": ""}
    (one / name).write_text(json.dumps({"prompts": prompts, "similarity_fn_name": "cosine"}))
    for folders, expected in (((one, two), prompts), ((two, one), {"query": "", "document": ""})):
        out = tmp_path / f"merged {folders[0].name}"
        merged(*folders, "--out", out)
        found = json.loads((out / name).read_text())
        assert found["prompts"] == expected
        assert found["similarity_fn_name"] == "cosine"
        NVEmbed.from_pretrained(out)


def test_dtypes(models, tmp_path):
    merged(*models[:2], "--out", tmp_path / "own")
    merged(*models[:2], "--out", tmp_path / "half", "--export-dtype", "bfloat16")
    half = load_file(tmp_path / "half/model.safetensors")
    own = load_file(tmp_path / "own/model.safetensors")
    assert {t.dtype for t in own.values()} == {t.dtype for t in state_dtypes(models[0])}
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    assert all(torch.equal(t.bfloat16(), half[name]) for name, t in own.items())  # rounded once


def state_dtypes(folder):
    return read_weights(folder, None, None).values()


def test_the_seeds_of_a_cell(models, tmp_path):
    """The command of the docstring: a cell's runs are links to folders named by a hash."""
    cell = tmp_path / "cell"
    cell.mkdir()
    for seed, model in enumerate(models):
        (cell / str(seed)).symlink_to(model)
    out = tmp_path / "cell-merged"
    merged(*(cell / str(seed) for seed in range(3)), "--out", out)
    assert ablate.runs_by_seed(str(cell)) == [str(cell / str(seed)) for seed in range(3)]
    assert ablate.runs_by_seed(str(out)) == [str(out)]


# ---- what is refused


def test_outputs_that_are_not_empty(models, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(models[0])
    before = [content_hash(model) for model in models]
    for out, message in (
        ("full", "expected a new or empty folder, found notes.txt"),
        ("file", "expected a folder, got a file"),
        ("link", "expected a new or empty folder, found config.json"),
    ):
        line = refused(*models[:2], "--out", tmp_path / out)
        assert line == f"error: --out {tmp_path / out}: {message}"
    line = refused(*models[:2], "--out", models[1])
    assert line == f"error: --out {models[1]}: expected a new or empty folder, found config.json"
    assert [content_hash(model) for model in models] == before
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    merged(*models[:2], "--out", tmp_path / "empty")  # control


BAD_FLAGS = [
    ((0,), (), "expected two models or more, got one"),
    ((0, 1, 2), ("--method", "slerp"), "--method slerp: expected two models, got 3"),
    ((0, 1), ("--weights", 1), "--weights: expected 2, one a model, got 1"),
    ((0, 1), ("--weights", 1, 1, 1), "--weights: expected 2, one a model, got 3"),
    ((0, 1), ("--weights", 0, 0), "--weights: expected numbers in [0, inf), not all 0, got [0.0, "),
    ((0, 1), ("--weights", "nan", 1), "--weights: expected numbers in [0, inf), not all 0, got "),
    ((0, 1), ("--weights", "inf", 1), "--weights: expected numbers in [0, inf), not all 0, got "),
    ((0, 1), ("--method", "ties"), "argument --method: invalid choice: 'ties'"),
]


@pytest.mark.parametrize("which, flags, message", BAD_FLAGS)
def test_bad_flags(models, tmp_path, which, flags, message):
    names = [models[i] for i in which]
    assert refused(*names, "--out", tmp_path / "out", *flags).startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def change_config(folder, model, **text):
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fewer_latents(folder, model):
    """A whole model of another shape."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(".latents"):
                tensors[name] = tensors[name][1:].clone()
                count = len(tensors[name])
        save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["latent_attention_config"]["num_latents_value"] = count
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_differ(models, tmp_path):
    other = change_config(tmp_path / "eps", models[1], rms_norm_eps=1e-3)
    line = refused(models[0], other, "--out", tmp_path / "out")
    differ = f"rms_norm_eps = 1e-05 in {models[0]}, 0.001 in {other}"
    assert line == f"error: {other}: expected models of one config, got {differ}"
    longer = change_config(tmp_path / "longer", models[1], max_position_embeddings=77)
    merged(models[0], longer, "--out", tmp_path / "free")  # control: no vector depends on it

    line = refused(models[0], fewer_latents(tmp_path / "few", models[1]), "--out", tmp_path / "out")
    assert line.startswith(f"error: {tmp_path / 'few'}: expected models of one config, got num_lat")

    tokenizer = shutil.copytree(models[1], tmp_path / "tokenizer")
    found = json.loads((tokenizer / "tokenizer.json").read_text())
    found["model"]["merges"].pop()
    (tokenizer / "tokenizer.json").write_text(json.dumps(found))
    line = refused(models[0], tokenizer, "--out", tmp_path / "out")
    assert line == f"error: {tokenizer}: expected the tokenizer of {models[0]}"
    assert not (tmp_path / "out").exists()


def test_models_that_are_damaged(models, tmp_path):
    """A tensor that is missing, of another shape or not finite."""
    for name, change in (
        ("missing", lambda tensors, key: tensors.pop(key)),
        ("shape", lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()})),
        ("finite", lambda tensors, key: tensors[key].view(-1)[0].fill_(torch.nan)),
    ):
        folder = shutil.copytree(models[1], tmp_path / name)
        path = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(path)
        key = next(key for key in tensors if tensors[key].dim() == 2)
        change(tensors, key)
        save_file(tensors, path)
        line = refused(models[0], folder, "--out", tmp_path / "out")
        assert line.startswith(f"error: {folder}: tensor '{key}': ")


def test_a_base_has_no_pooling_to_merge(base, tmp_path):
    code, _, lines = command(base, base, "--out", tmp_path / "out")
    expected = "expected a trained pooling layer, got a base without one"
    assert code == 2 and lines[-1] == f"error: {base}: {expected}"


def test_a_mean_that_overflows(models, tmp_path):
    """In float16: finite in fp32, not in the file."""
    folder = shutil.copytree(models[1], tmp_path / "large")
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = {name: t.float() * 1e6 for name, t in load_file(path).items()}
    save_file(tensors, path)
    flags = (models[0], folder, "--export-dtype", "float16", "--out")
    assert "expected finite numbers" in refused(*flags, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
