"""Memory decides how many tokens a micro-batch has; the yardstick of speed; where bf16 is fast."""

import pytest
import references
import torch

import nvembed
import train
from data import machine
from data.commands import InputError
from data.machine import bytes_a_token, fitting_tokens

GIB = 2**30
MISTRAL = references.FULL
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def on_meta(shape, lora_rank=16):
    """A model of that shape as train.py builds it for a GPU, without memory."""
    config = nvembed.Config(**({"eos_token_id": 2, "bos_token_id": 1} | shape))
    with torch.device("meta"):
        model = nvembed.NVEmbed(config, references.tiny_tokenizer(), torch.bfloat16)
        model.requires_grad_(False).to(torch.bfloat16)
        if lora_rank:
            nvembed.add_lora(model, lora_rank, 32, 0.1)
        model.latent_attention_model.float().requires_grad_(True)
    if not lora_rank:
        model.requires_grad_(True).float()
    return model.train()


def weights_of(model):
    """Bytes of the weights, and of those that are trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def peak(model, tokens, recompute):
    """Bytes at the end of a micro-batch's forward pass: weights, AdamW, gradients, graph."""
    weights, trained = weights_of(model)
    return weights + trained * 3.5 + tokens * bytes_a_token(model.config, 2, recompute)


@pytest.mark.parametrize(
    ("shape", "gib", "recompute", "least", "most"),
    [
        (MISTRAL, 80, False, 6000, 8000),
        (MISTRAL, 80, True, 60_000, 120_000),
        (MISTRAL, 40, False, 512, 2000),
        (MISTRAL, 40, True, 6000, 24_000),
        (SMOLLM2, 80, False, 80_000, 120_000),
    ],
)
def test_memory_decides(shape, gib, recompute, least, most):
    """The paper's settings: as many tokens as fit a card, and none that would not."""
    model = on_meta(shape)
    total = gib * GIB * 0.985  # what a driver leaves of it
    free = total - weights_of(model)[0]
    s = train.Settings(recompute=recompute)
    tokens = fitting_tokens(model, s, free, total)
    assert least <= tokens <= most
    assert peak(model, tokens, recompute) <= 0.95 * gib * GIB  # 76 of 80
    assert peak(model, tokens, recompute) >= 0.90 * gib * GIB  # and not much less


@pytest.mark.parametrize("recompute", (False, True))
def test_where_not_one_text_fits(recompute):
    model = on_meta(MISTRAL)
    total = 24 * GIB
    free = total - weights_of(model)[0]
    with pytest.raises(InputError, match="expected a text's 512 tokens to fit") as found:
        fitting_tokens(model, train.Settings(recompute=recompute), free, total)
    assert ("--recompute" in str(found.value)) is not recompute
    assert "--max-length" in str(found.value)


@pytest.mark.parametrize(
    ("gib", "dtype", "least", "most"),
    [
        (8, torch.float32, 2000, 2600),  # a laptop: the default recipe's 5,000 in three parts
        (16, torch.float32, 5000, 6000),
        (8, torch.bfloat16, 4800, 6000),
        (64, torch.float32, 8192, 8192),
        (1, torch.float32, 64, 64),
    ],
)
def test_memory_decides_on_cpus_too(gib, dtype, least, most, monkeypatch):
    model = on_meta(SMOLLM2)
    model.embedding_model.to(dtype)
    model.dtype = dtype
    monkeypatch.setattr(nvembed.NVEmbed, "device", torch.device("cpu"))
    monkeypatch.setattr(machine, "cpu_memory", lambda: gib * GIB)
    s = train.Settings(max_length=64)
    assert least <= machine.choose_micro_tokens(model, s) <= most
    s.micro_tokens = 100
    assert machine.choose_micro_tokens(model, s) == 100


def test_memory_of_a_container_and_of_ranks(monkeypatch, tmp_path):
    whole = machine.cpu_memory()
    assert 2**28 < whole < 2**46
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.cpu_memory() == whole / 4
    monkeypatch.setattr(machine, "CONTAINER_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("268435456\n")
    assert machine.cpu_memory() == 2**26
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cpu_memory() > 2**26


def test_a_model_of_which_all_is_trained():
    """Gradients and moments of all weights count: SmolLM2 has room for fewer tokens."""
    total = 16 * GIB
    tokens = []
    for lora_rank in (16, 0):
        model = on_meta(SMOLLM2, lora_rank)
        free = total - weights_of(model)[0]
        s = train.Settings(lora_rank=lora_rank, max_length=64)
        tokens.append(fitting_tokens(model, s, free, total))
    assert tokens[1] < 0.9 * tokens[0]


def saved_bytes(model, tokens):
    """Bytes that the graph of a forward pass over `tokens` keeps, beside the weights."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    c = model.config
    lengths = (512,) * (tokens // 512)
    rope = nvembed.rope_tables(c, lengths, "cpu", torch.bfloat16)
    rope = [table.to("meta") for table in rope]
    x = torch.zeros(tokens, c.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in model.embedding_model.layers:
            x = block(x, rope, lengths)
        x = model.latent_attention_model(x, lengths)
    return sum(size for size, _ in kept.values())


def test_what_a_graph_keeps(monkeypatch):
    """The formula against what PyTorch keeps; attention keeps q, k and v."""
    monkeypatch.setattr(nvembed, "attend", lambda q, k, v, *_: q * (k.sum() + v.sum()))
    model = on_meta(MISTRAL | {"num_hidden_layers": 4})
    few, many = [saved_bytes(model, tokens) for tokens in (1024, 3072)]
    measured = (many - few) / 2048
    assert bytes_a_token(model.config, 2, False) == pytest.approx(measured, rel=0.1)


CAPABILITIES = (
    ("amx_bf16", torch.bfloat16),
    ("avx512_bf16", torch.bfloat16),
    ("avx2", torch.float32),
)


@pytest.mark.parametrize(("able", "expected"), CAPABILITIES)
def test_fast_dtype(able, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, "sse": True})
    assert machine.fast_dtype() == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fast_dtype_of_a_gpu(native, expected, monkeypatch):
    """A T4 supports bf16 by emulation only."""

    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert machine.fast_dtype("cuda") == machine.fast_dtype("cuda:1") == expected
