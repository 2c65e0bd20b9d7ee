"""NV-Embed (Lee et al., arXiv 2405.17428): a decoder-only LLM as a text embedder, in plain PyTorch.

    text -> tokens -> decoder without causal mask -> latent attention -> mean -> unit vector

    python nvembed.py                  # embeds the model card's example with the default base
    python nvembed.py runs/stage2      # the same with a run, a folder or a hub id

The texts of a batch are packed one after another, without padding. Shapes stand at line ends:

    B texts             S tokens of a packed batch      T tokens of one text      r LoRA rank
    D model width       H query heads                   G key-value heads         K head width
    F MLP width         R latents                       C cross-attention heads   E their width

The paper's r is R here, and F.linear and the like are torch.nn.functional's. Masks are bool, True =
use. Modules and parameters have the names of the released weights.
"""

import data.threads  # before torch

import functools
import inspect
import itertools
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import adapters, dialects, folders, graphs, peers, sentence
from data.commands import Flags, InputError, check_ranges, one_line, run_command
from data.files import ROOT, check_types, read_json
from data.quantize import check_plain, quantize_weights
from data.texts import ahead, characters_read, check_dims, check_length, check_texts
from data.texts import encode_beginnings, eval_mode, parts


POOLINGS = ("latent", "mean", "eos", "self")  # compared in the paper, section 5.2.3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Config:
    """Shape of the decoder and how it embeds; names are config.json's where it has the field."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    eos_token_id: int
    bos_token_id: int | None = None  # None: the tokenizer has none (Qwen)
    head_dim: int | None = None  # K, default D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama-3's
    sliding_window: int | None = None  # of causal attention; a bidirectional mask has no window
    max_position_embeddings: int = 32768
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's queries and keys
    causal: bool = False  # the paper removes the causal mask (section 3.1)
    pooling: str = "latent"
    mask_instruction: bool = True  # an instruction is attended to but not pooled (section 4)
    add_eos: bool = True  # False: the tokenizer of a sentence-transformers folder adds none
    keep_eos: bool | None = None  # truncation keeps the eos; default: only where it is pooled
    max_seq_length: int = 512  # of a text unless `encode` is told another
    query_template: str = folders.QUERY_TEMPLATE  # "Instruct: {instruction}\nQuery: "
    num_latents: int = 512  # R
    num_cross_heads: int = 8  # C
    cross_dim_head: int | None = None  # E, default D

    def __post_init__(self):
        check_types(self)
        if self.pooling not in POOLINGS:
            raise InputError(f"field 'pooling': expected one of {POOLINGS}, got {self.pooling!r}")
        folders.check_template(self.query_template)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.cross_dim_head is None:
            self.cross_dim_head = self.hidden_size
        if self.keep_eos is None:
            self.keep_eos = self.pooling == "eos" and self.add_eos
        self.max_seq_length = min(self.max_seq_length, self.max_position_embeddings)


# ---- text to tokens


class Tokens(NamedTuple):
    """A text as token ids, and how many of the first ones are not pooled."""

    ids: list
    not_pooled: int


def query_prefix(instruction, template):
    """What stands before a query that has an instruction; the one place that knows it."""
    return template.replace("{instruction}", instruction) if instruction else ""


def tokenize(tokenizer, c, texts, instruction="", max_length=None):
    """list of str -> list of Tokens, at most max_length ids each; bos and eos are placed here.

    `instruction` is the bare task, one for all texts or a list with one for each. It is attended to
    but not pooled, so that the vector is one of the query and not of the task (section 4):

        <s> Instruct : Find it \n Query :  how deep is the lake ? </s>      pooled: "how" to </s>

    The rule: bos and each token that starts before the prefix's end, a trailing space not counted,
    are not pooled. This is the released rule wherever that space and the next word are one token.
    Documents have no instruction and are pooled whole, bos and eos too. A text that is too long
    loses its end and, as released, its eos with it, unless c.keep_eos.
    """
    texts, tasks = check_texts(texts, instruction)
    max_length = check_length(max_length, c)
    prefixes = [query_prefix(task, c.query_template) for task in tasks]
    if any(prefix.startswith("Instruct: Instruct:") for prefix in prefixes):
        raise InputError("instruction: expected the bare task; 'Instruct: ' is added here")
    whole = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
    encode_batch = tokenizer.encode_batch
    if not any(prefixes):
        encode_batch = tokenizer.encode_batch_fast  # offsets are needed for prefixes only
    bos = [] if c.bos_token_id is None else [c.bos_token_id]
    eos = [c.eos_token_id] if c.add_eos else []
    tokens = []
    encodings = encode_beginnings(encode_batch, whole, max_length)
    for prefix, encoding in zip(prefixes, encodings, strict=True):
        ids = bos + encoding.ids + eos
        if len(ids) > max_length:
            ids = ids[:max_length]
            if c.keep_eos:
                ids[-1] = c.eos_token_id
        not_pooled = 0
        if prefix and c.mask_instruction:
            end = len(prefix.removesuffix(" "))
            not_pooled = len(bos) + sum(start < end for start, _ in encoding.offsets)
        if not_pooled >= len(ids):
            where = f"max_length {max_length}: tokens {encoding.tokens[:8]}"
            raise InputError(f"{where}: expected an id of the text after the instruction's")
        tokens.append(Tokens(ids, not_pooled))
    return tokens


def pack(tokens, batch_tokens):
    """Splits texts, longest first, into batches of at most batch_tokens -> lists of indices."""
    lengths = [len(text.ids) for text in tokens]
    longest = max(lengths, default=0)
    if longest > batch_tokens:
        raise InputError(f"batch_tokens: expected at least a text's {longest}, got {batch_tokens}")
    batches, left = [], 0  # tokens left in the last batch
    for i in sorted(range(len(tokens)), key=lambda i: -lengths[i]):
        if lengths[i] > left:
            batches.append([])
            left = batch_tokens
        batches[-1].append(i)
        left -= lengths[i]
    return batches


# ---- layers


class Linear(nn.Linear):
    """W x + b and, with a LoRA adapter (Hu et al. 2021), + B low.

    There low = scale A dropout(x), with scale = alpha / r. The caller passes it: `lora_low`
    computes it once for all layers that read x. It computes in the dtype of x, whatever the weights
    are stored in: trained weights stay fp32.
    """

    r = 0  # rank of the adapter, 0: none

    def adapt(self, r, alpha):
        """Adds an adapter that changes nothing yet: A (r, in) is random and B (out, r) zero."""
        device = self.weight.device
        self.r = r
        self.lora_scale = alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x, low=None):
        """x (S, in), low (S, r) -> (S, out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, self.weight.to(x.dtype), bias)
        if low is None:
            return out
        return torch.addmm(out, low, self.lora_B.to(x.dtype).T)  # the sum costs no pass of its own

    def merged(self):
        """W + (alpha / r) B A, the weight that needs no adapter, in fp32."""
        weight = self.weight.float()
        if self.r:
            weight = weight + self.lora_scale * (self.lora_B @ self.lora_A)
        return weight


