"""`encode`: packed = one by one, order, chunks, compiled = eager; `pack`; the fastest dtype.

Arguments that are wrong; copies of a model; threads; inference mode.
"""

import copy
import pickle
import sys
import threading

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


def test_dims_are_the_first_numbers_as_unit_vectors(base):
    model = NVEmbed.from_pretrained(base)
    whole = model.encode(TEXTS, TASK)
    for dims in (1, 24, np.int64(64), 64.0):
        found = model.encode(TEXTS, TASK, dims=dims)
        expected = whole[:, : int(dims)]
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        assert found.shape == (len(TEXTS), int(dims)) and found.dtype == np.float32
        assert np.abs(found - expected).max() <= 1e-6
    assert (model.encode(TEXTS, TASK, dims=64) == whole).all()  # bit for bit
    assert np.linalg.norm(whole[:, :24], axis=1).max() < 0.9  # control
    for dims in (0, -1, 65, 2.5, "64"):
        message = error_of(model.encode, TEXTS, dims=dims)
        assert message == f"dims: expected from 1 to 64, the width of a vector, got {dims}"


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
    torch._dynamo.reset()  # what other tests compiled would serve here too
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_blocks()
    for batch_tokens in (150, 211, 16384):
        assert gap(model.encode(TEXTS, TASK, batch_tokens=batch_tokens), eager) <= 5e-6
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert after > before  # control: it was compiled
    other = copy.deepcopy(model)
    for block in other.embedding_model.layers:
        block.mlp.up_proj.weight.data *= 2
    assert gap(other.encode(TEXTS, TASK), eager) > 1e-3  # a copy computes with its own weights
    assert gap(model.encode(TEXTS, TASK), eager) <= 5e-6


@pytest.mark.parametrize("pooling", ("latent", "mean"))
def test_a_text_that_is_not_finite_harms_no_other(pooling, base):
    """Not even in its batch."""
    model = NVEmbed.from_pretrained(base, pooling=pooling)
    texts = ["the river", "Z", "a stone"]
    others = model.encode(texts[::2])
    (token,) = set(model.tokenize(["Z"])[0].ids) - set(model.tokenize([""])[0].ids)
    model.embedding_model.embed_tokens.weight.data[token] = torch.inf
    embeddings = model.encode(texts)
    assert np.isnan(embeddings[1]).all()
    assert gap(embeddings[::2], others) <= 1e-6


def test_pack_keeps_every_text_once_within_the_budget():
    tokens = [Tokens([5] * n, 0) for n in (3, 9, 1, 9, 4, 4, 2, 8)]
    batches = nvembed.pack(tokens, 10)
    assert sorted(sum(batches, [])) == list(range(8))
    sizes = [[len(tokens[i].ids) for i in batch] for batch in batches]
    assert max(map(sum, sizes)) <= 10
    assert sum(sizes, []) == sorted(sum(sizes, []), reverse=True)
    assert nvembed.pack([], 10) == []
    assert "batch_tokens" in error_of(nvembed.pack, tokens, 8)


# ---- arguments


def test_texts_that_are_no_texts(base):
    model = NVEmbed.from_pretrained(base)
    assert "texts[1]: expected a str, got None" in error_of(model.encode, ["a", None, "b"])
    assert "texts[2]: expected a str, got 3.5" in error_of(model.encode, ["a", "b", 3.5])
    assert "texts[1]: expected Unicode" in error_of(model.encode, ["a", "half \ud83c"])
    assert "texts: expected a list of str, got NoneType" in error_of(model.encode, None)
    assert "texts[0]" in error_of(model.encode, b"bytes")
    assert "texts[1]" in error_of(model.tokenize, ["a", None])


def test_instructions_that_do_not_fit(base):
    model = NVEmbed.from_pretrained(base)
    assert "instruction: expected a list of str" in error_of(model.encode, ["a"], None)
    for tasks in ([], ["x"], ["x", "y", "z"]):
        message = error_of(model.encode, ["a", "b"], tasks)
        assert f"instruction: expected a str, or one for each text; got {len(tasks)}" in message
        assert "for 2 texts" in message
    assert "instruction[1]: expected a str" in error_of(model.encode, ["a", "b"], ["x", None])


def test_texts_of_any_iterable(base):
    model = NVEmbed.from_pretrained(base)
    expected = model.encode(TEXTS, TASK)
    kinds = (
        tuple(TEXTS),
        (text for text in TEXTS),
        np.array(TEXTS),
        dict.fromkeys(range(7)).keys(),
    )
    for texts in kinds[:3]:
        assert gap(model.encode(texts, TASK), expected) == 0
    assert "texts[0]" in error_of(model.encode, kinds[3])  # control
    tasks = (TASK for _ in TEXTS)
    assert gap(model.encode(TEXTS, tasks), expected) == 0


@pytest.mark.parametrize("keep_eos", [False, True])
def test_lengths_out_of_range(base, keep_eos):
    model = NVEmbed.from_pretrained(base, keep_eos=keep_eos)  # of 512 positions
    for length in (0, -1, -100, 513, 10**9, 2.5, "512"):
        message = error_of(model.encode, ["a", "b"], max_length=length)
        assert (
            message == f"max_length: expected from 1 to 512, which the model can read, got {length}"
        )
        assert "max_length" in error_of(model.tokenize, ["a"], max_length=length)
    assert model.encode(["a"], max_length=1).shape == model.encode(["a"], max_length=512).shape
    assert len(model.tokenize(["x" * 900], max_length=4.0)[0].ids) == 4
    for batch_tokens in (0, -1, 2):
        assert "batch_tokens" in error_of(model.encode, ["a b c"], batch_tokens=batch_tokens)


