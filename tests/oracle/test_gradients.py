"""Cached gradient = plain gradient, compiled = eager; the first step = AdamW by hand."""

from collections import Counter

import nvembed
import pytest
import torch
from helpers import (
    FILES,
    a_batch,
    command,
    log,
    scored,
    settings,
    some_rows,
    tangled_rows,
    trainable,
    worst,
)
from safetensors.torch import load_file

import train
from data.runs import checkpoint
from data.sampling import Dataset, known_positives
from nvembed import NVEmbed

# ---- gradient


def gradients(model, batch, s, **how):
    """-> (loss, gradient by name), with the same random numbers at every call."""
    torch.manual_seed(3)
    model.zero_grad()
    loss, _ = train.backward(model, batch, s, **how)
    return loss.item(), {name: p.grad.clone() for name, p in train.trained(model).items()}


@pytest.mark.parametrize("changes", ({}, {"dims": [8, 32], "false_negatives": 0.05, "kd": 1.0}))
def test_cached_gradient_equals_plain_with_dropout(base, monkeypatch, changes):
    s = settings(temperature=0.2, **changes)
    model = trainable(base, s, torch.float64)
    batch = a_batch(model, scored(tangled_rows(2)), s)
    assert len(nvembed.pack(batch.tokens, s.micro_tokens)) > 3
    plain_loss, plain = gradients(model, batch, s, cached=False)
    loss, cached = gradients(model, batch, s, cached=True)
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    assert worst(plain, cached) <= 1e-10
    monkeypatch.setattr(train, "reseed", lambda *key: None)
    without_replay = gradients(model, batch, s)[1]
    assert worst(plain, without_replay) > 1e-3  # control: other dropout in the second run


def test_micro_batches_do_not_change_the_batch(base):
    """In-batch negatives are those of the whole batch, however it is split.

    Dropout is 0, since its masks follow the split.
    """
    s, rows = settings(temperature=0.2, lora_dropout=0.0), some_rows(6)
    model = trainable(base, s, torch.float64)
    batch = a_batch(model, rows, s)
    unsplit = settings(temperature=0.2, micro_tokens=10**6)
    whole_loss, whole = gradients(model, batch, unsplit)
    for micro_tokens in (44, 64, 200):
        split = settings(temperature=0.2, micro_tokens=micro_tokens)
        assert len(nvembed.pack(batch.tokens, micro_tokens)) > 1
        loss, gradient = gradients(model, batch, split)
        assert loss == pytest.approx(whole_loss, rel=1e-12)
        assert worst(whole, gradient) <= 1e-10
    # control: plain accumulation of two halves sees half the negatives
    halves = [a_batch(model, half, s) for half in (rows[:3], rows[3:])]
    (loss_a, a), (loss_b, b) = [gradients(model, half, s) for half in halves]
    assert (loss_a + loss_b) / 2 < whole_loss - 0.1
    assert worst(whole, {name: (a[name] + b[name]) / 2 for name in whole}) > 1e-2


