"""experiments/plot.py: the picture, the latent map against the layer unfolded, what it needs."""

import json
import shutil
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import references
import torch
from small_suite import error, output

import nvembed
from experiments import plot

QUICK = ("--task", "sts", "--limit", "8", "--max-length", "64", "--dtype", "float32")


@pytest.fixture
def run(released, tmp_path, monkeypatch):
    """A folder "run" with the released model and a log."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released, "run")
    log = [{"settings": {}}, {"step": 0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    Path("run/log.jsonl").write_text("\n".join(json.dumps(line) for line in log))


def test_picture(run, monkeypatch, capsys):
    table = output(monkeypatch, capsys, "run", *QUICK, main=plot.main)
    picture = Path("runs/plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 2e4
    assert "| run | " in table and "STS mean" in table


def test_growth(run, monkeypatch, capsys):
    """A panel for each row of the table, a line for each name, its points in order of N."""
    runs = ("mean-x10", "mean-x2", "latent-x1")
    for name in runs:
        shutil.copytree("run", name)
    output(monkeypatch, capsys, "--growth", *runs, *QUICK, main=plot.main)
    assert Path("runs/growth.png").read_bytes().startswith(b"\x89PNG")

    axes = matplotlib.figure.Figure().subplots()
    results = {"mean-x10": {"mean": [5, 6]}, "mean-x2": {"mean": [4]}, "a/latent-x1": {"mean": [3]}}
    plot.draw_growth(axes, results, "mean")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {"latent": [[1, 3]], "mean": [[2, 4], [10, 5.5]]}

    message = error(monkeypatch, capsys, "--growth", "run", *QUICK, main=plot.main)
    assert message == "error: run: expected a run whose name ends in -x and a number"


def test_what_a_picture_needs(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        message = error(patch, capsys, "run", *QUICK, main=plot.main)
        assert "expected the package matplotlib" in message
    # the note: the latent layer's weights are dropped
    message = error(monkeypatch, capsys, "run:mean", *QUICK, main=plot.main, notes=1)
    assert message == "error: run:mean: no latents with pooling 'mean'"
    Path("run/log.jsonl").unlink()
    message = error(monkeypatch, capsys, "run", *QUICK, main=plot.main)
    assert "run/log.jsonl: expected a .jsonl" in message


def test_latent_map_is_the_attention_of_the_layer_unfolded(released):
    """By the released weights, in the arithmetic of tests/oracle/references.py."""
    model = nvembed.NVEmbed.from_pretrained(released)
    tokens, latents, weights = plot.latent_map(model, "cat 1")
    ids = model.tokenize(["cat 1"])[0].ids
    assert len(tokens) == len(ids) == len(weights) and "".join(tokens).endswith("cat 1</s>")

    with torch.no_grad():
        hidden = model.embedding_model(torch.tensor(ids), (len(ids),), torch.float32)
    w = references.read_released(released)
    block = "latent_attention_model.cross_attend_blocks.0."
    x = references.layer_norm(w, f"{block}norm", hidden)
    context = w["latent_attention_model.latents"]
    context = references.layer_norm(w, f"{block}norm_context", context)
    q = references.heads_first((x @ w[f"{block}fn.to_q.weight"].T)[None], 8)
    keys, _ = (context @ w[f"{block}fn.to_kv.weight"].T).chunk(2, dim=-1)
    k = references.heads_first(keys[None], 8)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (1, C, T, R)
    expected = scores.softmax(dim=-1).mean(dim=1)[0].numpy()

    assert expected.sum(axis=1) == pytest.approx(1) and expected.std(axis=0).max() > 1e-6
    np.testing.assert_allclose(weights, expected[:, latents], atol=1e-5)
    assert set(latents) == set(expected.sum(axis=0).argsort()[-48:])
