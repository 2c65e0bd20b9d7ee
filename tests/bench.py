"""Speed beside what one would use instead, and how cost grows. Each measurement is a command.

    python tests/bench.py                              the CPU table: ours, peer, ratio, range
    python tests/bench.py --only encode,mine           some of its lines
    python tests/bench.py versus FOLDER                this checkout against another one
    python tests/bench.py growth                       tokens/s by length, batch, width, texts
    python tests/bench.py cache                        cached against plain step; peak memory
    python tests/bench.py step                         LoRA step at Mistral-7B shape on this GPU
    torchrun --nproc-per-node 8 tests/bench.py step    the same on 8 ranks
    python tests/bench.py gpu                          encoding at that shape on this GPU
    python tests/bench.py device --out FILE            all of a GPU in 8 minutes, as a table
    python tests/bench.py device --shape tiny          the same, small, on any machine

Weights are random and the same on both sides, as are token ids; embeddings are compared before
anything is timed. Contestants take turns in one process, one thread, CPU time (on GPUs wall time).
The first round is thrown away; printed are the median and the range of the others. On CPUs set
OMP_NUM_THREADS=1. Run nothing beside it. The table takes half an hour.

bench_device.py has all of `device`, bench_tools.py what both files need.
"""

import argparse
import copy
import functools
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from bench_device import device_report, run_one_part
from bench_tools import QUESTION_ROWS, SHAPES, TASK, PeftStep, clock, cold, count_tokens, error
from bench_tools import long_texts, measure, memory, mixed_texts, on_gpu, own_tokenizer, peer_encode
from bench_tools import plain_gradients, print_header, random_model, real_tokenizer, same_direction
from bench_tools import spread, tell, texts_of, turns, versions, weights_of

import nvembed
import train
from data import machine, ranks, sampling
from data.commands import Flags, run_command
from data.rows import read_rows
from nvembed import LatentAttention, add_lora, pack


# ---- lines of the table


def encode(args, shape="small"):
    """Encoding, tokenising included, against sentence-transformers; then against bare products."""
    settings = {"causal": True, "pooling": "mean"}
    model = random_model(shape, torch.bfloat16, real_tokenizer(), **settings)
    theirs = peer_encode(model)
    texts = texts_of(args.texts)
    few = mixed_texts(texts)
    same_direction(model.encode(texts), theirs(texts))
    versions = {"eager": model, "compiled": copy.deepcopy(model).compile_blocks()}
    first_calls = {}
    for how, version in versions.items():
        first_calls[how] = [cold(lambda: version.encode(few)) for _ in range(2)]

    for name, some, target, rounds in (("texts", texts, 2.0, 1), ("mixed texts", few, 3, 4)):
        contest = {how: functools.partial(v.encode, some) for how, v in versions.items()}
        contest["peer"] = functools.partial(theirs, some)
        seconds = turns(contest, rounds * args.rounds)
        tokens = count_tokens(model.tokenize(some))
        for how in versions:
            note = f"{tokens / statistics.median(seconds[how]):,.0f} tokens/s"
            if some is few:
                note += "; cold {:.2f} s, then {:.2f} s".format(*first_calls[how])
            times = {"ours": seconds[how], "peer": seconds["peer"]}
            tell(f"encode {len(some):,} {name}, {how}", f">= {target}", times, note)
    for how, version in versions.items():
        products(version, args, how)


def products(model, args, name, length=128, size=4096):
    """A packed batch's forward pass against the matrix products of its layers and attention."""
    decoder = model.embedding_model
    c = model.config
    count = size // length
    ids = torch.randint(3, 40000, (size,))
    layers = []  # (x, weight, out) of each projection of a block
    for layer in decoder.layers[0].modules():
        if hasattr(layer, "in_features"):
            x = torch.randn(size, layer.in_features).bfloat16()
            weight = torch.randn(layer.out_features, layer.in_features).bfloat16()
            layers.append((x, weight, torch.empty(size, layer.out_features).bfloat16()))
    q = torch.randn(count * c.num_attention_heads, length, c.head_dim).bfloat16()
    scores = torch.empty(len(q), length, length).bfloat16()
    mixed = torch.empty_like(q)

    def alone():
        for _ in range(c.num_hidden_layers):
            for x, weight, out in layers:
                torch.mm(x, weight.t(), out=out)
            torch.bmm(q, q.mT, out=scores)
            torch.bmm(scores, q, out=mixed)

    def whole():
        decoder(ids, (length,) * count, torch.bfloat16)

    with torch.no_grad():
        seconds = turns({"ours": whole, "peer": alone}, 2 * args.rounds)
    what = f"matrix products / whole decoder, {count} texts of {length}, {name}"
    tell(what, ">= 0.60", seconds)


