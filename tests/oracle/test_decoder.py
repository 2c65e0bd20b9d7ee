"""nvembed.py against independent references, each comparison with a control that must fail."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import peft
import pytest
import references as ref
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from tokenizers import Tokenizer

import nvembed
from nvembed import Config, InputError, LatentAttention, NVEmbed, Tokens

TASK = "Given a question, retrieve passages that answer the question"
TEXTS = ["the sun", "", "how do plants make food?", "x" * 40, "(7) 苹果 🍎\nend", "the sun", " a b"]
LATENT = "latent_attention_model."


def gap(a, b):
    """Largest absolute difference."""
    return float((torch.as_tensor(a).float() - torch.as_tensor(b).float()).abs().max())


def cosine(a, b):
    """Smallest cosine between rows of equal index."""
    return float(F.cosine_similarity(torch.as_tensor(a).float(), torch.as_tensor(b).float(), dim=-1).min())


def random_ids(length, seed=0):
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def states(model, ids):
    with torch.no_grad():
        return model.embedding_model(torch.tensor(ids), (len(ids),), model.dtype)


def error_of(function, *args, **settings):
    """The message of the InputError that a call must raise: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **settings)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------- decoder

FAMILIES = {
    "mistral": ("mistral", {}),
    "mistral-wide-heads": ("mistral", {"head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "llama3-scaling": ("llama", {"rope_parameters": ref.LLAMA3}),
    "qwen2-bias": ("qwen2", {"bos_token_id": None}),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_equals_transformers(name, causal, tmp_path, tokenizer_json):
    family, changes = FAMILIES[name]
    oracle, ids = ref.hf_model(family, **changes), random_ids(41)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    expected = ref.hf_states(oracle, [ids], causal)[0]
    assert 0.5 < expected.std() < 2  # else 1e-5 would say little
    model = NVEmbed.from_pretrained(tmp_path, causal=causal, pooling="eos")
    assert gap(states(model, ids), expected) <= 1e-5
    flipped = NVEmbed.from_pretrained(tmp_path, causal=not causal, pooling="eos")
    assert gap(states(flipped, ids), expected) > 0.1
    half = NVEmbed.from_pretrained(tmp_path, dtype=torch.bfloat16, causal=causal, pooling="eos")
    assert half.embedding_model.norm.weight.dtype == torch.bfloat16
    assert 0.999 <= cosine(states(half, ids), expected) < 0.9999999
    model.dtype = torch.bfloat16  # weights stay fp32, as in training
    assert states(model, ids).dtype == torch.bfloat16
    assert cosine(states(model, ids), expected) >= 0.999


def test_default_base_equals_transformers(real_tokenizers):
    """Real weights (SmolLM2-135M-Instruct), whose states have outliers of a hundred and more."""
    folder = real_tokenizers["smollm2"].parent
    model = NVEmbed.from_pretrained(folder, causal=True, pooling="eos")
    (ids,) = [t.ids for t in model.tokenize(["The sun rises in the east and sets in the west."])]
    oracle = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for causal in (True, False):
        model.config.causal, expected = causal, ref.hf_states(oracle, [ids], causal)[0]
        assert gap(states(model, ids), expected) / expected.abs().max() <= 1e-5
        model.dtype = torch.bfloat16
        assert 0.999 <= cosine(states(model, ids), expected) < 0.9999999
        model.dtype, model.config.causal = torch.float32, not causal
        assert cosine(states(model, ids), expected) < 0.9


def interleaved(x, cos, sin):
    """RoPE on pairs (0, 1), (2, 3), ...: the layout of the original Llama weights, not of these."""
    cos, sin = (t[..., : x.shape[-1] // 2].repeat_interleave(2, -1) for t in (cos, sin))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


BREAKS = {
    "window": ("mistral-window", {"sliding_window": None}),
    "window off by one": ("mistral-window", {"sliding_window": 8}),
    "scaling": ("llama3-scaling", {"rope_scaling": None}),
    "rope base": ("mistral", {"rope_theta": 9000.0}),
    "eps": ("mistral", {"rms_norm_eps": 1e-2}),
    "interleaved": ("mistral", {}),
}


@pytest.mark.parametrize("what", BREAKS)
def test_broken_decoder_differs(what, tmp_path, tokenizer_json, monkeypatch):
    name, settings = BREAKS[what]
    family, changes = FAMILIES[name]
    oracle, ids = ref.hf_model(family, **changes), random_ids(41)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    if what == "interleaved":
        monkeypatch.setattr(nvembed, "rotate", interleaved)
    model = NVEmbed.from_pretrained(tmp_path, causal=True, pooling="eos", **settings)
    assert gap(states(model, ids), ref.hf_states(oracle, [ids], causal=True)[0]) > 1e-3


def test_window_holds_for_causal_attention_only(tmp_path, tokenizer_json):
    oracle = ref.hf_model("mistral", sliding_window=9)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    ids = random_ids(41)
    wide = NVEmbed.from_pretrained(tmp_path, causal=False, pooling="eos", sliding_window=None)
    narrow = NVEmbed.from_pretrained(tmp_path, causal=False, pooling="eos")
    assert gap(states(wide, ids), states(narrow, ids)) == 0


def test_qwen2_window_that_is_switched_off(tmp_path, tokenizer_json):
    """Qwen2's config.json names a window and says beside it that it is not used."""
    oracle, ids = ref.hf_model("qwen2"), random_ids(41)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(raw | {"sliding_window": 4, "use_sliding_window": False})
    )
    model = NVEmbed.from_pretrained(tmp_path, causal=True, pooling="eos")
    assert gap(states(model, ids), ref.hf_states(oracle, [ids], causal=True)[0]) <= 1e-5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 10000.0, "rope_scaling": ref.LLAMA3},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3"} | ref.LLAMA3},
    ],
)
def test_config_of_older_transformers(rope, tmp_path, tokenizer_json):
    """rope_theta and rope_scaling at the top level, as every released config.json has them."""
    scaling = rope.get("rope_scaling") or {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    oracle, ids = ref.hf_model("llama", rope_parameters=scaling), random_ids(41)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(raw | rope))
    model = NVEmbed.from_pretrained(tmp_path, causal=True, pooling="eos")
    assert gap(states(model, ids), ref.hf_states(oracle, [ids], causal=True)[0]) <= 1e-5


def test_unknown_rope_scaling_is_an_error(tmp_path, tokenizer_json):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    ref.write_base(tmp_path, tokenizer_json, ref.hf_model("llama", rope_parameters=yarn))
    assert "config.json: field 'rope_scaling'" in error_of(NVEmbed.from_pretrained, tmp_path)


# ----------------------------------------------------------------------------------------------- latent layer

SMALL = {"num_latents": 24, "num_cross_heads": 4, "cross_dim_head": 48}


def latent_layer(pooling="latent", seed=0):
    """A layer with random weights and its weights by name; queries so large that the softmax is not flat."""
    c = Config(**ref.TINY, **SMALL, pooling=pooling)
    layer = LatentAttention(c).eval()
    shapes = {LATENT + n: tuple(p.shape) for n, p in layer.named_parameters()}
    weights = ref.random_weights(shapes, seed)
    weights[LATENT + "cross_attend_blocks.0.fn.to_q.weight"] *= 2
    layer.load_state_dict({n.removeprefix(LATENT): t for n, t in weights.items()})
    return layer, weights


def random_states(*lengths, seed=1):
    return torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pooling", ["latent", "self"])
@torch.no_grad()
def test_latent_layer_equals_unfolded(pooling):
    (layer, w), lengths = latent_layer(pooling), (5, 17, 17, 1, 9)
    h = random_states(*lengths)
    padded = torch.nn.utils.rnn.pad_sequence(h.split(lengths), batch_first=True)
    real = torch.arange(17) < torch.tensor(lengths)[:, None]
    expected = ref.latent_layer(w, padded, heads=4, lengths=lengths if pooling == "self" else None)[real]
    assert expected.std() > 0.5 and gap(expected, h) > 1
    for training in (True, False):
        assert gap(layer.train(training)(h, lengths), expected) <= 1e-5
    half = layer(h.bfloat16(), lengths)  # fp32 weights, computed in bf16
    assert half.dtype == torch.bfloat16
    assert 0.999 <= cosine(half, expected) < 0.9999999
    assert cosine(layer.bfloat16()(h.bfloat16(), lengths), expected) >= 0.999


@pytest.mark.parametrize("pooling", ["latent", "self"])
@pytest.mark.parametrize("broken", ["to_kv halves", "to_q heads", "to_out heads", "geglu halves"])
@torch.no_grad()
def test_other_layouts_of_the_latent_layer_differ(broken, pooling):
    """Values before keys, heads inside the width, the gate first: each would be another model."""
    (layer, w), h = latent_layer(pooling), random_states(9)
    lengths, (block, ff) = (9,) if pooling == "self" else None, layer.cross_attend_blocks
    before = gap(layer(h, (9,)), ref.latent_layer(w, h[None], 4, lengths)[0])
    if broken == "to_out heads":  # columns (d h) in place of (h d)
        weight = block.fn.to_out.weight
        weight.copy_(weight.unflatten(1, (4, -1)).transpose(1, 2).flatten(1))
    elif broken == "to_q heads":
        weight = block.fn.to_q.weight
        weight.copy_(weight.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1))
    else:
        weight = block.fn.to_kv.weight if broken == "to_kv halves" else ff.fn.net["0"].weight
        weight.copy_(weight.roll(len(weight) // 2, 0))
    after = gap(layer(h, (9,)), ref.latent_layer(w, h[None], 4, lengths)[0])
    assert before <= 1e-5 and after > 0.1


def test_gelu_is_exact(monkeypatch):
    (layer, w), h, gelu = latent_layer(), random_states(9), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))
    with torch.no_grad():
        assert gap(layer(h, (9,)), ref.latent_layer(w, h[None], 4)[0]) > 1e-4