def lora_low(x, dropout, *layers):
    """For each of `layers`, which all read x: low = scale A dropout(x), (S, r), or None.

    None is for a layer without adapter. One dropout of x and one product serve all.
    """
    adapted = [layer for layer in layers if layer.r]
    if not adapted:
        return [None] * len(layers)
    a = torch.cat([layer.lora_A for layer in adapted]) if len(adapted) > 1 else adapted[0].lora_A
    low = F.linear(dropout(x), (a * adapted[0].lora_scale).to(x.dtype))  # (S, n r)
    lows = iter(low.split([layer.r for layer in adapted], dim=-1))
    return [next(lows) if layer.r else None for layer in layers]


class LoraDropout(nn.Module):
    """Dropout of what adapters read."""

    p = 0.0  # set by `add_lora`

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.is_cuda:
            return F.dropout(x, self.p)
        return x * random_mask(x.shape, self.p, x.device) * (1 / (1 - self.p))


@torch.compiler.disable  # compiled or not, a seed gives the same masks
def random_mask(shape, p, device):
    """bool mask, False with probability p (in steps of 2^-16).

    Four 16-bit numbers from each 64-bit draw: on CPUs five times as fast as F.dropout, whose draws
    would outweigh the layers.
    """
    size = math.prod(shape)
    draws = torch.empty(size // 4 + 1, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None)  # all 64 bits
    numbers = draws.view(torch.int16)[:size]
    lowest = -(2**15)
    return (numbers >= lowest + round(p * 2**16)).view(shape)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight in the dtype of x."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of x."""

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, self.bias.to(x.dtype), self.eps)


