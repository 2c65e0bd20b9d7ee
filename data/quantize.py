"""Smaller weights at load by the optional package torchao: int8, fp8 or int4, to nearest."""

import torch

from data.commands import InputError, optional_package


FORMS = ("int8", "int4", "fp8")


def check_quantize(form, dtype):
    """Refuses what cannot be rounded to -> torchao's module."""
    if form not in FORMS:
        raise InputError(f"quantize: expected int8, int4 or fp8, got {form!r}")
    if form == "int4" and dtype != torch.bfloat16:
        raise InputError(f"quantize: expected bfloat16 for int4, got {dtype}")
    return optional_package("torchao.quantization", "quantize")


def quantize_weights(model, form, names):
    """Rounds the model's layers whose name ends in one of `names`, in place -> the model.

    int8 and fp8 have a scale for each row of a weight, int4 one for 32 columns of it. Products are
    computed in the model's dtype. Such weights are neither trained nor saved.
    """
    ao = check_quantize(form, model.dtype)
    plain = {"set_inductor_config": False}  # else torchao changes settings of all of PyTorch
    if form == "int8":
        config = ao.Int8WeightOnlyConfig(**plain)
    elif form == "fp8":
        config = ao.Float8WeightOnlyConfig(**plain)
    elif model.device.type == "cpu":
        int4 = optional_package("torchao.prototype.quantization.int4", "quantize")
        config = int4.PrototypeInt4WeightOnlyConfig(group_size=32, **plain)
    else:
        packing = {"int4_packing_format": "tile_packed_to_4d"}
        config = ao.Int4WeightOnlyConfig(group_size=32, **packing, **plain)
    for name, layer in model.named_modules():
        if form == "int4" and name.endswith(names) and layer.in_features % 32 != 0:
            width = f"{name} reads {layer.in_features} columns"
            raise InputError(f"quantize: int4: expected a multiple of 32, {width}")
    ao.quantize_(model, config, filter_fn=lambda _, name: name.endswith(names))
    model.quantized = form
    return model


def check_plain(model):
    """Refuses to save rounded weights: they are made again at each load."""
    form = getattr(model, "quantized", None)
    if form is not None:
        raise InputError(f"save_pretrained: expected plain weights, got {form}")
