"""What bench.py and bench_device.py share: random models, texts, contests, peers, one timed step.

Importing it puts the root of this checkout on the path.
"""

import contextlib
import functools
import gzip
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
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
from nvembed import Tokens, pack

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


def print_header():
    print("| | ours | peer | ratio | range of the turns | target | |")
    print("|---|---|---|---|---|---|---|", flush=True)


def spread(values):
    return statistics.median(values), min(values), max(values)


def error(x, true):
    return ((x.float() - true).norm() / true.norm()).item()


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


# ---- steps and memory


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


@contextlib.contextmanager
def plain_gradients():
    """train_step without cached gradients inside the block."""
    backward = train.backward
    train.backward = functools.partial(backward, cached=False)
    try:
        yield
    finally:
        train.backward = backward


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


# ---- the machine


def on_gpu():
    return torch.cuda.is_available()


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