# ---- rotary position embedding


def rope_tables(c, lengths, device, dtype):
    """Cosine (S, 1, 1, K/2) and -sine, sine (S, 1, 2, K/2) of each token's position in its text."""
    exponents = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim
    frequencies = scale_frequencies(c.rope_theta**-exponents, c.rope_scaling)
    positions = torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths])
    angles = torch.outer(positions.to(device, non_blocking=True), frequencies)[:, None, None]
    sine = angles.sin()
    return angles.cos().to(dtype), torch.cat((-sine, sine), dim=2).to(dtype)


def scale_frequencies(frequencies, scaling):
    """Llama-3's scaling: high frequencies stay, low ones are divided by `factor`, smoothly."""
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (share + (1 - share) / scaling["factor"])


def rotate(x, cos, sin):
    """Turns each pair (x_i, x_{i + K/2}) by its position's angle: x (S, H, K) -> (S, H, K)."""
    halves = x.unflatten(-1, (2, -1))  # (S, H, 2, K/2)
    return torch.addcmul(halves * cos, halves.flip(2), sin).flatten(2)


# ---- attention


def attend(q, k, v, lengths, causal, window=None):
    """Attention within each text of a packed batch: who sees whom, and by which kernel.

    q (S, H, K), k and v (S, G, K), lengths a tuple of B ints that sum to S -> (S, H, K).

    Not causal: a token sees all tokens of its text. Causal: it sees itself and those before it, at
    most `window` tokens in all (Mistral's sliding window).
    """
    if not causal or (window and window >= max(lengths)):
        window = None  # bidirectional attention has none, and one that wide cuts nothing off
    if has_varlen_kernel(q):
        return attend_varlen(q, k, v, lengths, causal, window)

    # CPUs compute it in fp32: for bf16 products oneDNN makes, and keeps, kernels for every length.
    dtype = q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
    # Neighbours of equal length are computed at once: `pack` sorts texts by length.
    groups = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]
    sizes = [length * n for length, n in groups]
    pieces = [x.to(dtype).split(sizes) for x in (q, k, v)]
    out = []
    for (length, _), *qkv in zip(groups, *pieces, strict=True):
        qkv = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv]  # (n, H or G, T, K)
        out.append(attend_sdpa(*qkv, causal, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).to(q.dtype)


GROUPED_QUERIES = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11


def has_varlen_kernel(q):
    """Whether PyTorch's attention over packed texts runs on this device, dtype and head width."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_varlen(q, k, v, lengths, causal, window):
    """q (S, H, K), k and v (S, G, K) -> (S, H, K), in one kernel."""
    before = window - 1 if window else -1  # tokens seen before and after it, -1: all
    after = 0 if causal else -1
    ends, longest = cumulative_lengths(lengths, q.device), max(lengths)
    options = {"window_size": (before, after)}
    if GROUPED_QUERIES:
        options["enable_gqa"] = True
    else:
        k, v = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
    return varlen_attn(q, k, v, ends, ends, longest, longest, **options)


@functools.lru_cache(maxsize=1024)  # copied to the GPU once, not in each layer
@torch.inference_mode(False)  # training may use it next
def cumulative_lengths(lengths, device):
    ends = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def attend_sdpa(q, k, v, causal, window):
    """q (n, H, T, K), k and v (n, G, T, K) of n texts of equal length -> (n, H, T, K)."""
    mask = window_mask(q.shape[2], window, q.device) if window else None
    plain_causal = causal and mask is None  # needs no mask in memory
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain_causal, enable_gqa=True)


def window_mask(length, window, device):
    """(T, T) bool: True where a row's token sees a column's."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


# ---- decoder


class Attention(nn.Module):
    """Self-attention with grouped queries: x (S, D) -> (S, D)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        q_width = c.num_attention_heads * c.head_dim
        kv_width = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_width, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.o_proj = Linear(q_width, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.dropout = LoraDropout()

    def forward(self, x, rope, lengths):
        c = self.config
        q, k, v = self.project(x, rope)
        out = attend(q, k, v, lengths, c.causal, c.sliding_window).flatten(1)  # (S, H K)
        return self.o_proj(out, *lora_low(out, self.dropout, self.o_proj))

    def project(self, x, rope):
        head_dim = self.config.head_dim
        low_q, low_k, low_v = lora_low(x, self.dropout, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_proj(x, low_q).unflatten(-1, (-1, head_dim))  # (S, H, K)
        k = self.k_proj(x, low_k).unflatten(-1, (-1, head_dim))  # (S, G, K)
        v = self.v_proj(x, low_v).unflatten(-1, (-1, head_dim))  # (S, G, K)
        return rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope), v


class MLP(nn.Module):
    """SwiGLU: x (S, D) -> (S, D)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.dropout = LoraDropout()

    def forward(self, x):
        low_gate, low_up = lora_low(x, self.dropout, self.gate_proj, self.up_proj)
        gated = F.silu(self.gate_proj(x, low_gate)) * self.up_proj(x, low_up)  # (S, F)
        return self.down_proj(gated, *lora_low(gated, self.dropout, self.down_proj))


class Block(nn.Module):
    """A transformer block: x (S, D) -> (S, D)."""

    recompute = False  # activation checkpointing: the backward pass computes the block again from x

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, lengths):
        if self.recompute and self.training:
            return checkpoint(self.transform, x, rope, lengths, use_reentrant=False)
        return self.transform(x, rope, lengths)

    def transform(self, x, rope, lengths):
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Mistral, Llama, Qwen2 or 3 without LM head: ids (S,) of packed texts -> states (S, D)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, lengths, dtype):
        x = self.embed_tokens(ids).to(dtype)  # (S, D)
        rope = rope_tables(self.config, lengths, ids.device, dtype)
        return self.states(x, rope, lengths)

    def states(self, x, rope, lengths):
        """Embeddings (S, D) -> last states (S, D); what `replay_queries` replaces."""
        for block in self.layers:
            x = block(x, rope, lengths)
        return self.norm(x)


