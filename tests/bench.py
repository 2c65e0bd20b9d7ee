"""Speed beside what one would use instead, and how cost grows; each measurement is a command of its own.

    python tests/bench.py                              the CPU table: ours, peer, ratio, range (half an hour)
    python tests/bench.py --only encode,mine           some of its lines
    python tests/bench.py growth                       tokens/s against length, batch, width, number of texts
    python tests/bench.py cache                        cached against plain step; peak memory against batch
    python tests/bench.py step                         LoRA step at Mistral-7B shape on this GPU, random weights
    torchrun --nproc-per-node 8 tests/bench.py step    the same on 8 ranks
    python tests/bench.py gpu                          encoding at that shape: share of peak, peer, one query

Weights are random and the same on both sides, as are token ids; embeddings are compared before anything is
timed. Contestants take turns in one process, one thread, CPU time (on GPUs: wall time), first round thrown away,
median and range of the others. On CPUs set OMP_NUM_THREADS=1. Run nothing beside it.
"""

import argparse
import contextlib
import copy
import functools
import gzip
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import faiss
import mine
import numpy as np
import torch
import torch.nn.functional as F
import train
from data import prepare
from nvembed import Config, LatentAttention, NVEmbed, Tokens, add_lora, pack
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # layers, D, F, H, G, vocabulary, width of a cross-attention head
    "mistral-7b": (32, 4096, 14336, 32, 8, 32000, 4096),
    "smollm2": (30, 576, 1536, 9, 3, 49152, 576),
    "small": (8, 512, 1536, 8, 2, 49152, 64),
    "tiny": (4, 256, 768, 8, 4, 1000, 64),
}


def random_model(shape, dtype, tokenizer=None, device="cpu", **settings):
    layers, d, f, h, g, vocabulary, cross = SHAPES.get(shape, shape)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "cross_dim_head": cross} | settings
    config = Config(vocabulary, d, f, layers, h, g, **settings)
    with torch.device("meta"):
        model = NVEmbed(config, tokenizer or Tokenizer(models.BPE()), dtype)
    for p in model.parameters():
        p.requires_grad_(False)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.to(dtype).named_parameters():
        p.fill_(1) if "norm" in name else p.normal_(std=0.02, generator=generator)
    return model.eval()


# ---- contests


def clock(device="cpu"):
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def turns(contestants, rounds, device="cpu"):
    """name -> function, called in turns -> name -> its times, the first round's thrown away."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, function in contestants.items():
            start = clock(device)
            function()
            seconds[name].append(clock(device) - start)
    return {name: times[1:] for name, times in seconds.items()}


def tell(what, target, seconds, note=""):
    """One line of the table: seconds["peer"] over seconds["ours"], each turn's own ratio for the range."""
    ours, peer = seconds["ours"], seconds["peer"]
    ratio = statistics.median(peer) / statistics.median(ours)
    low, high = (edge(b / a for a, b in zip(ours, peer, strict=True)) for edge in (min, max))
    times = f"{statistics.median(ours):.3g} s | {statistics.median(peer):.3g} s"
    print(f"| {what} | {times} | {ratio:.2f} | {low:.2f} - {high:.2f} | {target} | {note} |", flush=True)
    return ratio


