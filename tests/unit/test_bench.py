"""The benchmark's commands at small shape: they run, compare like with like, and print what they say."""

import argparse
import re

import bench
import pytest
import torch

from data import prepare

NUMBER = r"[\d.,e-]+"
ROW = (
    rf"\| (.+?) \| ({NUMBER}) s \| ({NUMBER}) s \| ({NUMBER}) \| ({NUMBER}) - ({NUMBER}) \| (.*?) \| (.*?) \|"
)
TINY = (2, 64, 128, 4, 2, 49152, 16)


def options(**changes):
    found = {"rounds": 2, "texts": 12, "shape": "tiny", "batch": 8, "negatives": 1, "length": 16}
    found |= {"micro_tokens": 256, "plain": False, "recompute": False, "compile": False, "only": None}
    return argparse.Namespace(**(found | changes))


def rows(text):
    """Lines of the table -> [(what, ours, peer, ratio, low, high, target, note)]."""
    found = [re.fullmatch(ROW, line).groups() for line in text.splitlines() if line.startswith("| ")]
    return [(what, *map(float, numbers), target, note) for what, *numbers, target, note in found]


def test_tell_prints_the_ratio_of_medians_and_the_range_of_turns(capsys):
    ratio = bench.tell("a", ">= 2", {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 5.0, 4.0]}, "n")
    assert ratio == 2.0  # control: a mean of the turns' ratios would be 2.17
    assert rows(capsys.readouterr().out) == [("a", 2.0, 4.0, 2.0, 1.0, 3.0, ">= 2", "n")]


def test_turns_alternate_and_forget_the_first_round():
    calls = []
    seconds = bench.turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "abababab" and {name: len(times) for name, times in seconds.items()} == {
        "a": 3,
        "b": 3,
    }


def test_encode_against_sentence_transformers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "products", lambda *_: None)
    bench.encode(options(rounds=1), shape=TINY)
    found = rows(capsys.readouterr().out)
    assert [row[0].split()[-1] for row in found] == ["eager", "compiled"] * 2
    assert all(row[1] > 0 and row[4] <= row[3] <= row[5] for row in found)
    with pytest.raises(AssertionError, match="cosine"):  # control: other embeddings are not compared
        bench.same_direction(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0.1]]))


def test_gpu_command_at_small_shape(monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    bench.gpu(options(rounds=1))
    found = rows(capsys.readouterr().out)
    assert len(found) == 4 and found[0][0] == "encode 8 texts of 512, eager" and "% of" in found[0][7]


def test_step_command_at_small_shape(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 64, 128, 4, 2, 1000, 16))
    for owner, name in ((bench.train.NVEmbed, "from_pretrained"), (bench.train, "backward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # `measure` replaces both
    found = bench.measure(options())
    assert found["tokens"] == 8 * 3 * 16 and 0 < found["share_of_peak_at_6N"] < 1.5
    assert found["peak_gib"] >= found["loaded_gib"] > 0 and found["loss"] > 0


def test_texts_are_the_shipped_ones():
    texts = bench.texts_of(4000)
    assert len(texts) == 4000 and texts[0] == texts[3567] and len(set(texts)) > 3500 and all(texts)
    assert prepare.ROOT == bench.ROOT