def updates(layer):
    """Ways in which weights change under the cached fold: name -> function."""

    def each(change):
        with torch.no_grad():
            for p in layer.parameters():
                change(p)

    def step(**kind):
        layer.train()(random_states(9), (9,)).square().sum().backward()
        assert all(p.grad.norm() > 0 for p in layer.parameters())
        torch.optim.AdamW(layer.parameters(), lr=0.02, **kind).step()

    def load(**kind):
        layer.load_state_dict({n: t * 1.3 for n, t in layer.state_dict().items()}, **kind)

    return {
        "in place": lambda: each(lambda p: p.mul_(1.3)),
        "copy_": lambda: each(lambda p: p.copy_(p.roll(1, 0))),
        "new data": lambda: each(lambda p: setattr(p, "data", p.data * 1.3)),
        "adamw": lambda: step(foreach=False),
        "foreach adamw": lambda: step(foreach=True),
        "fused adamw": lambda: step(fused=True),
        "load_state_dict": load,
        "load_state_dict, assign": lambda: load(assign=True),
    }


@pytest.mark.parametrize("through_training", [False, True])
@pytest.mark.parametrize("how", updates(None))
def test_cached_fold_follows_the_weights(how, through_training):
    (layer, _), h = latent_layer(), random_states(9)

    def expected():
        return ref.latent_layer({LATENT + n: p.detach() for n, p in layer.named_parameters()}, h[None], 4)[0]

    with torch.no_grad():
        before = layer(h, (9,))
        assert layer.folded(h.dtype) is layer.folded(h.dtype)  # kept
    layer.train(through_training)
    updates(layer)[how]()
    layer.eval()
    with torch.no_grad():
        assert gap(layer(h, (9,)), expected()) <= 3e-5 and gap(before, expected()) > 0.1


@pytest.mark.parametrize(
    "name", ["latents", "to_q", "to_kv", "to_out", "norm_context.weight", "norm_context.bias"]
)
def test_cached_fold_follows_each_weight(name):
    (layer, _), h = latent_layer(), random_states(9)
    (parameter,) = [
        p for n, p in layer.named_parameters() if n.removesuffix(".weight").endswith(name) or n.endswith(name)
    ]
    with torch.no_grad():
        before = layer(h, (9,))
        parameter.mul_(-1)
        expected = ref.latent_layer({LATENT + n: p for n, p in layer.named_parameters()}, h[None], 4)[0]
        assert gap(layer(h, (9,)), expected) <= 1e-5 and gap(before, expected) > 0.1


