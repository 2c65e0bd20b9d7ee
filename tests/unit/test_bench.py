"""The benchmark's commands at small shape: they run, compare like with like, print a table."""

import argparse
import functools
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench
import bench_device
import bench_tools
import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nvembed
import train
from data import machine
from data.commands import run_command

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
    ratio = bench_tools.tell("a", ">= 2", {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 5.0, 4.0]}, "n")
    assert ratio == 2.0  # control: a mean of the turns' ratios would be 2.17
    assert rows(capsys.readouterr().out) == [("a", 2.0, 4.0, 2.0, 1.0, 3.0, ">= 2", "n")]


def test_turns_alternate_and_forget_the_first_round():
    calls = []
    contest = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench_tools.turns(contest, 3)
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
    bench_tools.same_direction(torch.tensor([[1.0, 0]]), torch.tensor([[2.0, 0]]))
    with pytest.raises(AssertionError, match="cosine"):
        bench_tools.same_direction(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0.1]]))


class OnCpu(TorchDispatchMode):
    """Counts the numbers that operators make on the CPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.count += out.numel()
        return out


@pytest.fixture
def meta_generator(monkeypatch):
    """The meta device, which stands for a GPU here, has no generator."""
    none = SimpleNamespace(manual_seed=lambda seed: None)
    monkeypatch.setattr(torch, "Generator", lambda device: none)


def test_random_weights_are_drawn_on_their_device(meta_generator):
    for device in ("meta", "cpu"):
        with OnCpu() as counted:
            model = bench_tools.random_model(TINY, torch.bfloat16, device=device, pooling="mean")
        assert {p.device.type for p in model.parameters()} == {device}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        size = sum(p.numel() for p in model.parameters())
        assert (counted.count >= size) if device == "cpu" else (counted.count == 0)


def test_the_peer_needs_no_disk(tmp_path):
    """sentence-transformers gets our weights, and what is written for it is small."""
    shape = (2, 256, 512, 4, 2, 1000, 16)
    model = bench_tools.random_model(
        shape, torch.float32, bench_tools.own_tokenizer(1000), pooling="mean"
    )
    peer = bench_tools.sentence_transformer(model, tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert 0 < sum(sizes) < 0.01 * 4 * sum(p.numel() for p in model.parameters())
    theirs = dict(peer[0].model.named_parameters())
    for name, weight in model.embedding_model.named_parameters():
        assert torch.equal(theirs[name], weight)


@pytest.mark.slow
def test_gpu_command_at_small_shape(monkeypatch, capsys):
    monkeypatch.setitem(bench_tools.SHAPES, "tiny", (2, 64, 128, 4, 2, 1000, 16))
    bench.gpu(options(rounds=1))
    first, *table = capsys.readouterr().out.splitlines()
    assert "weights, peak" in first
    found = rows("\n".join(line for line in table if not line.startswith("|---")))
    assert len(found) == 4
    assert found[1][0] == "encode 8 texts of 512, eager"
    assert "% of" in found[1][7]


@pytest.mark.slow
def test_lora_command_at_small_shape(monkeypatch, capsys):
    monkeypatch.setitem(bench_tools.SHAPES, "smollm2", TINY)
    few_rows = functools.partial(bench.question_batch, count=8)
    monkeypatch.setattr(bench, "question_batch", few_rows)
    bench.lora(options(rounds=1))
    found = rows(capsys.readouterr().out)
    names = [f"LoRA step, dropout {d}, {how}" for d in (0.1, 0.0) for how in ("eager", "compiled")]
    assert [row[0] for row in found] == names


@pytest.mark.parametrize("plain", [False, True])
def test_step_command_at_small_shape(plain, monkeypatch, capsys):
    monkeypatch.setitem(bench_tools.SHAPES, "tiny", (2, 64, 128, 4, 2, 1000, 16))
    owner = bench_tools.train.NVEmbed
    monkeypatch.setattr(owner, "from_pretrained", owner.from_pretrained)  # `measure` replaces it
    found = bench_tools.measure(options(plain=plain))
    assert found["tokens"] == 8 * 3 * 16
    assert found["share_of_peak"] > 0
    assert found["peak_gib"] >= found["loaded_gib"] > 0
    assert found["loss"] > 0
    built, *steps = capsys.readouterr().out.splitlines()
    assert "GiB loaded, 256 tokens a micro-batch" in built
    assert [line.split(":")[0] for line in steps] == ["step 0", "step 1", "step 2"]


# ---- the yardstick, and what is divided by it


def peak_of(rate, kind, monkeypatch):
    """measure_peak on a device whose products of a width run at rate(width) -> peak, widths."""
    widths = []

    def product_speed(width, device, dtype):
        widths.append(width)
        return rate(width)

    monkeypatch.setattr(machine, "product_speed", product_speed)
    peak = machine.measure_peak(SimpleNamespace(type=kind), torch.bfloat16)
    return peak, widths


def test_the_peak_is_that_of_products_large_enough(monkeypatch):
    """An H100: 356 TFLOP/s at a width of 2,048, 783 at 8,192."""
    h100 = {512: 2e13, 2048: 3.56e14, 8192: 7.83e14}
    assert peak_of(h100.get, "cuda", monkeypatch) == (7.83e14, [512, 2048, 8192])


def test_the_peak_of_a_cpu_takes_no_minutes(monkeypatch):
    fast = lambda width: 1.5e11
    assert peak_of(fast, "cpu", monkeypatch)[1] == [256, 512, 1024, 2048]
    emulated = lambda width: 2e8  # a product of 2,048 would take 86 s, one of 512 takes 1.3 s
    assert peak_of(emulated, "cpu", monkeypatch) == (2e8, [256])


def test_products_are_timed(monkeypatch):
    """The best of four rounds, by a clock that says 5, 2, 3 and 4 seconds."""
    times = iter([0, 5, 10, 12, 20, 23, 30, 34])
    monkeypatch.setattr(machine, "finished_at", lambda device: next(times))
    assert machine.product_speed(8, torch.device("cpu"), torch.float32) == 2 * 8**3 / 2


def counted_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_a_token():
    """Against PyTorch's count of the products: 2 N a token to encode, 6 N a cached LoRA step."""
    shape = (2, 256, 768, 4, 2, 1000, 32)
    model = bench_tools.random_model(
        shape, torch.float32, bench_tools.own_tokenizer(1000), pooling="mean"
    )
    weights = bench_tools.weights_of(model)
    s = train.Settings(batch=4, negatives=1, max_length=16, micro_tokens=64, lora_rank=1)
    batch = bench_tools.random_batch(model, options(batch=4), s)
    tokens = bench_tools.count_tokens(batch.tokens)
    with torch.no_grad():
        encoded = counted_flops(lambda: model(batch.tokens)) / tokens
    assert encoded == pytest.approx(2 * weights, rel=0.05)
    nvembed.add_lora(model, 1, dropout=0.0)
    for plain, passes in ((False, 6), (True, 4)):
        step = functools.partial(train.backward, model.train(), batch, s, (0,), not plain)
        claimed = bench_tools.step_flops(model, batch, s, plain)
        assert claimed == pytest.approx(passes * weights, rel=0.02)
        assert counted_flops(step) / tokens == pytest.approx(claimed, rel=0.05)
    s = replace(s, recompute=True)
    for block in model.embedding_model.layers:
        block.recompute = True
    counted = counted_flops(lambda: train.backward(model, batch, s)) / tokens
    assert train.flops_a_token(model, batch, s) == pytest.approx(8 * weights, rel=0.02)
    assert counted == pytest.approx(8 * weights, rel=0.05)