def question_batch(trainer, model, s, count=24):
    """The first shipped questions, each with a positive and a hard negative -> (batch, rows)."""
    rows = read_rows(QUESTION_ROWS)[:count]
    rows = [row | {"pos": row["pos"][:1], "neg": row["neg"][:1]} for row in rows]
    dataset = SimpleNamespace(rows=rows, held_out=[], instruction="", symmetric=False)
    drawn = [(dataset, row, np.random.default_rng(0)) for row in rows]
    return trainer.make_batch(model, drawn, s, trainer.known_positives([dataset]))


def lora_settings(trainer, dropout):
    return trainer.Settings(
        batch=24,
        negatives=1,
        temperature=0.05,
        max_length=192,
        micro_tokens=4096,
        lora_dropout=dropout,
        lr=0.0,
    )


def lora(args):
    """A LoRA step (bf16 base, AdamW, InfoNCE of 24 rows x 3 texts) against transformers + peft.

    Targets, rank, dropout, ids and micro-batches are the same. Compile time is in the last column.
    """
    shape = (8, *SHAPES["smollm2"][1:])
    settings = {"causal": True, "pooling": "mean"}
    for dropout in (0.1, 0.0):
        model = random_model(shape, torch.bfloat16, real_tokenizer(), **settings)
        s = lora_settings(train, dropout)
        batch = question_batch(train, model, s)
        theirs = PeftStep(model, batch, s)
        add_lora(model, dropout=dropout)
        optimizer = torch.optim.AdamW(train.trained(model).values(), lr=0.0, fused=True)

        def ours(model=model, optimizer=optimizer, batch=batch, s=s):
            return train.train_step(model.train(), optimizer, batch, s, 0)["loss"]

        with plain_gradients():
            for name in ("eager", "compiled"):
                if name == "compiled":
                    model.compile_blocks()
                first = cold(ours)
                if dropout == 0:
                    assert abs(ours() - theirs()) < 0.02, (ours(), theirs())
                seconds = turns({"ours": ours, "peer": theirs}, args.rounds)
                rate = count_tokens(batch.tokens) / statistics.median(seconds["ours"])
                note = f"{rate:,.0f} tokens/s; first step {first:.0f} s"
                tell(f"LoRA step, dropout {dropout}, {name}", ">= 1.5", seconds, note)


def released_latent_layer():
    """A latent layer of the released shape with random bf16 weights."""
    config = nvembed.Config(32000, 4096, 14336, 1, 32, 8, 2)
    with torch.device("meta"):
        layer = LatentAttention(config)
    layer.to_empty(device="cpu")
    for name, p in layer.to(torch.bfloat16).requires_grad_(False).named_parameters():
        if p.dim() == 1:
            p.fill_("norm" in name and "weight" in name)
        else:
            p.normal_(std=0.02)
    layer.latents.normal_()
    return layer.eval()


def latent(args):
    """The released latent layer's attention, folded (ours) against unfolded; the whole layer."""
    size = 8192
    layer = released_latent_layer()
    h = torch.randn(size, 4096).bfloat16()
    block, feed_forward = layer.cross_attend_blocks
    matrices = [matrix.bfloat16() for matrix in layer.fold_latents(torch.float32)]

    def folded(x):
        scores = (x @ matrices[0]).unflatten(-1, (block.heads, -1))
        return scores.softmax(dim=-1).flatten(1) @ matrices[1]

    def unfolded(x):
        k, v = block.keys_values(layer.latents.to(x.dtype))
        q = block.fn.to_q(x).unflatten(-1, (block.heads, -1))
        q, k, v = [t.transpose(0, 1)[None] for t in (q, k, v)]
        out = F.scaled_dot_product_attention(q, k, v)[0]
        return block.fn.to_out(out.transpose(0, 1).flatten(1))

    def whole_unfolded():
        y = h + unfolded(block.norm(h))
        return y + feed_forward(y)

    def whole():
        return layer(h, None, matrices)

    with torch.no_grad():
        x = block.norm(h)
        true = unfolded(x[:64].float())
        errors = [error(f(x[:64]), true) for f in (folded, unfolded)]
        assert max(errors) < 0.02, errors
        note = f"error {errors[0]:.4f}, unfolded {errors[1]:.4f}"
        contest = {"ours": lambda: folded(x), "peer": lambda: unfolded(x)}
        seconds = turns(contest, args.rounds)
        tell(f"latent layer's attention, S = {size:,}", ">= 6", seconds, note)
        assert error(whole(), whole_unfolded().float()) < 0.02
        seconds = turns({"ours": whole, "peer": whole_unfolded}, args.rounds)
        tell("whole latent layer", "2.1: FLOPs", seconds)


