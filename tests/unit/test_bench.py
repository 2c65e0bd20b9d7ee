"""The benchmark's commands at small shape: they run, compare like with like, print a table."""

import argparse
import functools
import re
import sys

import bench
import pytest
import torch
from conftest import ROOT

NUMBER = r"([\d.,e-]+)"
ROW = (
    rf"\| (.+?) \| {NUMBER} s \| {NUMBER} s \| {NUMBER} \| {NUMBER} - {NUMBER} \| (.*?) \| (.*?) \|"
)
TINY = (2, 64, 128, 4, 2, 49152, 16)
DEFAULTS = {
    "rounds": 2,
    "texts": 12,
    "shape": "tiny",
    "batch": 8,
    "negatives": 1,
    "length": 16,
    "micro_tokens": 256,
    "plain": False,
    "recompute": False,
    "compile": False,
    "only": None,
    "other": None,
}


def options(**changes):
    return argparse.Namespace(**(DEFAULTS | changes))


def rows(text):
    """Lines of the table -> [(what, ours, peer, ratio, low, high, target, note)]."""
    found = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| |"):
            what, *numbers, target, note = re.fullmatch(ROW, line).groups()
            found.append((what, *map(float, numbers), target, note))
    return found


def test_tell_prints_the_ratio_of_medians_and_the_range_of_turns(capsys):
    ratio = bench.tell("a", ">= 2", {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 5.0, 4.0]}, "n")
    assert ratio == 2.0  # control: a mean of the turns' ratios would be 2.17
    assert rows(capsys.readouterr().out) == [("a", 2.0, 4.0, 2.0, 1.0, 3.0, ">= 2", "n")]


def test_turns_alternate_and_forget_the_first_round():
    calls = []
    contest = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench.turns(contest, 3)
    assert "".join(calls) == "abababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_encode_against_sentence_transformers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "products", lambda *_: None)
    bench.encode(options(rounds=1), shape=TINY)
    found = rows(capsys.readouterr().out)
    assert [row[0].split()[-1] for row in found] == ["eager", "compiled"] * 2
    assert all(row[1] > 0 and row[4] <= row[3] <= row[5] for row in found)


def test_other_embeddings_are_not_compared():
    bench.same_direction(torch.tensor([[1.0, 0]]), torch.tensor([[2.0, 0]]))
    with pytest.raises(AssertionError, match="cosine"):
        bench.same_direction(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0.1]]))


@pytest.mark.slow
def test_gpu_command_at_small_shape(monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    # a CPU without bf16 would multiply the yardstick's large matrices for minutes
    monkeypatch.setattr(bench.runs, "measure_peak", lambda *_: 1e12)
    bench.gpu(options(rounds=1))
    found = rows(capsys.readouterr().out)
    assert len(found) == 4
    assert found[0][0] == "encode 8 texts of 512, eager"
    assert "% of" in found[0][7]


@pytest.mark.slow
def test_lora_command_at_small_shape(monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "smollm2", TINY)
    few_rows = functools.partial(bench.question_batch, count=8)
    monkeypatch.setattr(bench, "question_batch", few_rows)
    bench.lora(options(rounds=1))
    found = rows(capsys.readouterr().out)
    names = [f"LoRA step, dropout {d}, {how}" for d in (0.1, 0.0) for how in ("eager", "compiled")]
    assert [row[0] for row in found] == names


@pytest.mark.parametrize("plain", [False, True])
def test_step_command_at_small_shape(plain, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 64, 128, 4, 2, 1000, 16))
    owner = bench.train.NVEmbed
    monkeypatch.setattr(owner, "from_pretrained", owner.from_pretrained)  # `measure` replaces it
    found = bench.measure(options(plain=plain))
    assert found["tokens"] == 8 * 3 * 16
    assert 0 < found["share_of_peak_at_6N"] < 1.5
    assert found["peak_gib"] >= found["loaded_gib"] > 0
    assert found["loss"] > 0


@pytest.mark.parametrize("line", [["versus"], ["encode", str(ROOT)]])
def test_versus_needs_its_folder(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *line])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "another checkout" in capsys.readouterr().err


@pytest.fixture
def other_checkout(tmp_path):
    """A copy of this one that can be told apart."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text("utf-8"), "utf-8")
    with (tmp_path / "nvembed.py").open("a") as file:
        file.write("\nOTHER = True\n")
    return tmp_path


def test_two_checkouts_in_one_process(other_checkout):
    package, trainer = bench.load_checkout(other_checkout)
    assert package is not bench.nvembed
    assert package.OTHER
    assert trainer.nvembed is package
    assert not hasattr(bench.nvembed, "OTHER")
    assert sys.modules["nvembed"] is bench.nvembed
    assert str(other_checkout) not in sys.path


@pytest.mark.slow
def test_versus(other_checkout, capsys):
    bench.versus(options(rounds=1, other=other_checkout), shape=TINY)
    found = rows(capsys.readouterr().out)
    encoded = ["12 texts", "32 mixed texts", "one query"]
    names = [f"encode {what}, {pooling}" for pooling in ("mean", "latent") for what in encoded]
    names += ["LoRA step, dropout 0.0", "LoRA step, dropout 0.1"]
    assert [row[0] for row in found] == names
    assert all(row[1] > 0 and row[4] <= row[3] <= row[5] for row in found)


def test_texts_are_the_shipped_ones():
    texts = bench.texts_of(4000)
    assert len(texts) == 4000
    assert texts[0] == texts[3567]
    assert len(set(texts)) > 3500
    assert all(texts)
    assert bench.base.ROOT == bench.ROOT