def test_flops_of_a_7b(meta_generator):
    """6.98e9 weights outside the embedding; the latent layer's 740 M are not counted."""
    model = bench_tools.random_model("mistral-7b", torch.bfloat16, device="meta")
    assert bench_tools.weights_of(model) == pytest.approx(6.98e9, rel=0.001)
    s = train.Settings(micro_tokens=512)
    batch = SimpleNamespace(tokens=[nvembed.Tokens([3] * 512, 0)] * 2)
    assert train.flops_a_token(model, batch, s) == pytest.approx(6 * 6.98e9, rel=0.001)


# ---- the whole of a device


def part_options(path, other="right"):
    return SimpleNamespace(other=other, rows=path, shape="tiny")


def test_a_row_that_fails_costs_no_other(tmp_path, capsys):
    part = bench_device.Part(part_options(tmp_path / "rows"))

    def fails(error):
        raise error

    what, other = "mining, recall", "int8 weights, cosine"
    part.measure(what, fails, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    part.measure(other, lambda: (0.9995, "0.99950"))
    out = capsys.readouterr().out.splitlines()
    assert "**failed**: OutOfMemoryError: CUDA out of memory" in out[0]
    assert out[1] == "| int8 weights, cosine | right | 0.99950 |  | >= 0.999 | yes |"
    found = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert found == [[what, out[0]], [other, out[1]]]
    with pytest.raises(TypeError):  # control: a mistake of ours keeps its traceback
        part.measure(what, fails, TypeError())
    part.measure(other, lambda: (0.99, "0.99"))
    assert capsys.readouterr().out.endswith("| **no** |\n")


def test_goals_are_compared():
    assert bench_device.reaches(50000.0, ">= 50,000 tokens/s")
    assert not bench_device.reaches(49999.0, ">= 50,000 tokens/s")
    assert bench_device.reaches(7.9, "<= 8 ms")
    assert not bench_device.reaches(1e-4, "<= 1e-5")


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_device, "COMMAND", tmp_path / "hangs.py")
    source = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', CODE])\n"
    code = f"import os, time; open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "hangs.py").write_text(f"CODE = {code!r}\n{source}")
    start = time.monotonic()
    reason = bench_device.run_part("right", "tiny", tmp_path / "rows", 10)
    assert time.monotonic() - start < 40
    assert reason == "over its 10 s"
    time.sleep(0.2)
    pid = (tmp_path / "pid").read_text()
    path = Path(f"/proc/{pid}/stat")
    assert not path.exists() or ") Z " in path.read_text()  # what it started ended too
    (tmp_path / "hangs.py").write_text("import sys; sys.exit(7)")
    reason = bench_device.run_part("right", "tiny", tmp_path / "rows", 30)
    assert reason == "its process ended with status 7"
    monkeypatch.setattr(bench_device, "on_gpu", lambda: False)
    assert bench_device.run_part("small step", "tiny", tmp_path / "rows", 30) == "no GPU"
    assert bench_device.run_part("right", "tiny", tmp_path / "rows", -1) == "the 8 minutes are over"