# ---- pooling


class CrossAttention(nn.Module):
    """Attention of C heads, E wide, over the latents or over the text itself; names as released.

    With x = LN(hidden), the output is the sum over heads of softmax(E^-0.5 x W_q k^T) v W_o. Keys k
    and values v are projections of LN(latents), the same for every token, so a head folds into

        softmax(x A) B       A = E^-0.5 W_q k^T  (D, R)       B = v W_o  (R, D)

    which is exact, differentiable and, where E = D, D / R + 1 times cheaper. In training A and B
    are computed at each forward pass; for how long `encode` keeps them see NVEmbed.inference_fold.
    """

    def __init__(self, c):
        super().__init__()
        width = c.num_cross_heads * c.cross_dim_head
        self.heads = c.num_cross_heads
        self.scale = c.cross_dim_head**-0.5
        self.norm = LayerNorm(c.hidden_size)
        self.norm_context = LayerNorm(c.hidden_size)
        self.fn = nn.ModuleDict()
        self.fn["to_q"] = Linear(c.hidden_size, width, bias=False)
        self.fn["to_kv"] = Linear(c.hidden_size, 2 * width, bias=False)
        self.fn["to_out"] = Linear(width, c.hidden_size, bias=False)

    def keys_values(self, context):
        """context (R, D) -> keys and values (R, C, E). to_kv holds all keys, then all values."""
        projected = self.fn.to_kv(self.norm_context(context))
        return projected.unflatten(-1, (2, self.heads, -1)).unbind(1)

    def fold(self, latents):
        """latents (R, D) -> A (D, C R) and B (C R, D), the heads' matrices side by side."""
        k, v = self.keys_values(latents)  # (R, C, E)
        w_q = self.fn.to_q.weight.to(latents.dtype).unflatten(0, (self.heads, -1))  # (C, E, D)
        w_o = self.fn.to_out.weight.to(latents.dtype).unflatten(1, (self.heads, -1))  # (D, C, E)
        a = self.scale * torch.einsum("ced,rce->dcr", w_q, k)
        b = torch.einsum("rce,dce->crd", v, w_o)
        return a.flatten(1), b.flatten(0, 1)

    def over_latents(self, hidden, folded):
        """hidden (S, D), what `fold` returned -> (S, D)."""
        a, b = folded
        scores = (self.norm(hidden) @ a).unflatten(-1, (self.heads, -1))  # (S, C, R)
        return scores.softmax(dim=-1).flatten(1) @ b

    def over_tokens(self, hidden, lengths):
        """Pooling "self": keys and values are the text's own. hidden (S, D) -> (S, D)."""
        q = self.fn.to_q(self.norm(hidden)).unflatten(-1, (self.heads, -1))  # (S, C, E)
        k, v = self.keys_values(hidden)
        return self.fn.to_out(attend(q, k, v, lengths, causal=False).flatten(1))


