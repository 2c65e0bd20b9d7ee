"""Weights rounded at load by torchao: numbers, size, what is left alone, what is refused."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import nvembed
from data.commands import InputError
from nvembed import NVEmbed

TEXTS = [
    "river stone engine paper",
    "doctor bread",
    "a letter from the island in winter, with music",
]
FLOAT, BFLOAT = torch.float32, torch.bfloat16
FORMS = [("int8", FLOAT), ("int8", BFLOAT), ("fp8", FLOAT), ("fp8", BFLOAT), ("int4", BFLOAT)]
LEAST_COSINE = {"int8": 0.999, "fp8": 0.99, "int4": 0.9}  # random weights of 64 columns


def projections(model):
    found = model.embedding_model.named_modules()
    return {n: layer for n, layer in found if n.split(".")[-1] in nvembed.PROJECTIONS}


def cosines(model, other, **how):
    return (model.encode(TEXTS, **how) * other.encode(TEXTS, **how)).sum(axis=1)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_embeddings_of_each_form(base, form, dtype):
    plain = NVEmbed.from_pretrained(base, dtype=dtype)
    model = NVEmbed.from_pretrained(base, dtype=dtype, quantize=form)
    assert cosines(model, plain).min() > LEAST_COSINE[form]
    assert cosines(model, plain, instruction="Find it").min() > LEAST_COSINE[form]
    assert (model.encode(TEXTS) != plain.encode(TEXTS)).mean() > 0.5  # control: it was rounded
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fewer_bits_are_further_away(base):
    plain = NVEmbed.from_pretrained(base, dtype=BFLOAT)
    distances = []
    for form in ("int8", "fp8", "int4"):
        model = NVEmbed.from_pretrained(base, dtype=BFLOAT, quantize=form)
        distances.append(1 - cosines(model, plain).mean())
    assert distances == sorted(distances) and distances[2] > 2 * distances[0]


@pytest.mark.parametrize("form", ("int8", "fp8"))
def test_rounded_to_nearest_with_a_scale_for_each_row(base, form):
    """Independent of torchao: rows scaled to the format's largest number, rounded, scaled back."""
    plain = NVEmbed.from_pretrained(base)
    model = NVEmbed.from_pretrained(base, quantize=form)
    layers = projections(plain)
    assert len(layers) == 3 * 7
    for name, layer in projections(model).items():
        weight = layers[name].weight
        largest = weight.abs().amax(dim=1, keepdim=True)
        if form == "int8":
            scale = largest / 127.5
            rounded = (weight / scale).round().clamp(-128, 127) * scale
        else:
            scale = largest / 448
            rounded = (weight / scale).to(torch.float8_e4m3fn).float() * scale
        ours = layer.weight.dequantize()
        equal = torch.isclose(ours, rounded, rtol=1e-5, atol=1e-6)
        assert equal.float().mean() > 0.99  # ties may go either way
        assert (rounded - weight).abs().max() > 1e-3  # control: it was rounded
        layers[name].weight.data = ours
    assert cosines(model, plain).min() > 1 - 1e-5  # the same products


def test_only_the_projections_are_rounded(base):
    plain = NVEmbed.from_pretrained(base)
    model = NVEmbed.from_pretrained(base, quantize="int8")
    rounded = {f"embedding_model.{name}.weight" for name in projections(model)}
    before = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        is_plain = type(parameter) is torch.nn.Parameter
        assert is_plain == (name not in rounded), name
        if is_plain:
            assert torch.equal(parameter, before[name])


def stored_bytes(tensor):
    """Bytes of a tensor, or of the tensors that a quantised one consists of."""
    if not hasattr(tensor, "tensor_data_names"):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.tensor_data_names)


@pytest.mark.parametrize(("form", "share"), [("int8", 0.54), ("fp8", 0.54), ("int4", 0.32)])
def test_memory(base, form, share):
    """Of bf16: half, and a quarter, and what the scales add at 64 columns."""
    model = NVEmbed.from_pretrained(base, dtype=BFLOAT, quantize=form)
    total, plain = 0, 0
    for layer in projections(model).values():
        total += stored_bytes(layer.weight)
        plain += 2 * layer.in_features * layer.out_features
    assert share - 0.08 < total / plain <= share


def test_settings_of_pytorch_are_left_alone(base):
    before = torch.get_float32_matmul_precision()
    NVEmbed.from_pretrained(base, quantize="int8")
    assert torch.get_float32_matmul_precision() == before
    assert not torch._inductor.config.force_fuse_int_mm_with_mul


def test_base_of_an_adapter(base, tmp_path):
    """The base is rounded, the adapter is not."""
    model = NVEmbed.from_pretrained(base)
    nvembed.add_lora(model, 4, 8, 0.0)
    for layer in nvembed.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    nvembed.save_adapter(model, tmp_path, base)
    found = NVEmbed.from_pretrained(tmp_path, quantize="int8")
    assert cosines(found, model).min() > 0.999
    assert cosines(found, NVEmbed.from_pretrained(base)).max() < 0.99  # control: it is in use
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3 * 7 * 2


def test_what_is_refused(base, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="quantize: expected int8, int4 or fp8, got 'int3'"):
        NVEmbed.from_pretrained(base, quantize="int3")
    with pytest.raises(InputError, match="quantize: expected bfloat16 for int4, got torch.float32"):
        NVEmbed.from_pretrained(base, quantize="int4")
    model = NVEmbed.from_pretrained(base, quantize="int8")
    with pytest.raises(InputError, match="save_pretrained: expected plain weights, got int8"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.quantization", raising=False)
    message = "quantize: expected the package torchao: pip install torchao"
    with pytest.raises(InputError) as error:
        NVEmbed.from_pretrained(base, quantize="int8")
    assert str(error.value) == message
    assert len(NVEmbed.from_pretrained(base).encode(TEXTS)) == 3  # control: nothing else needs it
