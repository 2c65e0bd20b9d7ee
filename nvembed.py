"""NV-Embed (Lee et al., arXiv 2405.17428): a decoder-only LLM turned into a text embedder, in plain PyTorch.

text -> tokens, pool mask -> packed batch -> decoder without causal mask -> latent attention -> mean -> unit
vector. B texts, S tokens of a packed batch, T tokens of one text, D model width, H query heads, G key-value
heads, K head width, F MLP width, R latents, C cross-attention heads, W LoRA rank. Masks are bool, True = use.

    python nvembed.py nvidia/NV-Embed-v2        embeds the model card's example and prints its 2 x 2 scores
"""

import bisect
import functools
import itertools
import json
import math
import re
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import faiss
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from tokenizers import Tokenizer
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

POOLINGS = ("latent", "mean", "eos", "self")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = ("mistral", "llama", "qwen2", "bidir_mistral")
LATENT = {"num_latents_value": "num_latents"} | {n: n for n in ("num_cross_heads", "cross_dim_head")}
FORMATS = {"int8": 127, "int4": 7, "int8-dynamic": 127, "fp8-dynamic": 448}  # their largest numbers
KNOWN = {"pooling": POOLINGS, "quantize": (None, *FORMATS)}  # values of Config's fields
DROPPED = re.compile(r"lm_head\.weight$|rotary_emb\.inv_freq$|^latent_attention_model\.")


class InputError(ValueError):
    """Bad input, told in one line: which file or argument, which field, what was expected."""


def expect(ok, message):
    if not ok:
        raise InputError(message)