@pytest.mark.parametrize("pooling", ["latent", "self"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_through_the_fold(training, pooling):
    (layer, w), lengths = latent_layer(pooling), (9,) if pooling == "self" else None
    h = random_states(9).requires_grad_()
    target = random_states(9, seed=2)
    ours, weights = (
        layer.train(training and pooling == "latent"),
        {n: t.requires_grad_() for n, t in w.items()},
    )
    if not training and pooling == "latent":
        with pytest.raises(AssertionError, match="latents"):  # control: the cached fold has no gradient
            check_gradients(ours, weights, h, target, lengths)
        return
    check_gradients(ours, weights, h, target, lengths)


def check_gradients(layer, weights, h, target, lengths):
    (layer(h, (9,)) * target).sum().backward()
    got = {LATENT + n: p.grad for n, p in layer.named_parameters()} | {"h": h.grad.clone()}
    h.grad = None
    (ref.latent_layer(weights, h[None], 4, lengths)[0] * target).sum().backward()
    for name, wanted in [*((n, t.grad) for n, t in weights.items()), ("h", h.grad)]:
        assert wanted.norm() > 0, name
        assert got[name] is not None, name
        assert (got[name] - wanted).norm() / wanted.norm() <= 1e-5, name


@pytest.mark.parametrize("pooling", ["latent", "self", "mean", "eos"])
def test_poolings_against_their_references(pooling, base):
    model = NVEmbed.from_pretrained(base, pooling=pooling)
    oracle = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
    tokens = model.tokenize(TEXTS, TASK)
    lengths = [len(t.ids) for t in tokens]
    assert min(t.masked for t in tokens) > 5
    h = ref.hf_states(oracle, [t.ids for t in tokens], causal=False)
    if pooling in ("latent", "self"):
        w = {n: t for n, t in model.state_dict().items() if n.startswith(LATENT)}
        h = ref.latent_layer(w, h, 8, lengths if pooling == "self" else None)
    if pooling == "eos":
        rows = [text[n - 1] for text, n in zip(h, lengths, strict=True)]
    else:
        rows = [
            text[t.masked : n].sum(0) / (n - t.masked) for text, t, n in zip(h, tokens, lengths, strict=True)
        ]
    expected = ref.unit(torch.stack(rows))
    assert gap(model.encode(TEXTS, TASK), expected) <= 1e-5
    assert gap(model.encode(TEXTS), expected) > 0.05  # control: without the instruction


# ----------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("pooling", ["latent", "self", "mean", "eos"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_one_by_one(pooling, causal, base):
    model = NVEmbed.from_pretrained(base, pooling=pooling, causal=causal)
    alone = np.concatenate([model.encode([text], TASK) for text in TEXTS])
    for batch_tokens in (150, 211, 16384):
        together = model.encode(TEXTS, TASK, batch_tokens=batch_tokens)
        assert together.dtype == np.float32 and together.shape == (len(TEXTS), 64)
        assert gap(together, alone) <= 2e-6
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() <= 1e-6
    assert gap(alone[0], alone[5]) == 0 and gap(together[0], together[5]) <= 2e-6  # the same text twice
    different = alone @ alone.T - 2 * np.eye(len(TEXTS))
    different[0, 5] = different[5, 0] = -1
    assert different.max() < 0.9999  # control: other texts are other vectors


def test_packed_texts_do_not_see_each_other(base, monkeypatch):
    """Control of the test above: attention over the whole batch would fail it."""
    model, attend = NVEmbed.from_pretrained(base, pooling="mean"), nvembed.attend
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    monkeypatch.setattr(
        nvembed, "attend", lambda q, k, v, lengths, *rest: attend(q, k, v, (sum(lengths),), *rest)
    )
    assert gap(model.encode(TEXTS), alone) > 0.05


def test_order_and_empty_inputs(base):
    model = NVEmbed.from_pretrained(base)
    assert model.encode([]).shape == (0, 64)
    forward, order = model.encode(TEXTS), np.random.default_rng(0).permutation(len(TEXTS))
    assert gap(model.encode([TEXTS[i] for i in order]), forward[order]) <= 2e-6
    assert gap(forward[::-1].copy(), forward) > 0.05
    assert np.isfinite(model.encode([""])).all() and np.isfinite(model.encode(["", ""], TASK)).all()
    assert "texts" in error_of(model.encode, "a string")
    assert "batch_tokens" in error_of(model.encode, ["a long text"], batch_tokens=3)
    model.train()
    model.encode(["a"])
    assert model.training


def test_encode_in_chunks(base, monkeypatch):
    """Texts are tokenised ahead, CHUNK at a time, each with its own instruction; errors of the thread arrive."""
    model, tasks = NVEmbed.from_pretrained(base), [TASK, "", "Other", "", TASK, "", ""]
    whole, calls, tokenize = model.encode(TEXTS, tasks), [], model.tokenize
    monkeypatch.setattr(nvembed, "CHUNK", 3)
    monkeypatch.setattr(model, "tokenize", lambda texts, *rest: calls.append(texts) or tokenize(texts, *rest))
    assert gap(model.encode(TEXTS, tasks), whole) <= 2e-6
    assert [text for texts in calls for text in texts] == TEXTS and [len(c) for c in calls][:3] == [3, 3, 1]
    assert gap(model.encode(TEXTS, tasks[::-1]), whole) > 0.05  # control
    assert "Instruct" in error_of(model.encode, TEXTS, [*tasks[:6], "Instruct: no"])


def test_compiled_encode_is_the_eager_one(base):
    """For batches of any size, with one graph for all of them."""
    model = NVEmbed.from_pretrained(base)
    eager, before = model.encode(TEXTS, TASK), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_blocks()
    for batch_tokens in (150, 211, 16384):
        assert gap(model.encode(TEXTS, TASK, batch_tokens=batch_tokens), eager) <= 5e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before  # control: it was compiled


def test_fast_dtype(monkeypatch):
    for able, found in (
        ("amx_bf16", torch.bfloat16),
        ("avx512_bf16", torch.bfloat16),
        ("avx2", torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {able: True, "sse": True})
        assert nvembed.fast_dtype() == found and nvembed.fast_dtype("cuda") == torch.bfloat16


def test_batch_of_one_is_bidirectional(base):
    ids = random_ids(12)
    changed = [*ids[:-1], ids[-1] - 1 if ids[-1] > 3 else 4]
    model, causal = (NVEmbed.from_pretrained(base, pooling="eos", causal=c) for c in (False, True))
    assert gap(states(model, ids)[0], states(model, changed)[0]) > 1e-2
    assert gap(states(causal, ids)[:-1], states(causal, changed)[:-1]) == 0
    assert gap(states(causal, ids)[-1], states(causal, changed)[-1]) > 1e-2


def test_pack_keeps_every_text_once_within_the_budget():
    tokens = [Tokens([5] * n, 0) for n in (3, 9, 1, 9, 4, 4, 2, 8)]
    batches = nvembed.pack(tokens, 10)
    assert sorted(sum(batches, [])) == list(range(8))
    sizes = [[len(tokens[i].ids) for i in batch] for batch in batches]
    assert max(map(sum, sizes)) <= 10 and sum(sizes, []) == sorted(sum(sizes, []), reverse=True)
    assert nvembed.pack([], 10) == []
    assert "batch_tokens" in error_of(nvembed.pack, tokens, 8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attend_equals_plain_attention(causal, window):
    """Softmax of masked scores, a text at a time; on a GPU also the kernel for half precision."""
    lengths, generator = (12, 7, 7, 3, 1), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, heads, 16, generator=generator) for heads in (4, 2, 2))
    rows = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        i = torch.arange(len(a))
        allowed = (
            (i[:, None] >= i) & (i[:, None] - i < (window or 99))
            if causal
            else torch.ones(len(a), len(a)) > 0
        )
        scores = torch.einsum("shk,thk->hst", a, b.repeat_interleave(2, 1)) / 4
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hst,thk->shk", weights, c.repeat_interleave(2, 1)))
    expected = torch.cat(rows)
    assert gap(nvembed.attend(q, k, v, lengths, causal, window), expected) <= 1e-5
    assert gap(nvembed.attend(q, k, v, lengths, not causal, window), expected) > 0.1
    if torch.cuda.is_available():
        q, k, v = (t.cuda().bfloat16() for t in (q, k, v))
        out = nvembed.attend(q, k, v, lengths, causal, window)
        assert gap(out.cpu(), expected) <= 0.03


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attend_of_a_bf16_step_and_its_gradient(causal, window):
    """On CPUs a bf16 step multiplies the scores out: the same as scaled_dot_product_attention in fp64."""
    lengths, generator = (12, 7, 7, 3, 1), torch.Generator().manual_seed(0)
    qkv = [torch.randn(30, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2)]
    upstream, found = torch.randn(30, 4, 16, generator=generator), []
    for dtype in (torch.bfloat16, torch.float64):
        parts = [t.to(dtype, copy=True).requires_grad_() for t in qkv]
        out = nvembed.attend(*parts, lengths, causal, window)
        found.append([out.detach(), *torch.autograd.grad(out, parts, upstream.to(dtype))])
    for ours, true in zip(*found, strict=True):
        assert true.norm() > 1 and float((ours.double() - true).norm() / true.norm()) <= 0.01
    other = nvembed.attend(*parts, lengths, not causal, window).detach()
    assert float((other - found[1][0]).norm() / other.norm()) > 0.1  # control


# ------------------------------------------------------------------------------------- template and pool mask

FIRST = {
    "letter": "apple pie",
    "digit": "7 apples",
    "cjk": "苹果 is red",
    "emoji": "🍎 is red",
    "newline": "\nnext line",
    "space": " spaced",
    "parenthesis": "(a) b",
    "empty": "",
}
OWN_SPACE = {  # where the prefix's trailing space does not merge with what follows
    "mistral": {"digit", "cjk", "emoji", "newline", "space", "empty"},
    "smollm2": {"digit", "newline", "space", "empty"},
}


def text_model(path, **settings):
    """A model without weights: the tokenizer and what the config says of it."""
    tokenizer = Tokenizer.from_file(str(path))
    changes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 1} | settings
    with torch.device("meta"):
        return NVEmbed(Config(**(ref.TINY | changes)), tokenizer)


@pytest.fixture(scope="module", params=["mistral", "smollm2", "no bos"])
def tokens_of(request, real_tokenizers):
    """(tokenizer name, bos, eos, model, a second tokenizer as oracle)"""
    name = "smollm2" if request.param == "no bos" else request.param
    oracle = Tokenizer.from_file(str(real_tokenizers[name]))
    bos = {"mistral": "<s>", "smollm2": "<|im_start|>", "no bos": None}[request.param]
    eos = "</s>" if name == "mistral" else "<|im_end|>"
    ids = {"bos_token_id": oracle.token_to_id(bos) if bos else None, "eos_token_id": oracle.token_to_id(eos)}
    return name, bos, eos, text_model(real_tokenizers[name], **ids), oracle


@pytest.mark.parametrize("task", [TASK, "找到 🍎: naïve\nor not"])
@pytest.mark.parametrize("first", FIRST)
def test_template_and_pool_mask(first, task, tokens_of):
    name, bos, eos, model, oracle = tokens_of
    text, prefix = FIRST[first], ref.prefix_of(task)
    (token,) = model.tokenize([text], task)
    ids, masked = ref.released_ids(oracle, text, task, bos=bos, eos=eos)
    assert token.ids == ids and ids[-1] == oracle.token_to_id(eos)
    # without bos the released rule, applied from position 0, would take one token too many
    assert token.masked == masked - (bos is None)
    offsets = oracle.encode(prefix + text, add_special_tokens=False).offsets
    starts = [-1] * bool(bos) + [start for start, _ in offsets]
    assert max(starts[: token.masked]) < len(prefix) - 1
    pooled = starts[token.masked :]
    assert not pooled or min(pooled) >= len(prefix) - 1
    one_space = oracle.encode(prefix, add_special_tokens=False).ids[-1]  # " " alone
    assert (token.ids[token.masked] == one_space) == (first in OWN_SPACE[name])
    assert oracle.decode(token.ids[token.masked : -1]).strip(" ") == text.strip(" ")
    (document,) = model.tokenize([text])
    assert document.masked == 0 and document.ids == ref.released_ids(oracle, text, bos=bos, eos=eos)[0]


def test_mistral_tokenizer_is_mistrals(real_tokenizers):
    """What Mistral-7B-v0.1's tokenizer is known to give; 32,000 tokens, 58,980 merges."""
    raw = json.loads(real_tokenizers["mistral"].read_text())["model"]
    assert len(raw["vocab"]) == 32000 and len(raw["merges"]) == 58980
    tokenizer = Tokenizer.from_file(str(real_tokenizers["mistral"]))
    assert tokenizer.encode("Hello world").ids == [1, 22557, 1526]
    assert tokenizer.encode("\n🍎").tokens == ["<s>", "▁", "<0x0A>", "<0xF0>", "<0x9F>", "<0x8D>", "<0x8E>"]
    for text in FIRST.values():
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_mask_can_be_switched_off(real_tokenizers):
    on, off = (text_model(real_tokenizers["mistral"], mask_instruction=m) for m in (True, False))
    (a,), (b,) = on.tokenize(["apple"], TASK), off.tokenize(["apple"], TASK)
    assert a.ids == b.ids and a.masked > 10 and b.masked == 0


def test_special_tokens_in_a_text_are_text(tokens_of):
    _, bos, eos, model, oracle = tokens_of
    text = f"one {eos} two {bos or eos} three"
    (token,) = model.tokenize([text])
    eos_id, bos_id = model.config.eos_token_id, model.config.bos_token_id
    assert token.ids.count(eos_id) == 1 and token.ids[-1] == eos_id
    assert token.ids.count(bos_id) == (bos is not None)
    assert oracle.encode(text, add_special_tokens=False).ids.count(eos_id) >= 1  # control: what was escaped
    assert oracle.decode(token.ids, skip_special_tokens=True).strip() == text


def test_truncation(tokens_of, monkeypatch):
    _, bos, eos, model, oracle = tokens_of
    text = "The sun rises in the east. " * 20
    cut = lambda n, **kind: model.tokenize([text], max_length=n, **kind)[0].ids  # noqa: E731
    full, _ = ref.released_ids(oracle, text, max_length=10**6, bos=bos, eos=eos)
    for length in (len(full) + 1, len(full), len(full) - 1, 17, 1):
        assert cut(length) == full[:length]  # as released: the eos is cut off first
    assert cut(len(full) - 1)[-1] != full[-1]
    queries = model.tokenize([text], TASK, max_length=40)[0]
    assert (queries.ids, queries.masked + (bos is None)) == ref.released_ids(oracle, text, TASK, 40, bos, eos)
    monkeypatch.setattr(model.config, "keep_eos", True)
    for length in (len(full) + 1, len(full), len(full) - 1, 17, 2):
        assert cut(length) == [*full[:-1][: length - 1], full[-1]]


@pytest.mark.parametrize(
    "text",
    [
        "The sun rises in the east. " * 400,
        "a" * 9000,
        "7 " * 4000,
        "苹果 🍎 " * 1500,
        " " * 9000 + "end",
        "x  y" * 2000,
    ],
)
def test_long_texts_are_cut_before_they_are_tokenised(text, tokens_of, monkeypatch):
    """The first max_length ids are those of the whole text."""
    model, seen = tokens_of[3], []
    fast = [model.tokenize([text, "short"], task, 50) for task in ("", TASK)]
    monkeypatch.setattr(nvembed, "encode_start", lambda f, texts, n: f(texts, add_special_tokens=False))
    assert fast == [model.tokenize([text, "short"], task, 50) for task in ("", TASK)]
    monkeypatch.undo()
    nvembed.encode_start(
        lambda texts, **_: seen.extend(map(len, texts)) or model.tokenizer.encode_batch(texts), [text], 50
    )
    assert seen[0] < 500 or not nvembed.BETWEEN.search(text)  # control: it was cut


def test_a_cut_inside_a_word_would_change_tokens(tokens_of):
    """Control of the test above."""
    text, encode = "The sun rises in the east. " * 400, tokens_of[4].encode
    true = encode(text, add_special_tokens=False).ids
    cuts = [encode(text[:n], add_special_tokens=False).ids for n in range(100, 130)]
    assert any(ids != true[: len(ids)] for ids in cuts)


def test_who_keeps_the_eos():
    assert Config(**ref.TINY, pooling="eos").keep_eos
    assert (
        not Config(**ref.TINY, pooling="latent").keep_eos and not Config(**ref.TINY, pooling="mean").keep_eos
    )
    assert Config(**ref.TINY, pooling="latent", keep_eos=True).keep_eos


def test_instruction_errors(tokens_of):
    *_, model, oracle = tokens_of
    assert "Instruct:" in error_of(model.tokenize, ["a"], "Instruct: " + TASK)
    filled = len(oracle.encode(ref.prefix_of(TASK), add_special_tokens=False).ids)
    for length in (1, filled - 2):
        message = error_of(model.tokenize, ["a"], TASK, max_length=length)
        assert "max_length" in message and str(length) in message
    (token,) = model.tokenize(["a"], TASK, max_length=filled + 3)
    assert token.masked < len(token.ids)


# -------------------------------------------------------------------------------------------- released layout


def test_full_size_v2_on_the_meta_device(tmp_path, tokenizer_json):
    """All 304 tensor names of NV-Embed-v2, their shapes, 7,851,016,192 parameters (15,702,032,384 bytes)."""
    (tmp_path / "config.json").write_text(json.dumps(ref.released_config(ref.FULL)))
    config = nvembed.read_config(tmp_path)
    assert (config.num_latents, config.num_cross_heads, config.cross_dim_head) == (512, 8, 4096)
    assert (
        not config.causal and not config.keep_eos and config.pooling == "latent" and config.mask_instruction
    )
    with torch.device("meta"):
        model = NVEmbed(config, Tokenizer.from_file(str(tokenizer_json)))
    ours, theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}, ref.released_shapes(ref.FULL)
    assert ours == theirs and len(ours) == 304
    assert sum(p.numel() for p in model.parameters()) == 7_851_016_192
    assert sum(p.numel() for p in model.latent_attention_model.parameters()) == 740_356_096
    for name, shape in {
        "embedding_model.embed_tokens.weight": (32000, 4096),
        "embedding_model.layers.31.self_attn.k_proj.weight": (1024, 4096),
        "embedding_model.layers.0.mlp.down_proj.weight": (4096, 14336),
        "latent_attention_model.latents": (512, 4096),
        "latent_attention_model.cross_attend_blocks.0.fn.to_q.weight": (32768, 4096),
        "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight": (65536, 4096),
        "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight": (4096, 32768),
        "latent_attention_model.cross_attend_blocks.1.fn.net.0.weight": (32768, 4096),
        "latent_attention_model.cross_attend_blocks.1.fn.net.2.weight": (4096, 16384),
    }.items():
        assert ours[name] == shape