class GEGLU(nn.Module):
    """First half * gelu(second half), with the exact erf: (S, 8 D) -> (S, 4 D)."""

    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The latent layer's MLP: x (S, D) -> (S, D)."""

    def __init__(self, width):
        super().__init__()
        self.norm = LayerNorm(width)
        net = nn.Sequential(Linear(width, 8 * width), GEGLU(), Linear(4 * width, width))
        self.fn = nn.ModuleDict({"net": net})

    def forward(self, x):
        return self.fn.net(self.norm(x))


class LatentAttention(nn.Module):
    """Latent attention layer (section 3.2, arithmetic as released): hidden (S, D) -> (S, D).

    hidden + attention(LN(hidden), latents), then + MLP(LN(hidden)). The mean over tokens comes
    after it, in `pool`. With pooling "self" there are no latents: tokens attend to their own text.
    """

    def __init__(self, c):
        super().__init__()
        self.latents = None
        if c.pooling == "latent":
            self.latents = nn.Parameter(torch.randn(c.num_latents, c.hidden_size))
        self.cross_attend_blocks = nn.ModuleList([CrossAttention(c), FeedForward(c.hidden_size)])

    def fold_latents(self, dtype):
        """The matrices A and B of `CrossAttention`, computed and returned in `dtype`."""
        return self.cross_attend_blocks[0].fold(self.latents.to(dtype))

    def forward(self, hidden, lengths, folded=None):
        """`folded` is from `fold_latents`; if None, as in training, it is computed here."""
        attention, feed_forward = self.cross_attend_blocks
        if self.latents is None:
            hidden = hidden + attention.over_tokens(hidden, lengths)
        else:
            if folded is None:
                folded = self.fold_latents(hidden.dtype)
            hidden = hidden + attention.over_latents(hidden, folded)
        return hidden + feed_forward(hidden)


def pool(hidden, tokens, pooling):
    """hidden (S, D) of B packed texts -> (B, D): the mean of a text's tokens, or its last one.

    The mean leaves out a text's first `not_pooled` tokens: see `tokenize`.
    """
    if pooling == "eos":
        ends = itertools.accumulate(len(text.ids) for text in tokens)
        return hidden[[end - 1 for end in ends]]
    # Two segments of each text: its tokens that are not pooled, then those that are.
    sizes = [(text.not_pooled, len(text.ids) - text.not_pooled) for text in tokens]
    sizes = torch.tensor(sizes).flatten().to(hidden.device, non_blocking=True)  # (2 B,)
    sums = torch.segment_reduce(hidden, "sum", lengths=sizes, unsafe=True)  # unsafe: no checks
    return sums[1::2] / sizes[1::2, None]  # the second of each two