@pytest.mark.slow
def test_compiled_gradient_is_the_eager_one(base):
    """With dropout, whose masks are drawn outside of what is compiled; on a GPU inside.

    Cached and not.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = settings(temperature=0.2)
    batch = a_batch(NVEmbed.from_pretrained(base), tangled_rows(2), s)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()  # what other tests compiled would serve here too
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = trainable(base, settings(temperature=0.2, compile=compiled)).to(device)
        for cached in (True, False):
            found.append(gradients(model, batch, s, cached=cached)[1])
        ran = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert ran == compiled  # control: it was compiled
    assert max(worst(found[0], other) for other in found[1:]) <= 1e-4


@pytest.mark.parametrize("micro_tokens", (10**6, 64))
def test_one_micro_batch_needs_no_cache(base, micro_tokens):
    s = settings(micro_tokens=micro_tokens)
    model = trainable(base, s)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    batch = a_batch(model, some_rows(6), s)
    gradients(model, batch, s)
    parts = len(nvembed.pack(batch.tokens, micro_tokens))
    assert len(calls) == (1 if parts == 1 else 2 * parts)
    assert (parts == 1) == (micro_tokens == 10**6)


# ---- optimizer


def test_what_is_trained(base):
    s = settings()
    model = trainable(base, s)
    names, layers = set(train.trained(model)), model.embedding_model.layers
    assert sum(".lora_" in name for name in names) == 2 * 7 * len(layers) == len(names) - 14
    assert sum(name.startswith("latent_attention_model.") for name in names) == 14
    c = model.config
    d, f, kv = c.hidden_size, c.intermediate_size, c.head_dim * c.num_key_value_heads
    lora = 4 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f)) * len(layers)
    pooling = sum(p.numel() for p in model.latent_attention_model.parameters())
    assert sum(p.numel() for p in train.trained(model).values()) == lora + pooling
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(train.trained(model).values(), lr=0.1, fused=True)
    train.train_step(model, optimizer, a_batch(model, some_rows(4), s), s, 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert len(before) > len(names)  # the base, bit for bit, is not
    assert "latent_attention_model.latents" in moved
    assert "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight" in moved


@pytest.mark.parametrize("lora_rank", (4, 0))
def test_trained_weights_are_fp32(base, lora_rank):
    """While it computes in bf16, in which frozen weights are kept; vectors come in fp32."""
    s = settings(dtype="bfloat16", lora_rank=lora_rank)
    model, _ = train.build(base, s, "cpu")
    found = {(p.requires_grad, p.dtype) for p in model.parameters()}
    frozen = {(False, torch.bfloat16)} if lora_rank else set()
    assert found == {(True, torch.float32)} | frozen
    assert model.dtype == torch.bfloat16
    assert model(a_batch(model, some_rows(2), s).tokens).dtype == torch.float32


def test_blocks_are_recomputed_if_asked(base):
    for recompute in (False, True):
        model, _ = train.build(base, settings(recompute=recompute), "cpu")
        assert {block.recompute for block in model.embedding_model.layers} == {recompute}


def test_every_step_has_dropout_of_its_own(base, monkeypatch):
    """Each micro-batch has a key of its own at each step, used twice: the cache replays it."""
    s = settings()
    model = trainable(base, s)
    batch = a_batch(model, some_rows(6), s)
    optimizer = torch.optim.AdamW(train.trained(model).values())
    keys = []
    monkeypatch.setattr(train, "reseed", lambda *key: keys.append(key))
    for step in (0, 1):
        train.train_step(model, optimizer, batch, s, step)
    parts = len(nvembed.pack(batch.tokens, s.micro_tokens))
    assert parts > 1
    assert Counter(Counter(keys).values()) == {2: 2 * parts}


def test_held_out_figures_are_those_of_eval_mode(base):
    """Without dropout; the model is in training afterwards."""
    s, held = settings(batch=4), some_rows(4, seed=3)
    model = trainable(base, s)
    dataset = Dataset("set", "Find it", False, some_rows(4), held)
    found = train.held_out(model, [dataset], s, known_positives([dataset]))
    assert model.training
    batch = a_batch(model, held, s)
    trained_loss, _ = train.batch_loss(model(batch.tokens), batch, s)
    loss, _ = train.batch_loss(model.eval()(batch.tokens), batch, s)
    assert found["held_out_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert abs(trained_loss - loss) > 1e-3 * loss  # control


def gradient_norm(optimizer):
    """Norm of the gradient of a first step, from the moments that it left."""
    moments = [t for name, t in optimizer.items() if name.endswith("exp_avg")]
    return sum(float(t.norm()) ** 2 for t in moments) ** 0.5 / 0.1


def test_first_step_is_adamw_by_hand(recipe, base, tmp_path):
    """p (1 - lr decay) - lr m / (sqrt(v) + 1e-8) of a clipped gradient.

    The moments m and v are in the checkpoint. The first of four steps of warm-up has lr / 4.
    """
    flags = ("--steps", 1, "--warmup", 4, "--weight-decay", 0.5, "--clip")
    run, free = tmp_path / "run", tmp_path / "free"
    assert command(recipe, "--out", run, *flags, 1e-3)[0] == 0
    assert command(recipe, "--out", free, *flags, 1e9)[0] == 0  # control: no clipping
    s = settings(weight_decay=0.5)
    model, _ = train.build(base, s, "cpu")
    stored = load_file(checkpoint(run) / FILES[0])
    optimizer = load_file(checkpoint(run) / FILES[1])
    lr = s.lr / 4
    for name, p in train.trained(model).items():
        p = p.detach()
        m = optimizer[f"{name}.exp_avg"] / (1 - 0.9)
        v = optimizer[f"{name}.exp_avg_sq"] / (1 - 0.999)
        step = lr * m / (v.sqrt() + 1e-8)
        decayed = p * (1 - lr * 0.5) - step
        torch.testing.assert_close(stored[name], decayed, rtol=1e-5, atol=1e-6)
        undecayed = torch.allclose(stored[name], p - step, rtol=1e-5, atol=1e-6)
        assert p.norm() == 0 or not undecayed  # control
    norms = [gradient_norm(load_file(checkpoint(r) / FILES[1])) for r in (run, free)]
    logged = [log(r)[-1]["grad_norm"] for r in (run, free)]
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert logged[0] == logged[1] > 0.01
    assert norms[1] == pytest.approx(logged[1], rel=1e-4)