@pytest.mark.parametrize("instruction", ["", TASK])
@pytest.mark.parametrize("shards", [1, 3])
def test_released_layout(shards, instruction, tmp_path, tokenizer_json, capsys):
    folder = tmp_path / "v2"
    ref.write_released(folder, tokenizer_json, shards)
    model = NVEmbed.from_pretrained(folder)
    assert capsys.readouterr().err == ""  # nothing fresh, nothing dropped
    expected = ref.released_embed(folder, TEXTS, instruction, max_length=128)
    ours = model.encode(TEXTS, instruction, max_length=128)
    assert gap(ours, expected) <= 1e-5
    half = NVEmbed.from_pretrained(folder, dtype=torch.bfloat16).encode(TEXTS, instruction, max_length=128)
    assert cosine(half, expected) >= 0.999
    short = model.encode(TEXTS, instruction, max_length=len(model.tokenize([""], instruction)[0].ids) + 3)
    assert gap(short, ours) > 0.05
    for settings in ({"causal": True}, {"mask_instruction": False}, {"pooling": "mean"}, {"pooling": "eos"}):
        other = NVEmbed.from_pretrained(folder, **settings).encode(TEXTS, instruction, max_length=128)
        same = not instruction and "mask_instruction" in settings
        assert (gap(other, expected) <= 1e-5) == same, settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_again(dtype, released, tmp_path):
    model = NVEmbed.from_pretrained(released, dtype=dtype)
    model.save_pretrained(tmp_path / "copy", dtype=dtype)
    again = NVEmbed.from_pretrained(tmp_path / "copy", dtype=dtype)
    assert gap(again.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) == 0
    saved = ref.read_released(tmp_path / "copy")
    original = ref.read_released(released)
    assert saved.keys() == original.keys()
    assert all(t.dtype == dtype and gap(t, original[n].to(dtype)) == 0 for n, t in saved.items())
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["model_type"] == "nvembed" and config["text_config"]["model_type"] == "bidir_mistral"
    assert (
        config["text_config"]["_name_or_path"]
        and config["latent_attention_config"]["num_latents_value"] == 512
    )
    assert config["latent_attention_config"]["cross_dim_head"] == 64 and config["is_mask_instruction"]
    assert all(config["text_config"][k] == v for k, v in ref.TINY.items())
    if dtype == torch.float32:
        assert gap(ref.released_embed(tmp_path / "copy", TEXTS, TASK), model.encode(TEXTS, TASK)) <= 1e-5