def shorten(x, dims):
    """Unit vectors (..., D) -> unit vectors (..., dims), the beginnings of these (Matryoshka)."""
    return x if dims == x.shape[-1] else F.normalize(x[..., :dims], dim=-1)


# ---- the embedder


class NVEmbed(nn.Module):
    """Decoder, pooling and tokenizer. Weights may be fp32 while it computes in `dtype`."""

    def __init__(self, config, tokenizer, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.embedding_model = Decoder(config)
        if config.pooling in ("latent", "self"):
            self.latent_attention_model = LatentAttention(config)
        self.kept_fold = (None, None)  # see `inference_fold`
        tokenizer.encode_special_tokens = True  # a literal "</s>" in a text is text
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def device(self):
        return self.embedding_model.embed_tokens.weight.device

    def forward(self, tokens, folded=None):
        """B Tokens, as one packed batch -> unit vectors (B, D), fp32."""
        packed = [*tokens, *self.padding(tokens)]
        lengths = tuple(len(text.ids) for text in packed)
        ids = torch.from_numpy(np.concatenate([text.ids for text in packed]))
        ids = ids.to(self.device, non_blocking=True)
        hidden = self.embedding_model(ids, lengths, self.dtype)  # (S, D)
        if self.config.pooling in ("latent", "self"):
            hidden = self.latent_attention_model(hidden, lengths, folded)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return F.normalize(pool(hidden, packed, self.config.pooling)[: len(tokens)], dim=-1)

    def padding(self, tokens):
        """In bf16 on CPUs: one more text, which nobody reads, so that batches have few sizes.

        oneDNN keeps a kernel, of 7 MB and more, for each size of a product. So sizes are rounded up
        to numbers whose binary digits after the fifth are zeros: at most a sixteenth more.
        """
        size = sum(len(text.ids) for text in tokens)
        missing = -size % 2 ** max(size.bit_length() - 5, 0)
        if not missing or self.device.type != "cpu" or self.dtype != torch.bfloat16:
            return []
        return [Tokens([self.config.eos_token_id] * missing, 0)]

    def tokenize(self, texts, instruction="", max_length=None):
        """The function `tokenize` with this model's tokenizer and config."""
        return tokenize(self.tokenizer, self.config, texts, instruction, max_length)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.tokenizer.encode_special_tokens = True  # a copied or unpickled one forgets it

    @torch.no_grad()
    def encode(
        self, texts, instruction="", max_length=None, batch_tokens=None, progress=False, dims=None
    ):
        """Embeds B texts -> np.ndarray (B, D) or (B, dims), fp32, unit rows, in the texts' order.

        `instruction` and max_length as in `tokenize`. `dims` keeps the first so many numbers of
        each vector, made a unit vector again. A batch has at most batch_tokens tokens; the default
        is 2,048 on CPUs, whose caches it suits, and 16,384 on GPUs, or as many as the longest text
        has. Beside the result, memory holds the tokens of at most 8,192 texts (CHUNK in
        data/texts.py), and those of the next ones, which a thread makes meanwhile.
        """
        texts, tasks = check_texts(texts, instruction)
        max_length = check_length(max_length, self.config)
        dims = check_dims(dims, self.config)
        embeddings = np.empty((len(texts), dims), dtype=np.float32)
        default_batch = 2048 if self.device.type == "cpu" else 16384
        chunks = parts(texts, characters_read(max_length))

        def tokens_of(chunk):
            return self.tokenize(texts[chunk], tasks[chunk], max_length)

        bar = tqdm(total=len(texts), disable=not progress, unit="text")
        with eval_mode(self), bar:
            folded = self.inference_fold()
            # Vectors are stored one batch late, so that a GPU always has the next to work on.
            store_previous = lambda: None
            for chunk, tokens in zip(chunks, ahead(tokens_of, chunks), strict=True):
                longest = max(len(text.ids) for text in tokens)
                limit = max(longest, default_batch) if batch_tokens is None else batch_tokens
                for batch in pack(tokens, limit):
                    vectors = shorten(self([tokens[i] for i in batch], folded), dims)
                    store = graphs.begin_copy(vectors, embeddings[chunk], batch)
                    store_previous()
                    store_previous = store
                    bar.update(len(batch))
            store_previous()
        return embeddings

    def inference_fold(self):
        """A and B of `CrossAttention.fold` for `encode`, in fp32, then cast. None without latents.

        They are kept between calls until the sum of a weight changes: sums cost a hundredth of a
        fold, and show practically every change of a weight, in place or not.
        """
        if self.config.pooling != "latent":
            return None
        layer = self.latent_attention_model
        weights = [layer.latents, *layer.cross_attend_blocks[0].parameters()]
        sums = [weight.sum(dtype=torch.float32) for weight in weights]
        state = (self.dtype, self.device, torch.stack(sums).tolist())
        kept_state, folded = self.kept_fold
        if state != kept_state:
            folded = [matrix.to(self.dtype) for matrix in layer.fold_latents(torch.float32)]
            self.kept_fold = (state, folded)
        return folded

    def compile_blocks(self):
        """Compiles what stands around attention in each block, for any number of tokens.

        Where that fails, for instance without a C++ compiler, the code runs as it is.
        """
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = 32  # variants: gradient or not, dropout or not, ...
        torch._inductor.config.fallback_random = True  # dropout's masks are those of plain code
        functions = (Attention.project, RMSNorm.forward, MLP.forward)
        project, norm, mlp = [torch.compile(function, dynamic=True) for function in functions]
        for block in self.embedding_model.layers:
            block.self_attn.project = functools.partial(project, block.self_attn)
            block.mlp.forward = functools.partial(mlp, block.mlp)
            for part in (block.input_layernorm, block.post_attention_layernorm):
                part.forward = functools.partial(norm, part)
        return self

    def replay_queries(self):
        """On a GPU, replays the decoder's kernels for batches of few tokens (data/graphs.py)."""
        self.embedding_model.states = graphs.Replay(self.embedding_model, cumulative_lengths)
        return self

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32, quantize=None, **settings):
        """Loads a folder or hub id -> NVEmbed in eval mode, its weights frozen.

        It may be a Mistral, Llama or Qwen base, NV-Embed-v1 or v2, a model saved here, or a PEFT
        adapter with its base. `settings` override the stored Config. `quantize` is int8, fp8 or
        int4 for smaller projections (data/quantize.py). With device None the weights stay mapped
        from the file, in its dtype, for a caller who moves them block by block.

        Loading is strict: a tensor that is missing, left over or of another shape is an InputError,
        but for two rules. A base has no latent layer: it is fresh. A base's LM head is dropped, and
        a latent layer that the pooling does not use. What is fresh or dropped is printed.
        """
        folder, dtype = folders.local_folder(path), folders.torch_dtype(dtype)
        if adapters.is_adapter(folder):
            base = adapters.adapter_base(folder)
            settings = peers.pooling_fields(folder, base) | settings
            model = cls.from_pretrained(base, device, dtype, quantize, **settings)
            return load_adapter(model, folder).requires_grad_(False)
        config = read_config(folder, **settings)
        with torch.device("meta"):
            model = cls(config, folders.read_tokenizer(folder, config), dtype)
        state = folders.read_weights(folder, device, dtype)
        fresh = folders.check_weights(state, model.state_dict(), folder)
        model.load_state_dict(state, strict=False, assign=True)  # checked: fresh or dropped by rule
        if fresh:
            model.latent_attention_model = fresh_pooling(config, device, dtype)
        model = model.eval().requires_grad_(False)
        return quantize_weights(model, quantize, PROJECTIONS) if quantize else model

    @torch.no_grad()
    def save_pretrained(self, path, dtype=None):
        """Writes a folder that `from_pretrained` loads, adapters merged in fp32.

        It has the released layout if the released code would embed the same; else its model_type is
        "nvembed-x", which that code refuses. The default dtype is the one that it computes in.
        """
        check_plain(self)
        dtype = folders.torch_dtype(dtype or self.dtype)
        adapted = lora_layers(self)
        state = {}
        for name, tensor in self.state_dict().items():
            if ".lora_" in name:
                continue
            layer = adapted.get(name.removesuffix(".weight"))
            weight = tensor if layer is None else layer.merged()
            state[name] = weight.to("cpu", dtype).contiguous()
        folders.write_model(path, state, asdict(self.config), self.tokenizer)