def cold(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def same_direction(a, b, least=0.9999):
    cosine = F.cosine_similarity(torch.as_tensor(a).float(), torch.as_tensor(b).float()).min().item()
    assert cosine >= least, f"ours and the peer's differ: cosine {cosine:.6f}"


def texts_of(count):
    """The first questions and paragraphs of the shipped SQuAD set, as they come; longer lists repeat them."""
    with gzip.open(ROOT / "data/eval/squad.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row.get("doc") or row["query"] for row in rows]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    return (texts * (count // len(texts) + 1))[:count]


def mistral(model):
    """The same weights as transformers' MistralModel."""
    from transformers import MistralConfig, MistralModel

    c = model.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim"
    names += " num_key_value_heads rms_norm_eps rope_theta bos_token_id eos_token_id"
    config = {name: getattr(c, name) for name in names.split()} | {"sliding_window": None, "pad_token_id": 2}
    with torch.device("meta"):
        peer = MistralModel(MistralConfig(**config, attn_implementation="sdpa"))
    state = model.embedding_model.state_dict()
    peer.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    peer.rotary_emb = type(peer.rotary_emb)(peer.config)  # its buffers are not in the state
    return peer.eval()


def sentence_transformer(model, folder):
    """The same weights in sentence-transformers, causal, with mean pooling -> a loaded SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import PreTrainedTokenizerFast

    mistral(model).save_pretrained(folder)
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    bos, eos = (tokenizer.id_to_token(i) for i in (1, 2))
    special = {"single": f"{bos} $A {eos}", "special_tokens": [(bos, 1), (eos, 2)]}
    tokenizer.post_processor = TemplateProcessing(**special)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    peer = Transformer(str(folder), model_kwargs={"dtype": model.dtype}, max_seq_length=512)
    return SentenceTransformer(modules=[peer, Pooling(model.config.hidden_size, "mean"), Normalize()])


def encode(args, shape="small"):
    """Encoding of 1,000 texts and of 32 mixed ones, tokenising included, against sentence-transformers, which
    sorts by length and pads batches of 32. Also our model against its own matrix products."""
    tokenizer = Tokenizer.from_file(str(prepare.base() / "tokenizer.json"))
    model = random_model(shape, torch.bfloat16, tokenizer, causal=True, pooling="mean")
    with tempfile.TemporaryDirectory() as folder:
        peer = sentence_transformer(model, Path(folder))
    texts, cut = texts_of(args.texts), {"convert_to_tensor": True, "show_progress_bar": False}
    theirs = functools.partial(peer.encode, batch_size=32, **cut)
    same_direction(model.encode(texts), theirs(texts))
    few = [text[: 20 * (i + 1)] for i, text in enumerate(t for t in texts[:200] if len(t) > 640)][:32]
    models = {"eager": model, "compiled": copy.deepcopy(model).compile_blocks()}
    cold_times = {how: [cold(lambda m=m: m.encode(few)) for _ in range(2)] for how, m in models.items()}
    for name, some, target, rounds in (("texts", texts, 2.0, 1), ("mixed texts", few, 3, 4)):
        contest = {name: functools.partial(m.encode, some) for name, m in models.items()}
        seconds = turns(contest | {"peer": lambda some=some: theirs(some)}, rounds * args.rounds)
        tokens = sum(len(t.ids) for t in model.tokenize(some))
        for how in models:
            note = f"{tokens / statistics.median(seconds[how]):,.0f} tokens/s"
            note += "" if some is texts else "; cold {:.2f} s, then {:.2f} s".format(*cold_times[how])
            tell(
                f"encode {len(some):,} {name}, {how}", f">= {target}", seconds | {"ours": seconds[how]}, note
            )
    for how, m in models.items():
        products(m, args, how)


def products(model, args, name, length=128, size=4096):
    """Forward pass of a packed batch against the matrix products of its linear layers and of its attention."""
    ids, lengths = torch.randint(3, 40000, (size,)), (length,) * (size // length)
    decoder, c = model.embedding_model, model.config
    shapes = [
        (m.in_features, m.out_features) for m in decoder.layers[0].modules() if hasattr(m, "in_features")
    ]
    layers = [(torch.randn(size, i).bfloat16(), torch.randn(o, i).bfloat16()) for i, o in shapes]
    out = [torch.empty(size, o, dtype=torch.bfloat16) for _, o in shapes]
    q = torch.randn(len(lengths) * c.num_attention_heads, length, c.head_dim).bfloat16()
    scores, mixed = torch.empty(len(q), length, length).bfloat16(), torch.empty_like(q)

    def alone():
        for _ in range(c.num_hidden_layers):
            for (x, w), y in zip(layers, out, strict=True):
                torch.mm(x, w.t(), out=y)
            torch.bmm(q, q.mT, out=scores)
            torch.bmm(scores, q, out=mixed)

    with torch.no_grad():
        contest = {"ours": lambda: decoder(ids, lengths, torch.bfloat16), "peer": alone}
        what = f"matrix products / whole decoder, {size // length} texts of {length}, {name}"
        tell(what, ">= 0.60", turns(contest, 2 * args.rounds))


def padded(tokens, parts):
    """Micro-batches of a padding trainer: ids and mask (b, T)."""
    for part in parts:
        rows = [torch.tensor(tokens[i].ids) for i in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
        yield ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)


def lora(args):
    """A LoRA step (bf16 base, AdamW, in-batch InfoNCE of 24 rows x 3 texts) against transformers + peft with the
    same targets, rank, dropout, ids, and the same sorted micro-batches, padded; peft's adapters in bf16, which
    is its fastest. Compile time is in the last column."""
    from peft import LoraConfig, get_peft_model

    tokenizer = Tokenizer.from_file(str(prepare.base() / "tokenizer.json"))
    rows = prepare.read_rows(ROOT / "data/wikipedia_question.jsonl.gz")[:24]
    texts = [row["query"] for row in rows] + [t for row in rows for t in (row["pos"][0], row["neg"][0])]
    for dropout in (0.1, 0.0):
        model = random_model(
            (8, *SHAPES["smollm2"][1:]), torch.bfloat16, tokenizer, causal=True, pooling="mean"
        )
        how = {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": dropout,
            "target_modules": list(train.nvembed.PROJECTIONS),
        }
        peer = get_peft_model(mistral(model), LoraConfig(**how), autocast_adapter_dtype=False).train()
        add_lora(model, dropout=dropout)
        tokens, documents = model.tokenize(texts, "", 192), torch.arange(48).view(24, 2)
        parts = pack(tokens, 4096)
        s = train.Settings(batch=24, negatives=1, temperature=0.05, micro_tokens=4096, lr=0.0)
        batch = train.Batch(tokens, torch.ones(24, 2, dtype=torch.bool), documents, documents[:, :1])
        adapted = dict(train.trained(model))
        optimizers = [
            torch.optim.AdamW(ps, lr=0.0, fused=True)
            for ps in (adapted.values(), [p for p in peer.parameters() if p.requires_grad])
        ]

        def theirs():
            found = []
            for ids, mask in padded(tokens, parts):
                h = peer(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
                found.append((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
            order = torch.tensor([i for part in parts for i in part]).argsort()
            loss = train.batch_loss(F.normalize(torch.cat(found)[order], dim=-1), batch, s)[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizers[1].step()
            optimizers[1].zero_grad()
            return loss.item()

        plain, train.backward = train.backward, functools.partial(train.backward, cached=False)
        ours = lambda: train.train_step(model.train(), optimizers[0], batch, s, 0)["loss"]
        try:
            for compiled in (False, True):
                if compiled:
                    model.compile_blocks()
                first, n = cold(ours), sum(len(t.ids) for t in tokens)
                if not dropout:
                    assert abs(ours() - theirs()) < 0.02, (ours(), theirs())
                seconds = turns({"ours": ours, "peer": theirs}, args.rounds)
                note = f"{n / statistics.median(seconds['ours']):,.0f} tokens/s; first step {first:.0f} s"
                name = "compiled" if compiled else "eager"
                tell(f"LoRA step, dropout {dropout}, {name}", ">= 1.5", seconds, note)
        finally:
            train.backward = plain


def latent(args):
    """Attention half of the latent layer at released shape, folded (ours) against unfolded, and the whole layer;
    error of both against fp32 on some tokens."""
    d, heads, size = 4096, 8, 8192
    config = Config(32000, d, 14336, 1, 32, 8, 2)
    with torch.device("meta"):
        layer = LatentAttention(config)
    layer.to_empty(device="cpu")
    for name, p in layer.to(torch.bfloat16).requires_grad_(False).named_parameters():
        p.fill_("norm" in name and "weight" in name) if p.dim() == 1 else p.normal_(std=0.02)
    layer.eval().latents.normal_()
    h = torch.randn(size, d).bfloat16()
    block, ff = layer.cross_attend_blocks
    a, b = layer.folded(torch.bfloat16)

    def folded(x):
        return (x @ a).unflatten(-1, (heads, -1)).softmax(dim=-1).flatten(1) @ b

    def unfolded(x):
        fn, (k, v) = block.fn, layer.keys_values(layer.latents.to(x.dtype))
        q, k, v = (t.transpose(0, 1) for t in (fn.to_q(x).unflatten(-1, (heads, -1)), k, v))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return fn.to_out(out.transpose(0, 1).flatten(1))

    def whole(attention):
        y = h + attention(block.norm(h))
        x, gate = ff.fn.net["0"](ff.norm(y)).chunk(2, dim=-1)
        return y + ff.fn.net["2"](x * F.gelu(gate))

    with torch.no_grad():
        x = block.norm(h)
        true = unfolded(x[:64].float())
        errors = [((f(x[:64]).float() - true).norm() / true.norm()).item() for f in (folded, unfolded)]
        assert max(errors) < 0.02, errors
        note = f"error {errors[0]:.4f}, unfolded {errors[1]:.4f}"
        seconds = turns({"ours": lambda: folded(x), "peer": lambda: unfolded(x)}, args.rounds)
        tell(f"latent layer's attention, S = {size:,}", ">= 6", seconds, note)
        contest = {"ours": lambda: layer(h, None), "peer": lambda: whole(unfolded)}
        tell("whole latent layer", "limit 2.1", turns(contest, args.rounds))


def rows(args):
    """Rows -> tokens -> packed batches, ours alone: tokens/s of one core, and its share of a training step."""
    tokenizer = Tokenizer.from_file(str(prepare.base() / "tokenizer.json"))
    model = random_model("tiny", torch.float32, tokenizer)
    found = prepare.read_rows(ROOT / "data/wikipedia_question.jsonl.gz")
    dataset = train.Dataset(
        "wikipedia", "Given a question, retrieve passages that answer the question", False, found, []
    )
    s = train.Settings(batch=128, negatives=4)
    positives, rates = train.known_positives([dataset]), []
    for step in range(args.rounds + 1):
        start, places = clock(), train.schedule([len(found)], s, step)
        batch = train.make_batch(model, train.drawn([found], [dataset], places, s), s, positives)
        for part in pack(batch.tokens, s.micro_tokens):
            np.concatenate([batch.tokens[i].ids for i in part])
        rates.append(sum(len(t.ids) for t in batch.tokens) / (clock() - start))
    low, high = min(rates[1:]), max(rates[1:])
    print(
        f"| rows to packed batches | {statistics.median(rates[1:]):,.0f} tokens/s | | | {low:,.0f} - {high:,.0f} | >= 600,000 | |"
    )


def mining(args):
    """Exact search at D = 4,096, documents kept in bf16, against faiss's flat index of the same vectors in fp32:
    512 queries, 50,000 documents, 100 deep."""
    d_MD, q_QD = (F.normalize(torch.randn(n, 4096), dim=-1).bfloat16() for n in (50000, 512))
    index, shards = faiss.IndexFlatIP(4096), d_MD.split(mine.SHARD)
    index.add(d_MD.float().numpy())
    ours, q = functools.partial(mine.search, q_QD.float(), shards, 100), q_QD.float().numpy()
    (_, ids), (_, true) = ours(), index.search(q, 100)
    recall = statistics.mean(len({*a} & {*b}) / 100 for a, b in zip(ids.tolist(), true.tolist(), strict=True))
    seconds = turns({"ours": ours, "peer": lambda: index.search(q, 100)}, args.rounds)
    note = f"recall {recall:.4f}; vectors {d_MD.nbytes / 2**20:.0f} MiB, peer {2 * d_MD.nbytes / 2**20:.0f}"
    tell("search, 512 x 50,000 x 4,096", ">= 1.8", seconds, note)


def growth(args):
    """How cost grows, ours alone, compiled, bf16: tokens/s of encoding, and memory against the number of texts."""
    tokenizer = Tokenizer.from_file(str(prepare.base() / "tokenizer.json"))
    model = random_model("small", torch.bfloat16, tokenizer, causal=False, pooling="mean").compile_blocks()
    words = " ".join(texts_of(3000)).split()

    def texts(length, count):  # of about `length` tokens, cut to it
        return [" ".join(words[i * 7 % 50000 :][: length + 1]) for i in range(count)]

    def rate(model, length, count, **how):
        some = texts(length, count)
        size = sum(len(t.ids) for t in model.tokenize(some, "", length))
        seconds = turns({"ours": lambda: model.encode(some, "", length, **how)}, args.rounds)["ours"]
        return f"{size / statistics.median(seconds):,.0f} ({size / max(seconds):,.0f} - {size / min(seconds):,.0f})"

    for length in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        print(
            f"texts of {length} tokens: {rate(model, length, max(2, 32768 // length))} tokens/s", flush=True
        )
    for budget in (512, 2048, 8192, 32768):
        print(f"batch_tokens {budget}: {rate(model, 128, 256, batch_tokens=budget)} tokens/s", flush=True)
    for width in (128, 256, 512, 1024, 2048):
        wide = (4, width, 3 * width, width // 64, max(1, width // 256), 49152, 64)
        wide = random_model(wide, torch.bfloat16, tokenizer, pooling="mean").compile_blocks()
        print(f"width {width}, 4 layers: {rate(wide, 128, 128)} tokens/s", flush=True)
    model = random_model((*SHAPES["tiny"][:5], 49152, 64), torch.bfloat16, tokenizer, pooling="mean")
    for count in (1000, 10000, 100000):
        some = [" ".join(words[i % 50000 :][: 4 + i % 9]) for i in range(count)]
        (before, _), start = memory(torch.device("cpu")), time.perf_counter()
        out = model.encode(some)
        seconds, above = time.perf_counter() - start, memory(torch.device("cpu"))[1] - before - out.nbytes
        print(
            f"{count:,} short texts: {count / seconds:,.0f} texts/s, {above / 2**20:.0f} MiB above the result",
            flush=True,
        )


def gpu(args):
    """Encoding at Mistral-7B shape on this GPU: share of its peak at length 512, sentence-transformers beside it,
    and one query of 64 tokens."""
    device, length, size = train.join().type, 512, 512 if torch.cuda.is_available() else 8
    tokenizer = Tokenizer.from_file(str(prepare.base() / "tokenizer.json"))
    *shape, _, cross = SHAPES[args.shape]
    model = random_model(
        (*shape, 49152, cross), torch.bfloat16, tokenizer, device, causal=True, pooling="mean"
    )
    words = " ".join(texts_of(3000)).split()
    texts = [" ".join(words[i * 7 % 50000 :][:length]) for i in range(size)]
    (query,) = (" ".join(words[:64]),)
    weights = sum(p.numel() for p in model.parameters()) - model.embedding_model.embed_tokens.weight.numel()
    peak = train.measured_peak(torch.device(device), torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        peer = sentence_transformer(model, Path(folder)).to(device)
    theirs = functools.partial(peer.encode, batch_size=32, convert_to_tensor=True, show_progress_bar=False)
    same_direction(model.encode(texts[:8]), theirs(texts[:8]).cpu(), 0.999)
    for compiled in (False, True):
        name = "compiled" if compiled else "eager"
        if compiled:
            model.compile_blocks()
        seconds = turns(
            {"ours": lambda: model.encode(texts), "peer": lambda: theirs(texts)}, args.rounds, device
        )
        rate = size * length / statistics.median(seconds["ours"])
        note = f"{rate:,.0f} tokens/s, {2 * weights * rate / peak:.0%} of {peak / 1e12:.0f} TFLOP/s"
        tell(f"encode {size} texts of {length}, {name}", ">= 1.5, >= 60 %", seconds, note)
        contest = {"ours": lambda: model.encode([query], "", 64), "peer": lambda: theirs([query])}
        tell(f"one query of 64 tokens, {name}", "<= 8 ms", turns(contest, 10 * args.rounds, device))


def memory(device):
    """Bytes: (now, peak since the last call)."""
    if device.type == "cuda":
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return tuple(int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def measure(args):
    """One size -> {"seconds": median of the rounds, "loaded", "peak": bytes, ...}."""
    device = train.join()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    s = train.Settings(
        batch=args.batch, negatives=args.negatives, max_length=args.length, micro_tokens=args.micro_tokens
    )
    s = train.replace(
        s, dtype=str(dtype).removeprefix("torch."), recompute=args.recompute, compile=args.compile
    )
    train.NVEmbed.from_pretrained = lambda *_, **__: random_model(args.shape, dtype)
    model, _ = train.build("random", s, device)
    optimizer = torch.optim.AdamW(train.trained(model).values(), lr=1e-5, fused=True)
    train.optimizer_tensors(model.train(), optimizer)  # its memory is part of what is loaded
    generator = torch.Generator().manual_seed(1 + train.rank())
    rows, columns = args.batch // train.world(), 1 + args.negatives
    ids = torch.randint(3, model.config.vocab_size, (rows * (1 + columns), args.length), generator=generator)
    valid = torch.ones(args.batch, columns, dtype=torch.bool)
    documents = torch.arange(valid.numel()).view(valid.shape)
    batch = train.Batch([Tokens(text, 0) for text in ids.tolist()], valid, documents, documents[:, :1])
    (loaded, _), seconds, true = memory(device), [], train.backward
    train.backward = lambda *a: true(*a, cached=not args.plain)
    for step in range(args.rounds + 1):
        start = time.perf_counter()
        record = train.train_step(model, optimizer, batch, s, step)
        seconds.append(time.perf_counter() - start)
    peak, tokens, used = train.measured_peak(device, dtype), ids.numel() * train.world(), memory(device)[1]
    found = {"shape": args.shape, "batch": args.batch, "tokens": tokens, "ranks": train.world()}
    found |= {"seconds": statistics.median(seconds[1:]), "range": [min(seconds[1:]), max(seconds[1:])]}
    weights = sum(p.numel() for p in model.parameters()) - model.embedding_model.embed_tokens.weight.numel()
    share = 6 * weights * tokens / found["seconds"] / peak / train.world()
    found |= {"loaded_gib": loaded / 2**30, "peak_gib": used / 2**30, "share_of_peak_at_6N": share}
    return found | {"loss": record["loss"], "plain": args.plain}


def own_process(*flags):
    line = [sys.executable, __file__, "one", *map(str, flags)]
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def cache(args):
    """Cached against plain step on the same micro-batches, and the memory above the loaded model from batch 128 to 1,024."""
    flags = ["--shape", args.shape, "--length", args.length, "--negatives", args.negatives]
    flags += ["--micro-tokens", args.micro_tokens, "--rounds", args.rounds]
    found = {
        kind: own_process("--batch", 128, *flags, *more)
        for kind, more in (("cached", []), ("plain", ["--plain"]))
    }
    ratio = found["cached"]["seconds"] / found["plain"]["seconds"]
    print(
        f"cached {found['cached']['seconds']:.2f} s, plain {found['plain']['seconds']:.2f} s: {ratio:.2f} x"
    )
    for batch in (128, 256, 512, 1024):
        one = own_process("--batch", batch, *flags, "--rounds", 1)
        above = one["peak_gib"] - one["loaded_gib"]
        print(
            f"batch {batch:5}: {one['seconds']:.1f} s, {above:.3f} GiB above the {one['loaded_gib']:.2f} loaded"
        )
    above = found["plain"]["peak_gib"] - found["plain"]["loaded_gib"]
    print(f"plain, batch 128: {above:.3f} GiB above")


TABLE = {"encode": encode, "lora": lora, "latent": latent, "mine": mining, "rows": rows, "cache": cache}


def table(args):
    """The whole table, each part in a process of its own, so that none sees another's memory."""
    print(
        "| | ours | peer | ratio | range of the turns | target | |\n|---|---|---|---|---|---|---|", flush=True
    )
    for name in (args.only or ",".join(TABLE)).split(","):
        flags = ["--rounds", args.rounds, "--texts", args.texts]
        subprocess.run([sys.executable, __file__, name, *map(str, flags)], check=True)


def versions():
    names = "torch numpy faiss-cpu tokenizers transformers sentence-transformers peft".split()
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next(
        (line.split(": ")[1] for line in cpu.splitlines() if "model name" in line), platform.machine()
    )
    able = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu]
    cpu = ", ".join([name, *able, f"{torch.get_num_threads()} thread(s)"])
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return ", ".join([hardware, *(f"{name} {importlib.metadata.version(name)}" for name in names)])
    return hardware


def main():
    what = {"table": table, "growth": growth, "gpu": gpu} | TABLE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("what", nargs="?", default="table", choices=(*what, "step", "one"))
    flag("--only", help=f"lines of the table: {', '.join(TABLE)}")
    flag("--texts", type=int, default=1000)
    flag("--rounds", type=int, default=5)
    flag("--shape", choices=SHAPES)
    flag("--batch", type=int, default=128)
    flag("--negatives", type=int)
    flag("--length", type=int)
    flag("--micro-tokens", type=int)
    flag("--plain", action="store_true", help="one graph instead of cached gradients")
    flag("--recompute", action="store_true")
    flag("--compile", action="store_true")
    args = parser.parse_args()
    small = {"shape": "tiny", "negatives": 1, "length": 32, "micro_tokens": 2048}
    large = {"shape": "mistral-7b", "negatives": 7, "length": 512, "micro_tokens": 8192}
    for name, value in (large if args.what in ("step", "gpu") else small).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what in ("step", "one"):
        train.tell(json.dumps(measure(args) | {"versions": versions()}))
        return
    if args.what in ("table", "growth", "gpu"):
        print(versions(), flush=True)
    what[args.what](args)


if __name__ == "__main__":
    main()