def test_saved_tokenizer_loads_with_transformers(released, tmp_path):
    model = NVEmbed.from_pretrained(released)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "special_tokens_map.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    for text in TEXTS:
        assert tokenizer(text + tokenizer.eos_token)["input_ids"] == model.tokenize([text])[0].ids


@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True},
        {"pooling": "mean"},
        {"pooling": "eos"},
        {"pooling": "self"},
        {"mask_instruction": False},
        {"keep_eos": True},
    ],
)
def test_what_the_released_code_would_misread_is_nvembed_x(settings, released, base, tmp_path):
    source = base if settings.get("pooling") == "self" else released
    model = NVEmbed.from_pretrained(source, **settings)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nvembed-x"
    again = NVEmbed.from_pretrained(tmp_path)
    assert again.config == model.config
    assert gap(again.encode(TEXTS, TASK, max_length=90), model.encode(TEXTS, TASK, max_length=90)) == 0
    assert gap(again.encode(TEXTS, TASK), NVEmbed.from_pretrained(source).encode(TEXTS, TASK)) > 1e-3 or (
        "keep_eos" in settings
    )


@pytest.mark.parametrize("name", ["qwen2-bias", "llama3-scaling", "mistral-window", "mistral-wide-heads"])
def test_every_family_survives_saving(name, tmp_path, tokenizer_json):
    family, changes = FAMILIES[name]
    ref.write_base(tmp_path / "a", tokenizer_json, ref.hf_model(family, **changes))
    model = NVEmbed.from_pretrained(tmp_path / "a", causal="window" in name)
    model.save_pretrained(tmp_path / "b", dtype=torch.float32)
    again = NVEmbed.from_pretrained(tmp_path / "b")
    assert again.config == model.config
    assert gap(again.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) == 0
    kind = json.loads((tmp_path / "b" / "config.json").read_text())["model_type"]
    assert kind == ("nvembed" if name == "mistral-wide-heads" else "nvembed-x")