# ---- LoRA adapters


def lora_layers(model):
    """Name -> Linear of every layer with an adapter."""
    return {name: layer for name, layer in model.named_modules() if getattr(layer, "r", 0)}


def add_lora(model, r=16, alpha=32, dropout=0.1, targets=PROJECTIONS):
    """Adapts the projections in `targets`. r, alpha, dropout: the paper's; targets: assumed."""
    check_ranges({"r": r, "lora_alpha": alpha, "lora_dropout": dropout}, "add_lora: ")
    if not targets or not set(targets) <= set(PROJECTIONS):
        raise InputError(f"add_lora: targets: expected some of {PROJECTIONS}, got {targets}")
    if lora_layers(model):
        raise InputError("add_lora: there is an adapter already: save_pretrained merges it")
    for block in model.embedding_model.layers:
        for part in (block.self_attn, block.mlp):
            part.dropout.p = dropout
            for name, layer in part.named_children():
                if name in targets:
                    layer.adapt(r, alpha)


def save_adapter(model, path, base):
    """Writes the adapters in PEFT's format for AutoModel(base); the pooling layer is not in it."""
    layers = lora_layers(model)
    if not layers:
        raise InputError("save_adapter: expected a model with an adapter")
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    layer = next(iter(layers.values()))
    dropout = model.embedding_model.layers[0].mlp.dropout.p
    targets = sorted({name.split(".")[-1] for name in layers})
    adapters.write_adapter(path, state, base, layer.r, layer.lora_scale * layer.r, dropout, targets)


