"""The decoder = transformers' Mistral, Llama and Qwen2; `attend` = plain attention."""

import json

import pytest
import references as ref
import torch
import transformers
from compare import FAMILIES, cosine, error_of, gap, random_ids, states

import nvembed
from nvembed import NVEmbed


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
    (tokens,) = model.tokenize(["The sun rises in the east and sets in the west."])
    ids = tokens.ids
    oracle = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for causal in (True, False):
        model.config.causal = causal
        expected = ref.hf_states(oracle, [ids], causal)[0]
        assert gap(states(model, ids), expected) / expected.abs().max() <= 1e-5
        model.dtype = torch.bfloat16
        assert 0.999 <= cosine(states(model, ids), expected) < 0.9999999
        model.dtype = torch.float32
        model.config.causal = not causal
        assert cosine(states(model, ids), expected) < 0.9


def interleaved(x, cos, sin):
    """RoPE on pairs (0, 1), (2, 3), ...: the layout of the original Llama weights, not of these."""
    cos, sin = [table[:, :, -1].repeat_interleave(2, -1) for table in (cos, sin)]
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


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in remove:
        assert config.pop(name)
    path.write_text(json.dumps(config | changes))


def test_qwen2_window_that_is_switched_off(tmp_path, tokenizer_json):
    """Qwen2's config.json names a window and says beside it that it is not used."""
    oracle, ids = ref.hf_model("qwen2"), random_ids(41)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    edit_config(tmp_path, sliding_window=4, use_sliding_window=False)
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
    default = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    scaling = rope.get("rope_scaling") or default
    oracle, ids = ref.hf_model("llama", rope_parameters=scaling), random_ids(41)
    ref.write_base(tmp_path, tokenizer_json, oracle)
    edit_config(tmp_path, remove=["rope_parameters"], **rope)
    model = NVEmbed.from_pretrained(tmp_path, causal=True, pooling="eos")
    assert gap(states(model, ids), ref.hf_states(oracle, [ids], causal=True)[0]) <= 1e-5


def test_unknown_rope_scaling_is_an_error(tmp_path, tokenizer_json):
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    ref.write_base(tmp_path, tokenizer_json, ref.hf_model("llama", rope_parameters=yarn))
    message = error_of(NVEmbed.from_pretrained, tmp_path)
    assert "config.json: field 'rope_scaling'" in message


def test_batch_of_one_is_bidirectional(base):
    ids = random_ids(12)
    changed = [*ids[:-1], ids[-1] - 1 if ids[-1] > 3 else 4]
    model = NVEmbed.from_pretrained(base, pooling="eos", causal=False)
    causal = NVEmbed.from_pretrained(base, pooling="eos", causal=True)
    assert gap(states(model, ids)[0], states(model, changed)[0]) > 1e-2
    assert gap(states(causal, ids)[:-1], states(causal, changed)[:-1]) == 0
    assert gap(states(causal, ids)[-1], states(causal, changed)[-1]) > 1e-2


# ---- attention

LENGTHS = (12, 7, 7, 3, 1)


def random_qkv(generator):
    return [torch.randn(30, heads, 16, generator=generator) for heads in (4, 2, 2)]


def plain_attention(q, k, v, causal, window):
    """Softmax of masked scores of one text: q (T, H, K), k and v (T, G, K) -> (T, H, K)."""
    i = torch.arange(len(q))
    allowed = torch.ones(len(q), len(q), dtype=torch.bool)
    if causal:
        allowed = (i[:, None] >= i) & (i[:, None] - i < (window or 99))
    scores = torch.einsum("shk,thk->hst", q, k.repeat_interleave(2, 1)) / 4
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hst,thk->shk", weights, v.repeat_interleave(2, 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attend_equals_plain_attention(causal, window):
    """A text at a time; on a GPU also the kernel for half precision."""
    qkv = random_qkv(torch.Generator().manual_seed(0))
    texts = zip(*(x.split(LENGTHS) for x in qkv), strict=True)
    expected = torch.cat([plain_attention(*text, causal, window) for text in texts])
    assert gap(nvembed.attend(*qkv, LENGTHS, causal, window), expected) <= 1e-5
    assert gap(nvembed.attend(*qkv, LENGTHS, not causal, window), expected) > 0.1
    if torch.cuda.is_available():
        halves = [x.cuda().bfloat16() for x in qkv]
        out = nvembed.attend(*halves, LENGTHS, causal, window)
        assert gap(out.cpu(), expected) <= 0.03


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attend_of_a_bf16_step_and_its_gradient(causal, window):
    """On CPUs it is computed in fp32: what goes in and out alone is rounded."""
    generator = torch.Generator().manual_seed(0)
    qkv = [x.bfloat16() for x in random_qkv(generator)]
    upstream = torch.randn(30, 4, 16, generator=generator)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        parts = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
        out = nvembed.attend(*parts, LENGTHS, causal, window)
        gradients = torch.autograd.grad(out, parts, upstream.to(dtype))
        results.append([out.detach(), *gradients])
    ours, truth = results
    for one, true in zip(ours, truth, strict=True):
        assert true.norm() > 1
        assert float((one.double() - true).norm() / true.norm()) <= 0.01
    other = nvembed.attend(*parts, LENGTHS, not causal, window).detach()
    assert float((other - truth[0]).norm() / other.norm()) > 0.1  # control