def test_saving_over_a_sharded_folder(released, tmp_path):
    """An old index or shard beside the new weights would be read in their place."""
    shutil.copytree(released, tmp_path / "m")
    model = NVEmbed.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        model.embedding_model.layers[0].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(tmp_path / "m", dtype=torch.float32)
    again = NVEmbed.from_pretrained(tmp_path / "m")
    assert gap(again.encode(TEXTS), model.encode(TEXTS)) == 0
    assert gap(again.encode(TEXTS), NVEmbed.from_pretrained(released).encode(TEXTS)) > 0.05


def test_saving_in_shards(released, tmp_path, monkeypatch):
    whole = nvembed.save_torch_state_dict
    small = lambda *args, **kind: whole(*args, **(kind | {"max_shard_size": "500KB"}))  # noqa: E731
    monkeypatch.setattr(nvembed, "save_torch_state_dict", small)
    model = NVEmbed.from_pretrained(released)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert gap(NVEmbed.from_pretrained(tmp_path).encode(TEXTS), model.encode(TEXTS)) == 0


def write_e5(folder, tokenizer_json):
    """The layout of e5-mistral-7b-instruct: MistralModel's own names, sentence-transformers' pooling."""
    oracle = ref.hf_model("mistral", sliding_window=4096)
    ref.write_base(folder, tokenizer_json, oracle)
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert "layers.0.self_attn.q_proj.weight" in names
    (folder / "1_Pooling").mkdir()
    modes = {
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | modes))
    return oracle


def test_e5_mistral_layout(tmp_path, tokenizer_json, capsys):
    oracle = write_e5(tmp_path, tokenizer_json)
    capsys.readouterr()
    model = NVEmbed.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    c = model.config
    assert c.causal and c.pooling == "eos" and c.keep_eos and not hasattr(model, "latent_attention_model")
    tokenizer, rows = Tokenizer.from_file(str(tokenizer_json)), []
    for text in TEXTS:
        ids = [1, *tokenizer.encode(ref.prefix_of(TASK) + text, add_special_tokens=False).ids][:89] + [2]
        rows.append(ref.hf_states(oracle, [ids], causal=True)[0, -1])
    expected = ref.unit(torch.stack(rows))
    assert gap(model.encode(TEXTS, TASK, max_length=90), expected) <= 1e-5
    bidirectional = NVEmbed.from_pretrained(tmp_path, causal=False)
    assert gap(bidirectional.encode(TEXTS, TASK, max_length=90), expected) > 0.05