def load_adapter(model, folder):
    """Adds the LoRA adapter of a PEFT folder to a model; strict by name and shape."""
    add_lora(model, *adapters.adapter_settings(folder))
    expected = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    model.load_state_dict(adapters.read_adapter(folder, expected), strict=False)
    return model


# ---- files of a model; the dialects of config.json are in data/dialects.py


def read_config(folder, **settings):
    """config.json of a folder, some fields of it replaced by `settings` -> Config."""
    values = dialects.config_fields(folder, {field.name for field in fields(Config)})
    dialects.tell_changes(folder, values, settings)
    try:
        return Config(**(values | settings))
    except (TypeError, InputError) as error:  # a missing field, an unknown setting, a wrong type
        raise InputError(f"{Path(folder, 'config.json')}: {one_line(error)}") from error


def fresh_pooling(config, device, dtype):
    """An untrained latent layer, the same at every load; the caller's random state is untouched."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        layer = LatentAttention(config)
    return layer if device is None else layer.to(device, dtype)


# ---- sentence-transformers


def __getattr__(name):
    """`from nvembed import SentenceModule` imports sentence-transformers, and only that does."""
    if name == "SentenceModule":
        return sentence.sentence_module(NVEmbed)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- the command


def main():
    parser = Flags(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2:24", help="folder or hub id")
    args = parser.parse_args()
    from data.base import resolve  # this command alone fetches the default base
    from data.machine import fast_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NVEmbed.from_pretrained(resolve(args.model), device, fast_dtype(device))
    example = read_json(ROOT / "data" / "model_card.json")
    queries = model.encode(example["queries"], example["instruction"])
    documents = model.encode(example["documents"])
    for row in 100 * queries @ documents.T:
        print(" ".join(f"{score:9.4f}" for score in row))


if __name__ == "__main__":
    run_command(main)