def test_the_length_of_a_text_is_the_folders(base):
    """512, or what the model can read or its folder says."""
    text = ["x" * 900]
    for settings, length in (
        ({}, 512),
        ({"max_position_embeddings": 300}, 300),
        ({"max_position_embeddings": 800}, 512),
        ({"max_position_embeddings": 800, "max_seq_length": 700}, 700),
        ({"max_seq_length": 9999}, 512),
    ):
        model = NVEmbed.from_pretrained(base, **settings)
        assert len(model.tokenize(text)[0].ids) == length
        assert gap(model.encode(text), model.encode(text, max_length=length)) == 0


def test_dtype_by_name(base, tmp_path):
    model = NVEmbed.from_pretrained(base, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    for dtype in ("bf16", "auto", "int8", "Tensor", 16, torch.int64):
        assert "dtype: expected one of" in error_of(NVEmbed.from_pretrained, base, dtype=dtype)
        assert "dtype: expected one of" in error_of(model.save_pretrained, tmp_path, dtype)
    model.save_pretrained(tmp_path, "float32")
    saved = NVEmbed.from_pretrained(tmp_path, None).state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# ---- one model in several hands


def adapted(base):
    """A model whose vectors are others in training mode."""
    model = NVEmbed.from_pretrained(base, pooling="mean")
    nvembed.add_lora(model, r=4, alpha=64, dropout=0.5)
    for layer in nvembed.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_the_mode_is_restored_whatever_happens(base):
    model = adapted(base).train()
    model.embedding_model.layers[1].eval()  # a part may be in another mode
    before = modes(model)
    assert {True, False} == set(before)
    model.encode(["a"])
    assert modes(model) == before
    error_of(model.encode, ["a b c"], batch_tokens=1)  # after the mode was changed
    assert modes(model) == before


@pytest.mark.parametrize("training", [False, True])
def test_threads(base, training):
    """Nine at once: each gets the vectors of eval mode, and the model's mode is what it was."""
    model = adapted(base).train(training)
    texts = ["the sun", "a b"]
    expected = model.encode(texts)
    found, switch = [], sys.getswitchinterval()

    def work():
        found.extend(gap(model.encode(texts), expected) for _ in range(30))

    threads = [threading.Thread(target=work) for _ in range(9)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert len(found) == 9 * 30  # none ended in an error
    assert max(found) <= 1e-6
    assert set(modes(model)) == {training}
    with torch.no_grad():  # control: in training mode the vectors are others
        assert gap(model.train()(model.tokenize(texts)), expected) > 0.01


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_copies_are_the_model(pooling, base):
    """A literal "</s>" stays text; the fold that `encode` keeps is not taken along for another."""
    model = NVEmbed.from_pretrained(base, pooling=pooling)
    texts = ["one </s> two", "<s>"]
    expected = model.encode(texts, TASK)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.tokenize(texts) == model.tokenize(texts)
        assert gap(other.encode(texts, TASK), expected) == 0
        assert not other.training
        parsed = copy.deepcopy(model.tokenizer).encode(texts[0], add_special_tokens=False).ids
        assert 2 in parsed  # control: what a copied tokenizer makes of it
        assert 2 not in other.tokenize(texts)[0].ids[:-1]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert gap(other.encode(texts, TASK), expected) > 1e-3
        assert gap(model.encode(texts, TASK), expected) == 0


def latent_weight(model):
    return model.latent_attention_model.cross_attend_blocks[0].fn["to_out"].weight


def test_inference_mode(base):
    """Loaded or used in it; a weight that is changed afterwards still changes the vectors."""
    expected = NVEmbed.from_pretrained(base).encode(TEXTS, TASK)
    with torch.inference_mode():
        inside = NVEmbed.from_pretrained(base)
        assert gap(inside.encode(TEXTS, TASK), expected) == 0
        latent_weight(inside).mul_(300)
        changed = inside.encode(TEXTS, TASK)
    assert gap(changed, expected) > 1e-3
    assert gap(inside.encode(TEXTS, TASK), changed) == 0
    outside = NVEmbed.from_pretrained(base)
    with torch.inference_mode():
        assert gap(outside.encode(TEXTS, TASK), expected) == 0
    assert gap(outside.encode(TEXTS, TASK), expected) == 0
    with torch.no_grad():
        latent_weight(outside).mul_(300)
    assert gap(outside.encode(TEXTS, TASK), changed) == 0


@pytest.mark.slow
def test_one_compilation_serves_all_blocks(base):
    """The same number of graphs for one block and for three: a deep model compiles no longer."""
    graphs = []
    for layers in (1, 3):
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        model = NVEmbed.from_pretrained(base)
        model.embedding_model.layers = model.embedding_model.layers[:layers]
        model.compile_blocks().encode(TEXTS, TASK)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert graphs[0] == graphs[1] > 0