def test_base_model_gets_a_fresh_pooling_layer(base, capsys):
    model = NVEmbed.from_pretrained(base)
    (line,) = capsys.readouterr().err.splitlines()
    assert "latent_attention_model" in line and "lm_head.weight" in line and str(base) in line
    assert model.config.pooling == "latent" and model.latent_attention_model.latents.shape == (512, 64)
    assert not any(p.isnan().any() for p in model.parameters())
    torch.manual_seed(1)
    again = NVEmbed.from_pretrained(base)
    assert gap(again.encode(TEXTS), model.encode(TEXTS)) == 0  # an untrained layer is the same at every load
    before = torch.get_rng_state()
    NVEmbed.from_pretrained(base)
    assert torch.equal(torch.get_rng_state(), before)  # loading leaves the caller's random state alone
    capsys.readouterr()
    NVEmbed.from_pretrained(base, pooling="mean")
    (line,) = capsys.readouterr().err.splitlines()
    assert "latent_attention_model" not in line and "lm_head.weight" in line


# -------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(released, tmp_path):
    """A copy of the released folder to break."""
    return shutil.copytree(released, tmp_path / "v2")


def edit_shard(folder, change, number=1):
    path = folder / f"model-{number:05}-of-00003.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


def test_bad_weights(folder):
    assert NVEmbed.from_pretrained(folder)  # control: whole, it loads
    shard, norm = folder / "model-00002-of-00003.safetensors", "embedding_model.norm.weight"
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:5], b"", b"\xff" * 100):
        shard.write_bytes(damaged)
        assert "model-00002-of-00003.safetensors" in error_of(NVEmbed.from_pretrained, folder)
    shard.unlink()
    assert "model-00002-of-00003.safetensors" in error_of(NVEmbed.from_pretrained, folder)
    shard.write_bytes(whole)
    edit_shard(folder, lambda s: s.update({norm: torch.ones(32)}), 2)
    message = error_of(NVEmbed.from_pretrained, folder)
    assert str(folder) in message and norm in message and "32" in message and "64" in message
    edit_shard(folder, lambda s: s.pop(norm), 2)
    message = error_of(NVEmbed.from_pretrained, folder)
    assert str(folder) in message and norm in message and "missing" in message
    shard.write_bytes(whole)
    edit_shard(folder, lambda s: s.update({"embedding_model.layers.3.norm.weight": torch.ones(4)}))
    assert "embedding_model.layers.3.norm.weight" in error_of(NVEmbed.from_pretrained, folder)


