"""The latent attention layer, folded = unfolded; its fold, kept for `encode`; pooling."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import references as ref
import torch
import torch.nn.functional as F
import transformers
from compare import LATENT, TASK, TEXTS, cosine, gap, random_states

from nvembed import Config, LatentAttention, NVEmbed

SMALL = {"num_latents": 24, "num_cross_heads": 4, "cross_dim_head": 48}


def latent_layer(pooling="latent", seed=0):
    """A layer with random weights, and these by name; queries so large that softmax is not flat."""
    c = Config(**ref.TINY, **SMALL, pooling=pooling)
    layer = LatentAttention(c).eval()
    shapes = {LATENT + n: tuple(p.shape) for n, p in layer.named_parameters()}
    weights = ref.random_weights(shapes, seed)
    weights[LATENT + "cross_attend_blocks.0.fn.to_q.weight"] *= 2
    layer.load_state_dict({n.removeprefix(LATENT): t for n, t in weights.items()})
    return layer, weights


def weights_of(layer):
    return {LATENT + name: p.detach() for name, p in layer.named_parameters()}


# ---- the layer


@pytest.mark.parametrize("pooling", ["latent", "self"])
@torch.no_grad()
def test_latent_layer_equals_unfolded(pooling):
    layer, w = latent_layer(pooling)
    lengths = (5, 17, 17, 1, 9)
    h = random_states(*lengths)
    padded = torch.nn.utils.rnn.pad_sequence(h.split(lengths), batch_first=True)
    real = torch.arange(17) < torch.tensor(lengths)[:, None]
    own = lengths if pooling == "self" else None
    expected = ref.latent_layer(w, padded, heads=4, lengths=own)[real]
    assert expected.std() > 0.5
    assert gap(expected, h) > 1
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
    layer, w = latent_layer(pooling)
    h = random_states(9)
    lengths = (9,) if pooling == "self" else None
    block, ff = layer.cross_attend_blocks
    before = gap(layer(h, (9,)), ref.latent_layer(w, h[None], 4, lengths)[0])
    if broken == "to_out heads":  # columns (d h) in place of (h d)
        weight = block.fn.to_out.weight
        weight.copy_(weight.unflatten(1, (4, -1)).transpose(1, 2).flatten(1))
    elif broken == "to_q heads":
        weight = block.fn.to_q.weight
        weight.copy_(weight.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1))
    else:
        weight = block.fn.to_kv.weight if broken == "to_kv halves" else ff.fn.net[0].weight
        weight.copy_(weight.roll(len(weight) // 2, 0))
    after = gap(layer(h, (9,)), ref.latent_layer(w, h[None], 4, lengths)[0])
    assert before <= 1e-5
    assert after > 0.1


def test_gelu_is_exact(monkeypatch):
    layer, w = latent_layer()
    h, gelu = random_states(9), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))
    with torch.no_grad():
        assert gap(layer(h, (9,)), ref.latent_layer(w, h[None], 4)[0]) > 1e-4


# ---- the fold


@pytest.mark.parametrize("pooling", ["latent", "self"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_through_the_fold(training, pooling):
    """In training and in eval mode alike: without `folded` the layer folds with a graph."""
    layer, w = latent_layer(pooling)
    lengths = (9,) if pooling == "self" else None
    h = random_states(9).requires_grad_()
    target = random_states(9, seed=2)
    layer.train(training)
    weights = {n: t.requires_grad_() for n, t in w.items()}
    check_gradients(layer, weights, h, target, lengths)


def test_a_constant_fold_has_no_gradient():
    """Control of the test above: with a fold that was detached, the latents learn nothing."""
    layer, w = latent_layer()
    h, target = random_states(9).requires_grad_(), random_states(9, seed=2)
    weights = {n: t.requires_grad_() for n, t in w.items()}
    constant = [matrix.detach() for matrix in layer.fold_latents(torch.float32)]
    with pytest.raises(AssertionError, match="latents"):
        check_gradients(layer, weights, h, target, None, folded=constant)


def check_gradients(layer, weights, h, target, lengths, **kind):
    (layer(h, (9,), **kind) * target).sum().backward()
    got = {LATENT + n: p.grad for n, p in layer.named_parameters()} | {"h": h.grad.clone()}
    h.grad = None
    (ref.latent_layer(weights, h[None], 4, lengths)[0] * target).sum().backward()
    for name, wanted in [*((n, t.grad) for n, t in weights.items()), ("h", h.grad)]:
        assert wanted.norm() > 0, name
        assert got[name] is not None, name
        assert (got[name] - wanted).norm() / wanted.norm() <= 1e-5, name


def small_model(tokenizer_json, **settings):
    """An embedder with random weights around such a layer."""
    model = NVEmbed(
        Config(**ref.TINY, **SMALL, **settings),
        ref.Tokenizer.from_file(str(tokenizer_json)),
    )
    ref.randomise(model.embedding_model)
    if "latent_attention_model" in dict(model.named_children()):
        layer, _ = latent_layer(settings.get("pooling", "latent"))
        model.latent_attention_model.load_state_dict(layer.state_dict())
    return model.eval().requires_grad_(False)


def without_fold(model):
    """Embeddings of TEXTS whose fold is computed in the forward pass."""
    with torch.no_grad():
        return model(model.tokenize(TEXTS)).numpy()


def test_a_frozen_model_keeps_its_fold(tokenizer_json):
    """The same object, as long as no weight changes; and `encode` with it is `encode` without."""
    model = small_model(tokenizer_json)
    expected = without_fold(model)
    first = model.inference_fold()
    embeddings = model.encode(TEXTS)
    assert model.inference_fold() is first
    assert gap(model.encode(TEXTS), embeddings) == 0
    assert gap(embeddings, expected) <= 1e-6
    with torch.no_grad():
        model.latent_attention_model.latents[0, 0] += 1
    assert model.inference_fold() is not first  # control


def test_a_fold_sees_what_no_counter_does(tokenizer_json):
    """A change through .data, as averaging of weights makes it, is a change."""
    model = small_model(tokenizer_json)
    before = model.encode(TEXTS)
    model.latent_attention_model.cross_attend_blocks[0].fn["to_kv"].weight.data.mul_(1.5)
    after = model.encode(TEXTS)
    assert gap(after, without_fold(model)) <= 1e-6
    assert gap(after, before) > 1e-4


def test_no_latents_have_no_fold(tokenizer_json):
    for pooling in ("self", "mean", "eos"):
        assert small_model(tokenizer_json, pooling=pooling).inference_fold() is None


def test_the_fold_is_of_the_dtype(tokenizer_json):
    """It is computed in fp32 whatever it is cast to, so bf16 rounds it once."""
    model = small_model(tokenizer_json)
    exact = model.inference_fold()
    model.dtype = torch.bfloat16
    for half, whole in zip(model.inference_fold(), exact, strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, whole.bfloat16())
    twice_rounded = model.latent_attention_model.fold_latents(torch.bfloat16)
    assert gap(twice_rounded[0], exact[0].bfloat16()) > 0  # control


def step(model, **kind):
    """One step of AdamW that moves every parameter of the layer."""
    layer = model.latent_attention_model.requires_grad_(True)
    embeddings = model(model.tokenize(TEXTS))
    (embeddings * random_states(len(TEXTS))).sum().backward()
    assert all(p.grad.norm() > 0 for p in layer.parameters())
    torch.optim.AdamW(layer.parameters(), lr=0.02, **kind).step()


def load(model, **kind):
    layer = model.latent_attention_model
    layer.load_state_dict({n: t * 1.3 for n, t in layer.state_dict().items()}, **kind)


def multiply(model):
    for p in model.latent_attention_model.parameters():
        p.mul_(1.3)


def copy(model):
    for p in model.latent_attention_model.parameters():
        p.copy_(p.roll(1, 0))


def new_data(model):
    for p in model.latent_attention_model.parameters():
        p.data = p.data * 1.3


UPDATES = {  # ways in which weights change under the fold that is kept
    "in place": multiply,
    "copy_": copy,
    "new data": new_data,
    "adamw": lambda model: step(model, foreach=False),
    "foreach adamw": lambda model: step(model, foreach=True),
    "fused adamw": lambda model: step(model, fused=True),
    "load_state_dict": load,
    "load_state_dict, assign": lambda model: load(model, assign=True),
}


@pytest.mark.parametrize("then_frozen", [False, True])
@pytest.mark.parametrize("how", UPDATES)
def test_the_fold_follows_the_weights(how, then_frozen, tokenizer_json):
    """Whether the layer requires gradients when `encode` is called next, or is frozen again."""
    model = small_model(tokenizer_json)
    layer = model.latent_attention_model
    before = model.encode(TEXTS)
    for turn in (1, 2):  # the second change meets what the first one kept
        UPDATES[how](model)
        layer.requires_grad_(not then_frozen)
        embeddings = model.encode(TEXTS)  # first: a forward pass without a fold drops what is kept
        expected = without_fold(model)
        assert gap(embeddings, expected) <= 1e-6
        assert gap(before, expected) > 0.1
        model.encode(TEXTS)  # keeps one again for the next turn
        if turn == 1:
            h = random_states(9)
            truth = ref.latent_layer(weights_of(layer), h[None], 4)[0]
            with torch.no_grad():
                assert gap(layer(h, (9,), model.inference_fold()), truth) <= 3e-5
        before = expected
        layer.requires_grad_(False)


NAMES = ["latents", "to_q", "to_kv", "to_out", "norm_context.weight", "norm_context.bias"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_fold_follows_each_weight(name, tokenizer_json):
    model = small_model(tokenizer_json)
    layer, h = model.latent_attention_model, random_states(9)
    (parameter,) = [
        p
        for n, p in layer.named_parameters()
        if n.removesuffix(".weight").endswith(name) or n.endswith(name)
    ]
    before = layer(h, (9,), model.inference_fold())
    parameter.mul_(-1)
    expected = ref.latent_layer(weights_of(layer), h[None], 4)[0]
    assert gap(layer(h, (9,), model.inference_fold()), expected) <= 1e-5
    assert gap(before, expected) > 0.1


def test_two_threads_encode_with_one_model(tokenizer_json):
    model = small_model(tokenizer_json)
    queries = [TEXTS, TEXTS[::-1]] * 4
    expected = [small_model(tokenizer_json).encode(texts) for texts in queries]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(model.encode, queries))
    for embeddings, wanted in zip(results, expected, strict=True):
        assert gap(embeddings, wanted) <= 1e-6
    assert gap(expected[0], expected[1]) > 0.05  # control


# ---- pooling


@pytest.mark.parametrize("pooling", ["latent", "self", "mean", "eos"])
def test_poolings_against_their_references(pooling, base):
    model = NVEmbed.from_pretrained(base, pooling=pooling)
    oracle = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
    tokens = model.tokenize(TEXTS, TASK)
    lengths = [len(t.ids) for t in tokens]
    assert min(t.not_pooled for t in tokens) > 5
    h = ref.hf_states(oracle, [t.ids for t in tokens], causal=False)
    if pooling in ("latent", "self"):
        w = {n: t for n, t in model.state_dict().items() if n.startswith(LATENT)}
        h = ref.latent_layer(w, h, 8, lengths if pooling == "self" else None)
    rows = []
    for text, t, n in zip(h, tokens, lengths, strict=True):
        if pooling == "eos":
            rows.append(text[n - 1])
        else:
            rows.append(text[t.not_pooled : n].sum(0) / (n - t.not_pooled))
    expected = ref.unit(torch.stack(rows))
    assert gap(model.encode(TEXTS, TASK), expected) <= 1e-5
    assert gap(model.encode(TEXTS), expected) > 0.05  # control: without the instruction