@pytest.mark.parametrize("dropped", [None, "mask"])
def test_attention_is_compared_with_fp64(dropped, monkeypatch):
    cpu = torch.device("cpu")
    if dropped:
        right = nvembed.attend
        monkeypatch.setattr(nvembed, "attend", lambda *args: right(*args[:4], False, None))
    worst = bench_device.check_attend(cpu, torch.float32)[0]
    assert (worst > 0.1) if dropped else (worst < 1e-6)


def test_gradients_are_compared(monkeypatch):
    cpu = torch.device("cpu")
    assert bench_device.check_cached(cpu)[0] < 1e-6
    reseed = train.reseed
    monkeypatch.setattr(train, "reseed", lambda *key: None)  # control: other masks at each pass
    assert bench_device.check_cached(cpu)[0] > 1e-3
    monkeypatch.setattr(train, "reseed", reseed)
    assert bench_device.check_recompute(cpu)[0] < 1e-6


@pytest.mark.slow
def test_device_command_at_tiny_shape(tmp_path, monkeypatch, capfd):
    """Every row is measured or, where it needs a GPU, not run; two minutes of an idle core."""
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", f"bench.py device --shape tiny --out {out}".split())
    run_command(bench.main)
    printed = capfd.readouterr().out
    head, empty, *table = out.read_text().splitlines()
    assert "`python tests/bench.py device --shape tiny`, commit `" in head
    assert table[:2] == bench_device.HEAD.splitlines()
    cells = {line.split("|")[1].strip(): line for line in table[2:]}
    rows_of_all = {
        what: row for _, part in bench_device.PARTS.values() for what, row in part.items()
    }
    assert list(cells) == list(rows_of_all)
    for what, row in rows_of_all.items():
        now = cells[what].split("|")[3].strip()
        assert (now == "not run") is (row.gpu and not torch.cuda.is_available()), cells[what]
        assert "failed" not in now and "skipped" not in now, cells[what]
        assert cells[what] in printed
    assert sum(line.endswith("| yes |") for line in table) >= 11
    assert not any("**no**" in line for line in table)


def test_the_document_has_the_rows_of_the_command():
    text = (ROOT / "tests/BENCH.md").read_text("utf-8")
    assert bench_device.HEAD.splitlines()[0] in text
    for _, part in bench_device.PARTS.values():
        for what, row in part.items():
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
            assert f"| {what} | {row.version_1} | " in line
            assert f" | {row.beside} | {row.goal} | " in line


@pytest.mark.parametrize("line", [["versus"], ["encode", str(ROOT)]])
def test_versus_needs_its_folder(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *line])
    with pytest.raises(SystemExit) as stop:
        run_command(bench.main)
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
    texts = bench_tools.texts_of(4000)
    assert len(texts) == 4000
    assert texts[0] == texts[3567]
    assert len(set(texts)) > 3500
    assert all(texts)
    assert bench_tools.base.ROOT == bench_tools.ROOT