def test_half_a_pooling_layer_is_not_fresh(folder):
    edit_shard(folder, lambda s: [s.pop(n) for n in list(s) if n.startswith(LATENT)])
    assert LATENT in error_of(NVEmbed.from_pretrained, folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_bad_index(index, folder):
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_of(NVEmbed.from_pretrained, folder)


def test_no_weights_at_all(base, tmp_path):
    shutil.copy(base / "config.json", tmp_path)
    assert "tokenizer.json" in error_of(NVEmbed.from_pretrained, tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    assert "model.safetensors" in error_of(NVEmbed.from_pretrained, tmp_path)


BAD_TEXT_CONFIG = {
    "vocab_size": None,
    "hidden_size": "64",
    "num_hidden_layers": 2.5,
    "model_type": "gpt2",
    "attention_bias": True,
    "hidden_act": "gelu",
    "rope_theta": "big",
    "causal": "yes",
    "pooling": "max",
}


@pytest.mark.parametrize("field", BAD_TEXT_CONFIG)
def test_bad_config_field(field, folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"][field] = BAD_TEXT_CONFIG[field]
    (folder / "config.json").write_text(json.dumps(raw))
    message = error_of(NVEmbed.from_pretrained, folder)
    assert "config.json" in message and field in message


@pytest.mark.parametrize(
    "content", ["{", "[]", "", "3", '{"text_config": 3}', '{"latent_attention_config": 1}']
)
def test_bad_config_file(content, folder):
    (folder / "config.json").write_text(content)
    assert "config.json" in error_of(NVEmbed.from_pretrained, folder)


def test_bad_settings(released):
    assert "pooling" in error_of(NVEmbed.from_pretrained, released, pooling="max")
    assert "colour" in error_of(NVEmbed.from_pretrained, released, colour="red")


def test_tokenizer_of_another_vocabulary(folder, real_tokenizers):
    shutil.copy(real_tokenizers["mistral"], folder / "tokenizer.json")
    message = error_of(NVEmbed.from_pretrained, folder)
    assert "tokenizer.json" in message and "320" in message and "32000" in message
    small = ref.tiny_tokenizer().to_str().replace('"</s>"', '"<end>"').replace('"<s>"', '"<start>"')
    raw = json.loads(small)
    raw["added_tokens"] = raw["added_tokens"][:1]  # ids 1 and 2 are no special tokens here
    raw["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert "tokenizer.json" in error_of(NVEmbed.from_pretrained, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in error_of(NVEmbed.from_pretrained, folder)


def command(*args):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(ROOT / "nvembed.py"), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


def test_command_on_a_missing_model():
    done = command("nosuchfolder")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "nosuchfolder" in line


def test_command_prints_the_model_card_scores(released, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nvembed.py", str(released)])
    nvembed.run(nvembed.main)
    scores = [[float(x) for x in line.split()] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert np.shape(scores) == (2, 2) and np.abs(scores).max() <= 100.001 and np.std(scores) > 0.01
    monkeypatch.setattr(sys, "argv", ["nvembed.py"])
    with pytest.raises(SystemExit) as stop:
        nvembed.run(nvembed.main)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: usage")


# ------------------------------------------------------------------------------------------------------- LoRA


def with_lora(base, randomised=True, **settings):
    model = NVEmbed.from_pretrained(base, **settings)
    nvembed.add_lora(model, rank=4, alpha=8, dropout=0.1)
    generator = torch.Generator().manual_seed(0)
    for layer in nvembed.lora_layers(model).values() if randomised else ():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.05
    return model.eval()


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_lora_step_0_is_the_base(pooling, base):
    plain = NVEmbed.from_pretrained(base, pooling=pooling)
    model = with_lora(base, randomised=False, pooling=pooling)
    names = {f"embedding_model.layers.{i}.{n}" for i in range(3) for n in LORA_NAMES}
    assert nvembed.lora_layers(model).keys() == names
    assert plain.state_dict().keys() == {
        n for n in model.state_dict() if ".lora_" not in n
    }  # base names never change
    assert gap(model.encode(TEXTS, TASK), plain.encode(TEXTS, TASK)) == 0
    assert gap(with_lora(base, pooling=pooling).encode(TEXTS, TASK), plain.encode(TEXTS, TASK)) > 0.01


LORA_NAMES = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def test_lora_merged_is_adapted(base, tmp_path):
    model = with_lora(base)
    model.save_pretrained(tmp_path / "fp32", dtype=torch.float32)
    merged = NVEmbed.from_pretrained(tmp_path / "fp32")
    assert not any(".lora_" in n for n in merged.state_dict())
    assert gap(merged.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) <= 1e-5
    model.save_pretrained(tmp_path / "bf16")
    half = NVEmbed.from_pretrained(tmp_path / "bf16")
    assert 0.999 <= cosine(half.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) < 0.9999999
    assert ref.read_released(tmp_path / "bf16")["embedding_model.norm.weight"].dtype == torch.bfloat16
    forgotten = NVEmbed.from_pretrained(base)  # control: export without the adapters
    assert gap(forgotten.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) > 0.01


def test_lora_dropout_only_in_training(base):
    model, ids = with_lora(base, pooling="mean"), random_ids(20)
    assert gap(states(model, ids), states(model, ids)) == 0
    model.train()
    assert gap(states(model, ids), states(model, ids)) > 1e-3
    model.eval()
    quiet = states(model, ids)
    for layer in model.embedding_model.layers:
        layer.lora_dropout = 0.0
    assert gap(states(model.train(), ids), quiet) == 0
    out = nvembed.drop(torch.ones(4000, 63), nvembed.keep(4000, (9, 63), 0.25, "cpu")[1], 0.25)
    values = sorted(out.unique().tolist())
    assert values == [0.0, pytest.approx(4 / 3)] and abs(float(out.mean()) - 1) < 0.01
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.005 and out.std(dim=0).min() > 0.4


def test_lora_gradients_equal_peft(base):
    """B starts at zero, so A's gradient is zero: randomised here, and every norm asserted."""
    model = with_lora(base, pooling="eos", causal=True)
    oracle = load_peft(model, base)
    ids, target = random_ids(20), random_states(20)
    (model.embedding_model(torch.tensor(ids), (20,), torch.float32) * target).sum().backward()
    (oracle(input_ids=torch.tensor([ids])).last_hidden_state[0] * target).sum().backward()
    theirs = {n: p.grad for n, p in oracle.named_parameters() if "lora_" in n}
    assert len(theirs) == 2 * 7 * 3
    for name, wanted in theirs.items():
        *layer, kind, _, _ = name.removeprefix("base_model.model.").split(".")
        got = getattr(model.embedding_model.get_submodule(".".join(layer)), kind).grad
        assert wanted.norm() > 0 and (got - wanted).norm() / wanted.norm() <= 1e-5, name


def load_peft(model, base):
    """Our adapter, saved and loaded by PEFT onto transformers' model, trainable and without dropout."""
    folder = base.parent / "adapter"
    nvembed.save_adapter(model, folder, base)
    oracle = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(oracle, folder, is_trainable=True).eval()


@pytest.mark.parametrize("causal", [False, True])
def test_peft_loads_our_adapter(causal, base):
    model, ids = with_lora(base, pooling="eos", causal=causal), random_ids(20)
    expected = ref.hf_states(load_peft(model, base), [ids], causal)[0]
    assert gap(states(model, ids), expected) <= 1e-5
    assert gap(states(NVEmbed.from_pretrained(base, pooling="eos", causal=causal), ids), expected) > 0.01


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForCausalLM"])
def test_we_load_an_adapter_of_peft(head, base, tmp_path):
    torch.manual_seed(0)
    oracle = getattr(transformers, head).from_pretrained(base, attn_implementation="eager")
    targets = ["q_proj", "v_proj", "down_proj"]
    made = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=targets, init_lora_weights=False
    )
    oracle = peft.get_peft_model(oracle, made).eval()
    oracle.save_pretrained(tmp_path)
    ids = random_ids(20)
    decoder = oracle.base_model.model if head == "AutoModel" else oracle.base_model.model.model
    expected = ref.hf_states(decoder, [ids], causal=True)[0]
    plain = NVEmbed.from_pretrained(base, causal=True, pooling="eos")
    assert gap(states(plain, ids), expected) > 0.01
    for model in (
        nvembed.load_adapter(plain, tmp_path),
        NVEmbed.from_pretrained(tmp_path, causal=True, pooling="eos"),  # the adapter names its base
    ):
        assert len(nvembed.lora_layers(model)) == 9
        assert not any(module.training for module in model.modules())  # else dropout would be on
        assert gap(states(model, ids), expected) <= 1e-5


def test_bad_adapters(base, tmp_path):
    model, folder = with_lora(base), tmp_path / "adapter"
    nvembed.save_adapter(model, folder, base)
    load = lambda: nvembed.load_adapter(NVEmbed.from_pretrained(base), folder)  # noqa: E731
    assert gap(load().eval().encode(TEXTS), model.encode(TEXTS)) <= 1e-6
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    for change, word in (
        ({"peft_type": "IA3"}, "adapter_config.json"),
        ({"use_dora": True}, "adapter_config.json"),
        ({"use_rslora": True}, "adapter_config.json"),
        ({"r": 8}, "lora_"),
        ({"target_modules": ["q_proj"]}, "k_proj"),
    ):
        config.write_text(json.dumps(settings | change))
        assert word in error_of(load), change
    for field in ("r", "lora_alpha", "target_modules"):
        config.write_text(json.dumps({k: v for k, v in settings.items() if k != field}))
        message = error_of(load)
        assert "adapter_config.json" in message and field in message
    config.write_text(json.dumps(settings))
    for damaged in (whole[:-1], whole[:5]):
        weights.write_bytes(damaged)
        assert "adapter_model.safetensors" in error_of(load)
    weights.unlink()
    assert "adapter_model.safetensors" in error_of(load)


def test_a_second_adapter_does_not_replace_the_first(base):
    model = with_lora(base)
    assert "adapter" in error_of(nvembed.add_lora, model)


def test_adapter_settings_are_not_silently_ignored(base, tmp_path):
    model = with_lora(base)
    nvembed.save_adapter(model, tmp_path, base)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"alpha_pattern": {"q_proj": 64}}, {"target_modules": ".*_proj"}, {"bias": "all"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
        message = error_of(nvembed.load_adapter, NVEmbed.from_pretrained(base), tmp_path)
        assert str(tmp_path) in message, change


def test_an_error_without_a_message_is_told_by_its_name():
    def fail():
        raise KeyError

    assert error_of(nvembed.attempt, "what", fail) == "what: KeyError()"