def attempt(what, function, *args, **kwargs):
    """function(*args, **kwargs), its failure told as an InputError that begins with `what`."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # libraries raise many classes here, the bare Exception among them
        raise InputError(f"{what}: {(str(error).strip() or repr(error)).splitlines()[-1].strip()}") from None


def run(main):
    """Runs a command's main(); an InputError becomes one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def read_json(path):
    """A JSON object from a file -> dict."""
    found = attempt(f"{path}: expected a JSON file", lambda: json.loads(Path(path).read_text("utf-8")))
    expect(isinstance(found, dict), f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


@dataclass
class Config:
    """Decoder shape and how it embeds; fields have Hugging Face's names where config.json has them."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    eos_token_id: int
    bos_token_id: int | None = None  # None: the tokenizer has none (Qwen2)
    head_dim: int | None = None  # K, default D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama-3's
    sliding_window: int | None = None  # causal attention only: a bidirectional mask never has a window
    max_position_embeddings: int = 32768
    qkv_bias: bool = False  # Qwen2
    causal: bool = False  # the paper removes the causal mask (section 3.1)
    pooling: str = "latent"
    mask_instruction: bool = True  # instruction tokens are attended to but not pooled (section 4)
    keep_eos: bool | None = None  # truncation keeps the eos; default: where the eos is what is pooled
    num_latents: int = 512  # R
    num_cross_heads: int = 8  # C
    cross_dim_head: int | None = None  # K of a cross-attention head, default D
    pruned: bool = False  # zeros of the decoder's projections stay zero in training
    quantize: str | None = None  # what the decoder's projections are stored in, one of FORMATS

    def __post_init__(self):
        for field in fields(self):
            value, known = getattr(self, field.name), KNOWN.get(field.name)
            ok = isinstance(value, field.type) or (field.type is float and isinstance(value, int))
            what, ok = (f"one of {known}", value in known) if known else (field.type, ok)
            expect(ok, f"field '{field.name}': expected {what}, got {value!r}")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.cross_dim_head = self.cross_dim_head or self.hidden_size
        self.keep_eos = self.pooling == "eos" if self.keep_eos is None else self.keep_eos


def read_config(folder, **settings):
    """config.json of a Mistral / Llama / Qwen2 base, NV-Embed-v1 / v2 or a model saved here -> Config."""
    path, pooling = Path(folder, "config.json"), Path(folder, "1_Pooling", "config.json")
    raw = read_json(path)
    text, latent = raw.get("text_config", raw), raw.get("latent_attention_config", {})
    expect(isinstance(text, dict) and isinstance(latent, dict), f"{path}: field '*_config': expected objects")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # transformers 5 / before
    kind, qwen = rope.get("rope_type", rope.get("type", "default")), text.get("model_type") == "qwen2"
    biased = text.get("attention_bias") or text.get("mlp_bias") or False
    for field, value, known in (
        ("model_type", text.get("model_type"), FAMILIES),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", biased and not qwen, (False,)),
        ("rope_scaling", kind, ("default", "llama3")),
    ):
        expect(value in known, f"{path}: field '{field}': expected one of {known}, got {value!r}")
    names = {field.name for field in fields(Config)}
    found = {"qkv_bias": qwen} | {k: v for k, v in text.items() if k in names and v is not None}
    found["rope_scaling"] = rope if kind == "llama3" else None
    found |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if qwen and not text.get("use_sliding_window"):
        found["sliding_window"] = None
    if isinstance(found.get("eos_token_id"), list):  # Llama-3 lists several, the document's end first
        found["eos_token_id"] = found["eos_token_id"][0]
    found |= {ours: latent[theirs] for theirs, ours in LATENT.items() if theirs in latent}
    if "text_config" in raw:
        found["mask_instruction"] = raw.get("is_mask_instruction", True)
    elif pooling.exists():  # e5-mistral-7b-instruct and its like say here how a causal decoder is pooled
        last = read_json(pooling).get("pooling_mode_lasttoken", False)
        found |= {"causal": True, "pooling": "eos" if last else "mean", "mask_instruction": False}
    return attempt(path, Config, **(found | settings))  # names a missing field or an unknown setting


class Linear(nn.Linear):
    """W x + b in the input's dtype, whatever the weights are stored in: trained weights stay fp32. With an
    adapter (LoRA, Hu et al. 2021) W x + (alpha / W) B A dropped: A (W, in) and B (out, W) are trained;
    `dropped` is x after dropout, drawn once for the projections that read the same x. With `masked`, in training
    of a pruned model, (W + (alpha / W) B A) x without dropout, zero where W is: neither the product nor a gradient
    of W fills what was pruned."""

    masked = False

    def adapt(self, rank, alpha):
        self.lora_scale, device = alpha / rank, self.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x, dropped=None):
        weight = self.merged() if self.masked else self.weight
        out = F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.masked or not hasattr(self, "lora_A"):
            return out
        low = F.linear(dropped, (self.lora_scale * self.lora_A).to(x.dtype))
        return out + F.linear(low, self.lora_B.to(x.dtype))

    def merged(self):
        low = self.lora_scale * (self.lora_B @ self.lora_A) if hasattr(self, "lora_A") else 0
        return (self.weight.float() + low) * (self.weight != 0 if self.masked else 1)


class Quantized(nn.Module):
    """A Linear whose W is codes times scales: `weight` (out, in) int8 or fp8, int4 two a byte (out, in / 2);
    `scale` (out, groups), numbers of bf16, a group being gcd(in, 128) columns. The dynamic formats have one scale
    a row, also of x as it comes, and multiply the codes themselves."""

    def __init__(self, layer, form):
        super().__init__()
        out, width = layer.weight.shape
        self.bias, self.four, self.dynamic, self.top = layer.bias, form == "int4", "-" in form, FORMATS[form]
        self.group = width if self.dynamic else math.gcd(width, 128)
        dtype = torch.float8_e4m3fn if form.startswith("fp8") else torch.int8
        self.register_buffer("weight", torch.empty(out, width // (1 + self.four), dtype=dtype))
        self.register_buffer("scale", torch.empty(out, width // self.group))

    def rounded(self, x, scale):
        """x -> the nearest codes of it, in x's dtype."""
        x = (x / scale).clamp(-self.top, self.top)
        return x.to(self.weight.dtype).to(x.dtype) if self.weight.dtype.is_floating_point else x.round()

    def dense(self, dtype):
        """W (out, in)."""
        w = self.weight
        w = torch.stack((w << 4 >> 4, w >> 4), dim=-1).flatten(1) if self.four else w
        return (w.unflatten(1, (-1, self.group)).to(dtype) * self.scale.to(dtype)[..., None]).flatten(1)

    def forward(self, x, dropped=None):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.dynamic:
            return F.linear(x, self.dense(x.dtype), bias)
        wide = F.pad(x.float(), (0, 0, 0, -len(x) % 32))  # GPUs multiply no fewer rows
        scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / self.top  # (S, 1)
        codes, scales = self.rounded(wide, scale).to(self.weight.dtype), self.scale.T.float().contiguous()
        if self.weight.dtype == torch.int8:
            out = torch._int_mm(codes, self.weight.T) * scale * scales
        else:
            out = torch._scaled_mm(codes, self.weight.T, scale, scales, out_dtype=torch.bfloat16)
        return out[: len(x)].to(x.dtype) + (0 if bias is None else bias)


def keep(rows, widths, p, device):
    """Dropout masks, a bool (rows, width) for each width, False with probability p (to 16 bits). One draw of
    64-bit numbers for all is 5 times as fast on CPUs as F.dropout, whose draws would outweigh the layers."""
    sizes = [rows * width for width in widths]
    bits = torch.empty(sum(sizes) // 4 + 1, dtype=torch.int64, device=device).random_(-(2**63), None)
    masks = (bits.view(torch.int16)[: sum(sizes)] >= round(p * 2**16) - 2**15).split(sizes)
    return [mask.view(rows, width) for mask, width in zip(masks, widths, strict=True)]


def drop(x, mask, p):
    return x if mask is None else x * mask * (1 / (1 - p))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return x * (norm * norm / x.shape[-1] + self.eps).rsqrt().to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@functools.lru_cache(maxsize=16)  # not anew, with a copy to the GPU, in each layer
def cu_seqlens(lengths, device):
    return torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32, device=device)


def attend(q, k, v, lengths, causal, window=None):
    """Attention inside each text of a packed batch, and the only place that chooses a kernel.

    q (S, H, K), k and v (S, G, K), lengths a tuple of ints with sum S -> (S, H, K). `causal` is always said;
    a window (Mistral's, in tokens) holds for causal attention only.
    """
    longest = max(lengths)
    window = window if causal and window and window < longest else None
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        cu, reach = cu_seqlens(lengths, q.device), (window - 1 if window else -1, 0 if causal else -1)
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=reach, enable_gqa=True)
    explicit = q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled()
    runs = [(length, length * len(list(texts))) for length, texts in itertools.groupby(lengths)]
    out, sizes = [], [size for _, size in runs]  # sorted batches make runs of equal length long
    for (length, _), *qkv in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q_, k_, v_ = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in qkv)  # (n, H or G, T, K)
        products = explicit and length <= 1024  # SDPA's bf16 backward is 5 times as slow on CPUs as these
        banded = causal and (products or window)
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device) if banded else None
        mask = mask.tril().triu(1 - (window or length)) if banded else None
        if products:
            shared = q_.shape[1] // k_.shape[1]  # query heads of a key-value head are rows of one product
            q_, k_, v_ = q_.reshape(-1, shared * length, q_.shape[-1]), k_.flatten(0, 1), v_.flatten(0, 1)
            scores = torch.baddbmm(q_.new_empty(()), q_, k_.mT, beta=0, alpha=q_.shape[-1] ** -0.5)
            scores = scores.masked_fill(~mask.repeat(shared, 1), -torch.inf) if causal else scores
            one = (scores.softmax(dim=-1) @ v_).view(-1, q.shape[1], length, q.shape[-1])  # (n, H, T, K)
        else:
            triangle = causal and not banded  # without a mask in memory
            one = F.scaled_dot_product_attention(q_, k_, v_, mask, is_causal=triangle, enable_gqa=True)
        out.append(one.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def rope(c, lengths, device, dtype):
    """cos and sin of rotary position embedding for packed texts, each (S, 1, K), with Llama-3's scaling. The
    first half of sin is negated, for `rotate`."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim)
    if s := c.rope_scaling:  # short wavelengths stay, long ones are stretched by `factor`, smoothly between
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / s["factor"])
    positions = torch.from_numpy(np.concatenate([np.arange(n, dtype=np.float32) for n in lengths])).to(device)
    angles = torch.outer(positions, freq)[:, None]
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return angles.cos().repeat(1, 1, 2).to(dtype), sin.to(dtype)


def rotate(x, cos, sin):
    """Rotate-half RoPE, the layout of the Hugging Face weights: x (S, H, K) -> (S, H, K)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Block(nn.Module):
    """A transformer block: x (S, D) -> (S, D). With `recompute` the backward pass needs x alone."""

    lora_dropout, recompute = 0.0, False

    def __init__(self, c):
        super().__init__()
        d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.c, widths = c, {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.self_attn = nn.ModuleDict({name: Linear(d, width, c.qkv_bias) for name, width in widths.items()})
        self.self_attn["o_proj"] = Linear(q, d, bias=False)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.mlp = nn.ModuleDict({n: Linear(d, c.intermediate_size, False) for n in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = Linear(c.intermediate_size, d, bias=False)

    def forward(self, *args):
        again = self.recompute and self.training
        return checkpoint(self.body, *args, use_reentrant=False) if again else self.body(*args)

    def body(self, x, cos, sin, lengths):
        c, masks = self.c, [None] * 4
        if self.training and self.lora_dropout:
            widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.hidden_size, c.intermediate_size)
            masks = keep(len(x), widths, self.lora_dropout, x.device)
        q, k, v = self.before(x, cos, sin, masks[0])
        out = attend(q, k, v, lengths, c.causal, c.sliding_window).flatten(1)
        return self.after(x, out, *masks[1:])

    def before(self, x, cos, sin, mask):
        """The half before attention -> q (S, H, K), k and v (S, G, K). torch.compile is given halves."""
        h = self.input_layernorm(x)
        dropped = drop(h, mask, self.lora_dropout)
        found = (self.self_attn[name](h, dropped) for name in PROJECTIONS[:3])
        q, k, v = (x.unflatten(-1, (-1, self.c.head_dim)) for x in found)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after(self, x, out, *masks):
        """The half after it: x (S, D), out (S, H K) -> (S, D)."""
        p, mlp = self.lora_dropout, self.mlp
        x = x + self.self_attn.o_proj(out, drop(out, masks[0], p))
        h = self.post_attention_layernorm(x)
        dropped = drop(h, masks[1], p)
        h = F.silu(mlp.gate_proj(h, dropped)) * mlp.up_proj(h, dropped)
        return x + mlp.down_proj(h, drop(h, masks[2], p))


class Decoder(nn.Module):
    """Mistral / Llama / Qwen2 without LM head: ids (S,) of packed texts -> states (S, D) in `dtype`."""

    def __init__(self, c):
        super().__init__()
        self.c, self.embed_tokens = c, nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, lengths, dtype):
        x, (cos, sin) = self.embed_tokens(ids).to(dtype), rope(self.c, lengths, ids.device, dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, lengths)
        return self.norm(x)


class LatentAttention(nn.Module):
    """Latent attention layer (section 3.2; arithmetic and names as released): states (S, D) -> (S, D).

    h = h + to_out(attention(to_q(LN(h)), to_kv(LN(latents)))); h = h + FF(LN(h)), FF a GEGLU. With pooling
    "self" keys and values come from the text itself and there are no latents. The mean over tokens is the
    caller's.
    """

    def __init__(self, c):
        super().__init__()
        d, width = c.hidden_size, c.num_cross_heads * c.cross_dim_head
        self.heads, self.scale, self.cached = c.num_cross_heads, c.cross_dim_head**-0.5, (None, None)
        self.latents = nn.Parameter(torch.randn(c.num_latents, d)) if c.pooling == "latent" else None
        cross = {"to_q": Linear(d, width, bias=False), "to_kv": Linear(d, 2 * width, bias=False)}
        cross = nn.ModuleDict(cross | {"to_out": Linear(width, d, bias=False)})
        net = nn.ModuleDict({"0": Linear(d, 8 * d), "2": Linear(4 * d, d)})
        block = nn.ModuleDict({"norm": LayerNorm(d), "norm_context": LayerNorm(d), "fn": cross})
        ff = nn.ModuleDict({"norm": LayerNorm(d), "fn": nn.ModuleDict({"net": net})})
        self.cross_attend_blocks = nn.ModuleList([block, ff])

    def train(self, mode=True):
        self.cached = (None, None)  # fused optimizers do not count up _version
        return super().train(mode)

    def keys_values(self, context):
        """context (R, D) -> k and v, each (R, C, K); the released to_kv holds all keys, then all values."""
        block = self.cross_attend_blocks[0]
        return block.fn.to_kv(block.norm_context(context)).unflatten(-1, (2, self.heads, -1)).unbind(1)

    def fold(self, dtype):
        """Constant keys and values folded into the projections around them: A (D, C R) and B (C R, D) such
        that, a head at a time, softmax(scale x W_q k^T) v W_o = softmax(x A) B. Exact, and D / R + 1 times
        cheaper."""
        fn, (k, v) = self.cross_attend_blocks[0].fn, self.keys_values(self.latents.to(dtype))
        w_q = fn.to_q.weight.to(dtype).unflatten(0, (self.heads, -1))  # (C, K, D)
        w_o = fn.to_out.weight.to(dtype).unflatten(1, (self.heads, -1))  # (D, C, K)
        a = self.scale * torch.einsum("ckd,rck->dcr", w_q, k)
        return a.flatten(1), torch.einsum("rck,dck->crd", v, w_o).flatten(0, 1)

    def folded(self, dtype):
        """In training anew, with gradient; else made once in fp32 and kept until a weight changes."""
        weights = (self.latents, *self.cross_attend_blocks[0].parameters())
        state = (dtype, *((w.data_ptr(), w._version) for w in weights))
        if not self.training and self.cached[0] != state:
            with torch.no_grad():
                self.cached = (state, [t.to(dtype) for t in self.fold(torch.float32)])
        return self.fold(dtype) if self.training else self.cached[1]

    def forward(self, h, lengths):
        block, ff = self.cross_attend_blocks
        x = block.norm(h)
        if self.latents is not None:
            a, b = self.folded(h.dtype)
            weights = (x @ a).unflatten(-1, (self.heads, -1)).softmax(dim=-1)  # over R of (S, C, R)
            h = h + weights.flatten(1) @ b
        else:
            q = block.fn.to_q(x).unflatten(-1, (self.heads, -1))
            h = h + block.fn.to_out(attend(q, *self.keys_values(h), lengths, causal=False).flatten(1))
        x, gate = ff.fn.net["0"](ff.norm(h)).chunk(2, dim=-1)
        return h + ff.fn.net["2"](x * F.gelu(gate))  # exact erf GELU


CHUNK = 8192  # texts that `encode` holds as tokens at a time
BETWEEN = re.compile(r"(?<=\w) (?=\w)")  # where no token of a text goes across
Tokens = namedtuple("Tokens", "ids masked")  # a text's ids, and how many of the first ones are not pooled


def encode_start(encode, texts, count):
    """Encodings by a tokenizer's batch function, right in their first `count` ids: a long text is cut between two
    words first, since a tokenizer would read it to its end."""
    ends = [BETWEEN.search(text, 8 * count) if len(text) > 8 * count else None for text in texts]
    texts_cut = [text[: end.start()] if end else text for text, end in zip(texts, ends, strict=True)]
    encodings = encode(texts_cut, add_special_tokens=False)
    for i, end in enumerate(ends):
        if end and len(encodings[i].ids) < count:
            (encodings[i],) = encode([texts[i]], add_special_tokens=False)
    return encodings


def pack(tokens, batch_tokens):
    """Splits texts, longest first, into batches of at most batch_tokens tokens: lists of their indices."""
    lengths, batches, room = [len(t.ids) for t in tokens], [], 0
    longest = max(lengths, default=0)
    expect(longest <= batch_tokens, f"batch_tokens: expected at least a text's {longest}, got {batch_tokens}")
    for i in sorted(range(len(tokens)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


class NVEmbed(nn.Module):
    """Decoder, pooling, tokenizer. `forward`: B Tokens, as one packed batch -> unit vectors (B, D), fp32."""

    def __init__(self, config, tokenizer, dtype=torch.float32):
        super().__init__()
        self.config, self.tokenizer, self.dtype = config, tokenizer, dtype  # dtype: what is computed in
        self.embedding_model = Decoder(config)
        if config.pooling in ("latent", "self"):
            self.latent_attention_model = LatentAttention(config)
        for part, name in projections(self) if config.quantize else ():
            part[name] = Quantized(part[name], config.quantize)
        tokenizer.encode_special_tokens = True  # a literal "</s>" in a text is text, never an end token
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def device(self):
        return self.embedding_model.embed_tokens.weight.device

    def forward(self, tokens):
        pooling, lengths = self.config.pooling, tuple(len(t.ids) for t in tokens)
        ids = torch.from_numpy(np.concatenate([t.ids for t in tokens])).to(self.device)
        h = self.embedding_model(ids, lengths, self.dtype)  # (S, D)
        if pooling in ("latent", "self"):
            h = self.latent_attention_model(h, lengths)
        texts = h.to(torch.promote_types(h.dtype, torch.float32)).split(lengths)
        first = [n - 1 if pooling == "eos" else t.masked for t, n in zip(tokens, lengths, strict=True)]
        pooled = [text[i:].mean(dim=0) for i, text in zip(first, texts, strict=True)]
        return F.normalize(torch.stack(pooled), dim=-1)

    def tokenize(self, texts, instruction="", max_length=512):
        """list of str -> list of Tokens of at most max_length ids; bos and eos are placed here, by the
        config. `instruction` is one for all texts or a list of one for each.

        Not pooled are bos and every token that starts before the end of the instruction prefix without its
        trailing space. That is the released rule (the prefix's own token count, from position 0) wherever the
        space merges with what follows. A text longer than max_length loses its eos, as released, unless the
        config keeps it.
        """
        c, out = self.config, []
        tasks = [instruction] * len(texts) if isinstance(instruction, str) else instruction
        for task in set(tasks):
            bare = not task.startswith("Instruct:")
            expect(bare, "instruction: expected the bare task; 'Instruct: ' and 'Query: ' are added here")
        bos, room = [c.bos_token_id][: c.bos_token_id is not None], max_length - bool(c.keep_eos)
        prefixes = [f"Instruct: {task}\nQuery: " if task else "" for task in tasks]  # the one template
        batch = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
        fast = self.tokenizer.encode_batch_fast  # without offsets
        encodings = encode_start(self.tokenizer.encode_batch if any(prefixes) else fast, batch, max_length)
        for prefix, encoding in zip(prefixes, encodings, strict=True):
            ids, masked = ((bos + encoding.ids)[:room] + [c.eos_token_id])[:max_length], 0
            if prefix and c.mask_instruction:
                masked = len(bos) + bisect.bisect_left(encoding.offsets, (len(prefix) - 1,))
            expect(masked < len(ids), f"max_length: expected over {masked} (instruction), got {max_length}")
            out.append(Tokens(ids, masked))
        return out

    def compile_blocks(self):
        """torch.compile of the two halves of each block around attention, for any number of tokens; eager where
        it fails, for instance without a compiler. The compiled code is kept on disk for later runs."""
        torch._dynamo.config.suppress_errors = True
        for block in self.embedding_model.layers:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)
        return self

    @torch.no_grad()
    def encode(self, texts, instruction="", max_length=512, batch_tokens=None, progress=False):
        """Embeds B texts, batch_tokens tokens at a time -> np.ndarray (B, D), fp32, unit rows, in order.

        Beside the result memory holds CHUNK texts' tokens, those of the next made in a thread meanwhile.
        batch_tokens: by default 16,384 on GPUs and 2,048 on CPUs, whose caches it suits, or the longest text.
        """
        expect(not isinstance(texts, str), "texts: expected a list of str, got a str")
        tasks = [instruction] * len(texts) if isinstance(instruction, str) else instruction
        out = np.empty((len(texts), self.config.hidden_size), dtype=np.float32)
        training, least = self.training, 2048 if self.device.type == "cpu" else 16384

        def tokenize(start):
            part = slice(start, start + CHUNK)
            return self.tokenize(texts[part], tasks[part], max_length)

        self.eval()
        with tqdm(total=len(texts), disable=not progress, unit="text") as bar, ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(tokenize, 0)
            for start in range(0, len(texts), CHUNK):
                tokens, waiting = waiting.result(), ahead.submit(tokenize, start + CHUNK)
                longest = max(len(t.ids) for t in tokens)
                for batch in pack(tokens, batch_tokens or max(longest, least)):
                    out[start : start + CHUNK][batch] = self([tokens[i] for i in batch]).cpu()
                    bar.update(len(batch))
        self.train(training)
        return out

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32, **settings):
        """Loads a folder or hub id: a Mistral / Llama / Qwen2 base, NV-Embed-v1 / v2, a model saved here, or
        a PEFT adapter with its base. `settings` override the stored Config. Strict: a tensor that is missing,
        left over or of another shape is an InputError; what is fresh or dropped by rule is printed. Without a
        device the weights stay as they are in the file, mapped and not read, for a caller who moves them a
        block at a time."""
        folder = local_folder(path)
        if Path(folder, "adapter_config.json").exists() and not Path(folder, "config.json").exists():
            base = read_json(Path(folder, "adapter_config.json")).get("base_model_name_or_path")
            return load_adapter(cls.from_pretrained(base, device, dtype, **settings), folder)
        config = read_config(folder, **settings)
        with torch.device("meta"):
            model = cls(config, read_tokenizer(folder, config), dtype)
        state = read_weights(folder, device, dtype)
        for name, t in model.state_dict().items():  # loading compares names and shapes, not codes
            fits = (got := state.get(name, t).dtype) == t.dtype or min(got.itemsize, t.itemsize) > 1
            expect(fits, f"{folder}: tensor '{name}': expected {t.dtype} ({config.quantize}), got {got}")
        missing, left = attempt(folder, model.load_state_dict, state, strict=False, assign=True)
        unknown = [name for name in left if not DROPPED.search(name)]
        expect(not unknown, f"{folder}: tensor '{unknown and unknown[0]}': not part of this architecture")
        pooling = [name for name in model.state_dict() if name.startswith("latent_attention_model.")]
        expect(missing in ([], pooling), f"{folder}: tensor '{missing and missing[0]}': missing")
        if missing:  # a base model has no pooling layer yet; an untrained one is the same at every load
            with torch.random.fork_rng():
                torch.manual_seed(0)
                layer = LatentAttention(config)
                model.latent_attention_model = layer.to(device, dtype) if device else layer
        if device and config.quantize:
            layer, x = model.embedding_model.layers[0].mlp.up_proj, torch.zeros(1, config.hidden_size)
            attempt(f"{folder}: {config.quantize} on {device}", layer, x.to(device))
        if missing or left:
            print(f"{folder}: fresh: {missing[:1] or 'none'}; dropped: {left[:1] or 'none'}", file=sys.stderr)
        return model.eval()

    def save_pretrained(self, path, dtype=torch.bfloat16):
        """Writes a folder that `from_pretrained` loads, adapters merged in fp32: in the released layout where
        the model fits it, else with model_type "nvembed-x" so that released code refuses it. dtype None: the
        one that is computed in."""
        path, dtype = Path(path), dtype or self.dtype
        path.mkdir(parents=True, exist_ok=True)
        state = {name: t.contiguous() for name, t in self.state_dict().items() if ".lora_" not in name}
        state |= {f"{name}.weight": layer.merged() for name, layer in lora_layers(self).items()}
        state = {n: t.detach().to("cpu", dtype if t.itemsize > 1 else None) for n, t in state.items()}
        save_torch_state_dict(state, str(path), max_shard_size="5GB")
        self.tokenizer.save(str(path / "tokenizer.json"))
        for name, content in released_configs(self, path, dtype).items():
            (path / name).write_text(json.dumps(content, indent=2) + "\n")


def local_folder(path):
    """A folder as it is; else the folder of a hub model's safetensors and JSON files (never code)."""
    if Path(path).is_dir():
        return Path(path)
    what = f"model '{path}': not a folder, and not to be had from the hub"
    return Path(attempt(what, snapshot_download, str(path), allow_patterns=["*.safetensors", "*.json"]))


def read_tokenizer(folder, c):
    path = Path(folder, "tokenizer.json")
    tokenizer = attempt(f"{path}: expected a tokenizer", Tokenizer.from_file, str(path))
    size, wanted = tokenizer.get_vocab_size(), {c.bos_token_id, c.eos_token_id} - {None}
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    need = f"{path}: expected <= {c.vocab_size} tokens, special {wanted}; got {size}, special {special}"
    expect(size <= c.vocab_size and wanted <= special, need)
    return tokenizer


def read_tensors(path):
    return attempt(f"{path}: expected whole safetensors", safetensors.torch.load_file, path)


def read_weights(folder, device, dtype):
    """All tensors of a folder by released name: a base's 'model.layers...' and 'layers...' get the prefix."""
    index, files, state = Path(folder, "model.safetensors.index.json"), {"": "model.safetensors"}, {}
    if index.exists():
        files = read_json(index).get("weight_map")
        expect(isinstance(files, dict), f"{index}: field 'weight_map': expected an object, got {files!r}")
    for file in sorted(set(files.values())):
        for name, tensor in read_tensors(Path(folder, file)).items():
            if not name.startswith(("embedding_model.", "latent_attention_model.")):
                name = "embedding_model." + name.removeprefix("model.")
            state[name] = tensor.to(device, dtype if tensor.itemsize > 1 else None) if device else tensor
    return state


def released_configs(model, path, dtype):
    """The JSON files of the released layout: file name -> content, config.json last: with it all is there."""
    c, name = model.config, str(dtype).removeprefix("torch.")
    text = {"model_type": "bidir_mistral", "architectures": ["MistralModel"], "_name_or_path": str(path)}
    text |= {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": name} | asdict(c)
    latent = {"model_type": "latent_attention", "hidden_dim": c.hidden_size, "latent_dim": c.hidden_size}
    latent |= {theirs: getattr(c, ours) for theirs, ours in LATENT.items()} | {"output_normalize": True}
    plain = (c.pooling, c.mask_instruction) == ("latent", True)
    plain = plain and not (c.causal or c.qkv_bias or c.rope_scaling or c.keep_eos or c.quantize)
    config = {"model_type": "nvembed" if plain else "nvembed-x", "architectures": ["NVEmbedModel"]}
    config |= {"hidden_size": c.hidden_size, "torch_dtype": name, "padding_side": "right", "mask_type": "b"}
    config |= {"is_mask_instruction": c.mask_instruction, "add_eos": True, "add_pad_token": True}
    config |= {"text_config": text, "latent_attention_config": latent}
    special = {"bos_token": c.bos_token_id, "eos_token": c.eos_token_id, "pad_token": c.eos_token_id}
    special = {key: model.tokenizer.id_to_token(i) for key, i in special.items() if i is not None}
    tokens = special | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": "bos_token" in special}
    return {"tokenizer_config.json": tokens, "special_tokens_map.json": special, "config.json": config}


def projections(module):
    """(ModuleDict, name) of each of the decoder's projections in a module."""
    parts = [part for part in module.modules() if isinstance(part, nn.ModuleDict)]
    return [(part, name) for part in parts for name in part if name in PROJECTIONS]


@torch.no_grad()
def calibrated(model, tokens, batch_tokens=16384):
    """Goes through the decoder block by block, for a caller who changes it -> yields (block, grams, change): of each
    projection X^T X (in, in) of its inputs X, and the sum of 1 - cosine of the states that enter and leave the block.
    The next block sees the states after the change. Memory: the model, the states of all tokens, a block's grams."""
    states = []
    for batch in pack(tokens, batch_tokens):
        lengths = tuple(len(tokens[i].ids) for i in batch)
        ids = torch.from_numpy(np.concatenate([tokens[i].ids for i in batch])).to(model.device)
        x = model.embedding_model.embed_tokens(ids).to(model.dtype)
        states.append((x, *rope(model.config, lengths, model.device, model.dtype), lengths))
    for block in tqdm(model.embedding_model.layers, desc="calibration", unit="block"):
        change, grams = 0.0, {}

        def add(layer, args):
            grams[layer] = grams.get(layer, 0) + args[0].float().mT @ args[0].float()

        hooks = [part[name].register_forward_pre_hook(add) for part, name in projections(block)]
        for x, *rest in states:
            change += (1 - F.cosine_similarity(x.float(), block(x, *rest).float(), dim=-1)).sum().item()
        for hook in hooks:
            hook.remove()
        yield block, grams, change
        states = [(block(*state), *state[1:]) for state in states]


def compress(model, tokens, change):
    """Replaces the decoder's projections, block by block, by change(Linear, gram) -> layer: `prune` or `quantize`.
    gram is X^T X of the inputs for `tokens`; without tokens the identity: all inputs count the same."""
    for block, grams, _ in calibrated(model, tokens):
        for part, name in projections(block):
            gram = grams[part[name]] if grams else torch.eye(part[name].in_features, device=model.device)
            part[name] = change(part[name], gram)


def drop_blocks(model, tokens, count):
    """Removes the `count` blocks that change the states least (ShortGPT, Men et al. 2024), measured in one pass of
    the whole model."""
    layers = model.embedding_model.layers
    expect(0 <= count < len(layers), f"drop_blocks: expected less than the {len(layers)} blocks, got {count}")
    kept = sorted(np.argsort([change for _, _, change in calibrated(model, tokens)], kind="stable")[count:])
    model.embedding_model.layers = nn.ModuleList(layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)


def compensate(weight, gram, group, plan):
    """The solver of SparseGPT (Frantar and Alistarh 2023) and GPTQ (Frantar et al. 2022): weight (out, in), its
    columns replaced from left to right, what that changes in W X made up by the columns further right (Optimal Brain
    Surgeon). The Cholesky factor of the inverse of gram = X^T X holds what each step needs. Of each `group` of
    columns plan(columns (out, n), d (n,)) -> replace(column (out,), its index) -> (out,), d the factor's diagonal:
    an error e costs (e / d)^2. Weights that are zero stay zero."""
    w, kept, h = weight.float().clone(), weight != 0, gram.double().clone()
    h.diagonal().add_(0.01 * h.diagonal().mean() + 1e-9)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    for i in range(w.shape[1]):
        if i % group == 0:
            replace = plan(w[:, i : i + group], u.diagonal()[i : i + group])
        new = replace(w[:, i], i % group) * kept[:, i]
        w[:, i + 1 :] -= torch.outer((w[:, i] - new) / u[i, i], u[i, i + 1 :])
        w[:, i] = new
    return w


def largest(score, share, width):
    """bool mask of score's shape, False at the lowest `share` of each `width` numbers."""
    rows = score.reshape(-1, width)
    lowest = rows.argsort(dim=1, stable=True)[:, : round(share * width)]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False).view(score.shape)


@torch.no_grad()
def prune(layer, gram, method, sparsity):
    """Sets a share of W to zero, or two in each four of a row ("2:4") -> layer. Compared are: magnitude |W|, wanda
    (Sun et al. 2023) |W| |X_j|, both in a row; sparsegpt (W / d)^2 in 128 columns."""
    asked = re.fullmatch(r"(magnitude|wanda|sparsegpt) (0?\.\d*[1-9]\d*|2:4)", f"{method} {sparsity}")
    expect(asked, f"prune: expected magnitude, wanda or sparsegpt, 0.x or 2:4, got {method}, {sparsity}")
    weight, share, four = layer.weight.float(), float(sparsity.replace("2:4", "0.5")), 4 * (sparsity == "2:4")

    def plan(columns, d):
        mask = largest((columns / d) ** 2, share, four or columns.numel())
        return lambda column, j: column * mask[:, j]

    score = weight.abs() * (gram.diagonal().sqrt() if method == "wanda" else 1)
    plain = weight * largest(score, share, four or len(gram))
    weight = compensate(weight, gram, four or 128, plan) if method == "sparsegpt" else plain
    layer.weight.data = weight.to(layer.weight.dtype)
    return layer


@torch.no_grad()
def quantize(layer, gram, form):
    """Linear -> Quantized, by GPTQ; with the identity for gram there is nothing to make up: rounding to nearest."""
    out, scales = Quantized(layer, form), []

    def plan(columns, d):
        scale = (columns.abs().amax(dim=1) / out.top).bfloat16().float()
        scales.append(scale + (scale == 0))
        return lambda column, j: out.rounded(column, scales[-1]) * scales[-1]

    weight, out.scale = compensate(layer.weight, gram, out.group, plan), torch.stack(scales, dim=1)
    codes = out.rounded(weight, out.scale.repeat_interleave(out.group, dim=1)).to(out.weight.dtype)
    out.weight = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4) if out.four else codes
    return out


def compact(embeddings, form, dims=None):
    """Embeddings (B, D) for an index: their first `dims` numbers, as "int8" (B, dims), a row's largest being 127 (its
    length is not kept: cosines do not need it), or as "binary" (B, dims / 8), the signs."""
    x = embeddings[:, :dims] / np.abs(embeddings[:, :dims]).max(axis=1, keepdims=True).clip(1e-9)
    return np.packbits(x > 0, axis=1) if {"binary": 1, "int8": 0}[form] else np.rint(127 * x).astype(np.int8)


def rescored(queries, bits, documents, k, factor=4):
    """The k best documents of each query -> cosines (B, k), indices (B, k), best first: factor x k by Hamming
    distance of the signs (Yamada et al. 2021), then by cosine. queries (B, D or more), of which the first D are used;
    bits (N, D / 8) and documents (N, D), floats or int8, as `compact` gives them."""
    queries = queries[:, : documents.shape[1]]
    _, found = faiss.knn_hamming(compact(queries, "binary"), bits, min(factor * k, len(bits)))
    query, near = (torch.from_numpy(x.astype(np.float32)) for x in (queries[:, None], documents[found]))
    scores, order = F.cosine_similarity(query, near, dim=-1).topk(min(k, len(bits)))
    return scores.numpy(), np.take_along_axis(found, order.numpy(), axis=1)


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def add_lora(model, rank=16, alpha=32, dropout=0.1, targets=PROJECTIONS):
    """Adapts the decoder's layers named in `targets` (rank, alpha: section 5.1; the targets: assumed)."""
    expect(not lora_layers(model), "add_lora: there is an adapter already: merge it by save_pretrained first")
    for layer in model.embedding_model.layers:
        layer.lora_dropout = dropout
    for layer in (part[name] for part, name in projections(model) if name in targets):
        layer.adapt(rank, alpha)


def save_adapter(model, path, base):
    """Writes the adapters in PEFT's format for AutoModel; pooling is not PEFT's and stays in our folder."""
    path, layers, block = Path(path), lora_layers(model), model.embedding_model.layers[0]
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if ".lora_" in name}
    state = {f"base_model.model.{n.removeprefix('embedding_model.')}.weight": t for n, t in state.items()}
    safetensors.torch.save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    layer, targets = next(iter(layers.values())), sorted({name.split(".")[-1] for name in layers})
    config = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": str(base)}
    config |= {"r": len(layer.lora_A), "lora_alpha": layer.lora_scale * len(layer.lora_A), "bias": "none"}
    config |= {"lora_dropout": block.lora_dropout, "target_modules": targets, "inference_mode": True}
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model, folder):
    """Adds the LoRA adapter of a PEFT folder to a model; strict by name and shape."""
    source, path = Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")
    config = read_json(source)
    settings = [config.get(name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")]
    other = [name for name in config if config[name] and re.search("use_|_pattern|modules_to_save", name)]
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none" and not other
    need = "expected LoRA with r, lora_alpha, lora_dropout, target_modules"
    expect(plain and None not in settings, f"{source}: {need}; got {other or config}")
    add_lora(model, *settings)
    state = read_tensors(path).items()
    state = {re.sub(r"^.*?(layers\..*)\.weight$", r"embedding_model.\1", name): t for name, t in state}
    missing, left = attempt(path, model.load_state_dict, state, strict=False)
    wrong = left + [name for name in missing if ".lora_" in name]
    expect(not wrong, f"{path}: tensor '{wrong and wrong[0]}': missing or unknown")
    return model


def fast_dtype(device="cpu"):
    """bf16 on GPUs and on CPUs whose matrix products are faster in it (AMX 6-8 times, AVX-512 twice); else fp32."""
    fast = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if torch.device(device).type != "cpu" or fast else torch.float32


def main():
    expect(len(sys.argv) == 2, "usage: python nvembed.py FOLDER_OR_HUB_ID")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NVEmbed.from_pretrained(sys.argv[1], device, fast_dtype(device))
    example = read_json(Path(__file__).parent / "data" / "model_card.json")
    queries = model.encode(example["queries"], example["instruction"])
    for row in 100 * queries @ model.encode(example["documents"]).T:
        print(" ".join(f"{score:9.4f}" for score in row))


if __name__ == "__main__":
    run(main)