def rows(args):
    """Rows -> tokens -> packed batches, ours alone: tokens/s of one core."""
    model = random_model("tiny", torch.float32, real_tokenizer())
    found = read_rows(QUESTION_ROWS)
    dataset = sampling.Dataset("wikipedia", TASK, False, found, [])
    s = train.Settings(batch=128, negatives=4, micro_tokens=16384)
    positives = sampling.known_positives([dataset])
    rates = []
    for step in range(args.rounds + 1):
        start = clock()
        places = sampling.schedule([len(found)], s, step)
        drawn = sampling.draw_rows([found], [dataset], places, s)
        batch = train.make_batch(model, drawn, s, positives)
        for part in pack(batch.tokens, s.micro_tokens):
            np.concatenate([batch.tokens[i].ids for i in part])
        rates.append(count_tokens(batch.tokens) / (clock() - start))
    rate, low, high = spread(rates[1:])
    span = f"{low:,.0f} - {high:,.0f}"
    print(f"| rows to packed batches | {rate:,.0f} tokens/s | | | {span} | >= 600,000 | |")


def mining(args):
    """Exact search at D = 4,096, 100 deep, bf16 documents, against faiss's flat index in fp32."""
    import faiss

    import mine

    documents = F.normalize(torch.randn(50000, 4096), dim=-1).bfloat16()
    queries = F.normalize(torch.randn(512, 4096), dim=-1).bfloat16()
    index = faiss.IndexFlatIP(4096)
    index.add(documents.float().numpy())
    wide = queries.float().numpy()
    ours = functools.partial(mine.search, queries.float(), documents.split(mine.SHARD), 100)
    theirs = functools.partial(index.search, wide, 100)
    pairs = zip(ours()[1].tolist(), theirs()[1].tolist(), strict=True)
    recall = statistics.mean(len(set(a) & set(b)) / 100 for a, b in pairs)
    seconds = turns({"ours": ours, "peer": theirs}, args.rounds)
    size = documents.nbytes / 2**20
    note = f"recall {recall:.4f}; vectors {size:.0f} MiB, peer {2 * size:.0f}"
    tell("search, 512 x 50,000 x 4,096", ">= 1.8", seconds, note)


# ---- another checkout


def load_checkout(folder):
    """nvembed and train of another checkout, as modules beside this one's."""
    names = ("nvembed", "train", "mine", "eval", "data", "experiments")
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        other = importlib.import_module("nvembed"), importlib.import_module("train")
    finally:
        sys.path.pop(0)
        for name in list(sys.modules):
            if name.split(".")[0] in names:
                del sys.modules[name]
        sys.modules.update(ours)
    for module in other:
        assert Path(module.__file__).resolve().parent == Path(folder).resolve(), module
    return other


def versus(args, shape="small"):
    """Encoding and LoRA steps of this checkout ("ours") against another one's ("peer")."""
    sides = {"ours": (nvembed, train), "peer": load_checkout(args.other)}
    print_header()
    for pooling in ("mean", "latent"):
        encode_versus(sides, args, shape, pooling)
    for dropout in (0.0, 0.1):
        step_versus(sides, args, shape, dropout)


def each_model(sides, shape, **settings):
    dtype = machine.fast_dtype()
    found = {}
    for side, (package, _) in sides.items():
        found[side] = random_model(shape, dtype, real_tokenizer(), package=package, **settings)
    return found


def encode_versus(sides, args, shape, pooling):
    texts = texts_of(args.texts)
    versions = each_model(sides, shape, pooling=pooling)
    same_direction(*(model.encode(texts[:64], TASK) for model in versions.values()))
    for name, some, rounds in (
        (f"{len(texts):,} texts", texts, args.rounds),
        ("32 mixed texts", mixed_texts(texts_of(1000)), 4 * args.rounds),
        ("one query", texts[:1], 20 * args.rounds),
    ):
        contest = {side: functools.partial(m.encode, some) for side, m in versions.items()}
        tell(f"encode {name}, {pooling}", ">= 0.98", turns(contest, rounds))


