"""`encode`: packed = one by one, order, chunks, compiled = eager; `pack`; the fastest dtype."""

import numpy as np
import pytest
import torch
from compare import TASK, TEXTS, error_of, gap

import nvembed
from nvembed import NVEmbed, Tokens


@pytest.mark.parametrize("pooling", ["latent", "self", "mean", "eos"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_one_by_one(pooling, causal, base):
    model = NVEmbed.from_pretrained(base, pooling=pooling, causal=causal)
    alone = np.concatenate([model.encode([text], TASK) for text in TEXTS])
    for batch_tokens in (150, 211, 16384):
        together = model.encode(TEXTS, TASK, batch_tokens=batch_tokens)
        assert together.dtype == np.float32
        assert together.shape == (len(TEXTS), 64)
        assert gap(together, alone) <= 2e-6
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() <= 1e-6
    assert gap(alone[0], alone[5]) == 0  # the same text twice
    assert gap(together[0], together[5]) <= 2e-6
    different = alone @ alone.T - 2 * np.eye(len(TEXTS))
    different[0, 5] = different[5, 0] = -1
    assert different.max() < 0.9999  # control: other texts are other vectors


def test_packed_texts_do_not_see_each_other(base, monkeypatch):
    """Control of the test above: attention over the whole batch would fail it."""
    model, attend = NVEmbed.from_pretrained(base, pooling="mean"), nvembed.attend
    alone = np.concatenate([model.encode([text]) for text in TEXTS])

    def over_the_batch(q, k, v, lengths, *rest):
        return attend(q, k, v, (sum(lengths),), *rest)

    monkeypatch.setattr(nvembed, "attend", over_the_batch)
    assert gap(model.encode(TEXTS), alone) > 0.05


def test_order_and_empty_inputs(base):
    model = NVEmbed.from_pretrained(base)
    assert model.encode([]).shape == (0, 64)
    forward = model.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert gap(model.encode([TEXTS[i] for i in order]), forward[order]) <= 2e-6
    assert gap(forward[::-1].copy(), forward) > 0.05
    assert np.isfinite(model.encode([""])).all()
    assert np.isfinite(model.encode(["", ""], TASK)).all()
    assert "texts" in error_of(model.encode, "a string")
    assert "batch_tokens" in error_of(model.encode, ["a long text"], batch_tokens=3)
    model.train()
    model.encode(["a"])
    assert model.training


def test_encode_in_chunks(base, monkeypatch):
    """Texts are tokenised ahead, a CHUNK at a time, each with its own instruction."""
    model, tasks = NVEmbed.from_pretrained(base), [TASK, "", "Other", "", TASK, "", ""]
    whole, tokenize = model.encode(TEXTS, tasks), model.tokenize
    calls = []

    def recorded(texts, *rest):
        calls.append(texts)
        return tokenize(texts, *rest)

    parts = nvembed.parts
    monkeypatch.setattr(nvembed, "parts", lambda *args: parts(*args, (3, 10**6)))
    monkeypatch.setattr(model, "tokenize", recorded)
    assert gap(model.encode(TEXTS, tasks), whole) <= 2e-6
    assert [text for texts in calls for text in texts] == TEXTS
    assert [len(texts) for texts in calls][:3] == [3, 3, 1]
    assert gap(model.encode(TEXTS, tasks[::-1]), whole) > 0.05  # control
    # an error of the thread that tokenises arrives
    assert "Instruct" in error_of(model.encode, TEXTS, [*tasks[:6], "Instruct: no"])


@pytest.mark.slow
def test_compiled_encode_is_the_eager_one(base):
    """For batches of any size, with one graph for all of them."""
    model = NVEmbed.from_pretrained(base)
    eager = model.encode(TEXTS, TASK)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_blocks()
    for batch_tokens in (150, 211, 16384):
        assert gap(model.encode(TEXTS, TASK, batch_tokens=batch_tokens), eager) <= 5e-6
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert after > before  # control: it was compiled


CAPABILITIES = (
    ("amx_bf16", torch.bfloat16),
    ("avx512_bf16", torch.bfloat16),
    ("avx2", torch.float32),
)


@pytest.mark.parametrize(("able", "expected"), CAPABILITIES)
def test_fast_dtype(able, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, "sse": True})
    assert nvembed.fast_dtype() == expected
    assert nvembed.fast_dtype("cuda") == torch.bfloat16


def test_pack_keeps_every_text_once_within_the_budget():
    tokens = [Tokens([5] * n, 0) for n in (3, 9, 1, 9, 4, 4, 2, 8)]
    batches = nvembed.pack(tokens, 10)
    assert sorted(sum(batches, [])) == list(range(8))
    sizes = [[len(tokens[i].ids) for i in batch] for batch in batches]
    assert max(map(sum, sizes)) <= 10
    assert sum(sizes, []) == sorted(sum(sizes, []), reverse=True)
    assert nvembed.pack([], 10) == []
    assert "batch_tokens" in error_of(nvembed.pack, tokens, 8)