def step_versus(sides, args, shape, dropout):
    contest = {}
    for side, model in each_model(sides, shape, pooling="latent").items():
        package, trainer = sides[side]
        s = lora_settings(trainer, dropout)
        package.add_lora(model, dropout=dropout)
        batch = question_batch(trainer, model, s)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        step = functools.partial(trainer.train_step, model.train(), optimizer, batch, s, 0)
        contest[side] = step
    losses = [step()["loss"] for step in contest.values()]
    if dropout == 0:
        assert abs(losses[0] - losses[1]) < 0.02, losses
    note = "loss {:.4f}, peer {:.4f}".format(*losses)
    seconds = turns(contest, args.rounds)
    tell(f"LoRA step, dropout {dropout}", ">= 0.98", seconds, note)


# ---- growth


def growth(args):
    """How cost grows, ours alone, compiled, bf16: tokens/s, and memory by the number of texts."""
    tokenizer = real_tokenizer()

    def rate(model, length, count, **how):
        some = long_texts(length, count)
        size = count_tokens(model.tokenize(some, "", length))
        contest = {"ours": lambda: model.encode(some, "", length, **how)}
        seconds, low, high = spread(turns(contest, args.rounds)["ours"])
        return f"{size / seconds:,.0f} ({size / high:,.0f} - {size / low:,.0f}) tokens/s"

    model = random_model("small", torch.bfloat16, tokenizer, pooling="mean").compile_blocks()
    for length in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        found = rate(model, length, max(2, 32768 // length))
        print(f"texts of {length} tokens: {found}", flush=True)
    for budget in (512, 2048, 8192, 32768):
        found = rate(model, 128, 256, batch_tokens=budget)
        print(f"batch_tokens {budget}: {found}", flush=True)
    for width in (128, 256, 512, 1024, 2048):
        shape = (4, width, 3 * width, width // 64, max(1, width // 256), 49152, 64)
        model = random_model(shape, torch.bfloat16, tokenizer, pooling="mean").compile_blocks()
        print(f"width {width}, 4 layers: {rate(model, 128, 128)}", flush=True)
    memory_of_many_texts(tokenizer)


def memory_of_many_texts(tokenizer):
    words = " ".join(texts_of(3000)).split()
    shape = (*SHAPES["tiny"][:5], 49152, 64)
    model = random_model(shape, torch.bfloat16, tokenizer, pooling="mean")
    cpu = torch.device("cpu")
    for count in (1000, 10000, 100000):
        some = [" ".join(words[i % 50000 :][: 4 + i % 9]) for i in range(count)]
        before = memory(cpu)[0]
        start = time.perf_counter()
        out = model.encode(some)
        rate = count / (time.perf_counter() - start)
        above = (memory(cpu)[1] - before - out.nbytes) / 2**20
        found = f"{rate:,.0f} texts/s, {above:.0f} MiB above the result"
        print(f"{count:,} short texts: {found}", flush=True)


# ---- a GPU, and steps in processes of their own


def gpu(args):
    """Encoding at Mistral-7B shape: share of the GPU's peak, sentence-transformers, one query."""
    device = ranks.init_ranks()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length = 512
    size = 256 if device.type == "cuda" else 8
    settings = {"causal": True, "pooling": "mean"}
    tokenizer = own_tokenizer(SHAPES[args.shape][5])
    model = random_model(args.shape, dtype, tokenizer, device, **settings)
    texts = long_texts(length, size)
    query = long_texts(64, 1)
    flops = 2 * weights_of(model)
    peak = machine.measure_peak(device, dtype)
    print(f"{weights_of(model):,} weights, peak {peak / 1e12:.3g} TFLOP/s", flush=True)
    theirs = peer_encode(model)
    same_direction(model.encode(texts[:8]), theirs(texts[:8]).cpu(), 0.999)
    print_header()
    for name in ("eager", "compiled"):
        if name == "compiled":
            model.compile_blocks()
        contest = {"ours": lambda: model.encode(query, "", 64), "peer": lambda: theirs(query)}
        seconds = turns(contest, 10 * args.rounds, device.type)
        tell(f"one query of 64 tokens, {name}", "<= 8 ms", seconds)
        contest = {"ours": lambda: model.encode(texts), "peer": lambda: theirs(texts)}
        seconds = turns(contest, args.rounds, device.type)
        rate = size * length / statistics.median(seconds["ours"])
        share = f"{flops * rate / peak:.0%} of {peak / 1e12:.3g} TFLOP/s"
        note = f"{rate:,.0f} tokens/s, {share}"
        tell(f"encode {size} texts of {length}, {name}", ">= 1.5, >= 60 %", seconds, note)


def own_process(*flags):
    line = [sys.executable, __file__, "one", *map(str, flags)]
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def cache(args):
    """Cached against plain step on the same micro-batches; memory from batch 128 to 1,024."""
    flags = ["--shape", args.shape, "--length", args.length, "--negatives", args.negatives]
    flags += ["--micro-tokens", args.micro_tokens, "--rounds", args.rounds]
    cached = own_process("--batch", 128, *flags)
    plain = own_process("--batch", 128, *flags, "--plain")
    ratio = cached["seconds"] / plain["seconds"]
    times = f"cached {cached['seconds']:.2f} s, plain {plain['seconds']:.2f} s"
    print(f"{times}: {ratio:.2f} x")
    for batch in (128, 256, 512, 1024):
        one = own_process("--batch", batch, *flags, "--rounds", 1)
        above = one["peak_gib"] - one["loaded_gib"]
        memory_used = f"{above:.3f} GiB above the {one['loaded_gib']:.2f} loaded"
        print(f"batch {batch:5}: {one['seconds']:.1f} s, {memory_used}")
    above = plain["peak_gib"] - plain["loaded_gib"]
    print(f"plain, batch 128: {above:.3f} GiB above")


# ---- the command

TABLE = {
    "encode": encode,
    "lora": lora,
    "latent": latent,
    "mine": mining,
    "rows": rows,
    "cache": cache,
}


def table(args):
    """The whole table, each part in a process of its own, so that none sees another's memory."""
    print_header()
    for name in (args.only or ",".join(TABLE)).split(","):
        flags = ["--rounds", args.rounds, "--texts", args.texts]
        subprocess.run([sys.executable, __file__, name, *map(str, flags)], check=True)


def read_flags():
    parser = Flags(__doc__)
    flag = parser.add_argument
    commands = ("table", "growth", "gpu", "device", "versus", *TABLE, "step", "one", "part")
    flag("what", nargs="?", default="table", choices=commands)
    flag("other", nargs="?", help="versus: folder of another checkout; part: its name")
    flag("--only", help=f"lines of the table: {', '.join(TABLE)}")
    flag("--texts", type=int, default=1000)
    flag("--rounds", type=int, help="default: 5, on a GPU 2")
    flag("--shape", choices=SHAPES)
    flag("--batch", type=int, help="rows of a step; default: 128, at Mistral's shape 16")
    flag("--negatives", type=int)
    flag("--length", type=int)
    flag("--micro-tokens", type=int, help="default: 2048, at Mistral's shape what fits")
    flag("--plain", action="store_true", help="one graph instead of cached gradients")
    flag("--recompute", action="store_true")
    flag("--compile", action="store_true")
    flag("--out", help="file for the table of device")
    flag("--rows", type=Path, help=argparse.SUPPRESS)  # where a part writes its rows
    args = parser.parse_args()
    if (args.what in ("versus", "part")) != (args.other is not None):
        parser.error("versus, and only versus, takes the folder of another checkout")
    small = {"shape": "tiny", "negatives": 1, "length": 32, "micro_tokens": 2048}
    small |= {"batch": 128, "rounds": 5}
    large = {"shape": "mistral-7b", "negatives": 7, "length": 512, "micro_tokens": 0}
    large |= {"batch": 16, "rounds": 2}
    if args.what == "device" and not on_gpu():
        large["shape"] = "tiny"
    for name, value in (large if args.what in ("step", "gpu", "device") else small).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what == "versus":
        args.rounds = max(args.rounds, 5)
    return args


def main():
    args = read_flags()
    if args.what in ("step", "one"):
        found = json.dumps(measure(args) | {"versions": versions()})
        ranks.print0(found)
        ranks.leave_ranks()
        return
    if args.what in ("table", "growth", "gpu", "versus"):
        print(versions(), flush=True)
    commands = {"table": table, "growth": growth, "gpu": gpu, "versus": versus}
    commands |= {"device": device_report, "part": run_one_part} | TABLE
    commands[args.what](args)


if __name__ == "__main__":
    run_command(main)
