"""Folders of PEFT's LoRA adapters: what they say, their tensors, and how one is written.

Other kinds of adapter, and variants of LoRA that compute something else, are refused.
"""

from pathlib import Path

import safetensors.torch

from data.commands import InputError, check_ranges
from data.files import check_fields, read_json, renamed, write_json
from data.folders import check_finite, check_shape, folder_to_write, local_folder, read_tensors
from data.folders import weight_files

NEUTRAL = (  # fields of PEFT's LoRA that change nothing, or that our own fields and tensors tell
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("bias", "init_lora_weights", "exclude_modules", "megatron_core", "qalora_group_size"),
    "runtime_config",
)
NUMBER = (int, float)
SETTINGS = {"r": int, "lora_alpha": NUMBER, "lora_dropout": NUMBER, "target_modules": list}
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")  # others change the base's weights


def is_adapter(folder):
    """Whether a folder holds a PEFT adapter, and no model of its own."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        return False
    if any(file.exists() for file in weight_files(folder)):
        raise InputError(f"{folder}: expected a model or an adapter, got both")
    return True


def adapter_base(folder):
    """The base that a PEFT adapter names -> its folder or hub id; an adapter is none."""
    path = Path(folder, "adapter_config.json")
    base = read_json(path).get("base_model_name_or_path")
    where = f"{path}: field 'base_model_name_or_path'"
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}: expected the folder or hub id of its base, got {base!r}")
    try:
        base = local_folder(base)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if is_adapter(base):
        raise InputError(f"{where}: expected a whole model, got the adapter '{base}'")
    if text_rules(folder) not in (None, text_rules(base)):
        raise InputError(f"{folder}/tokenizer.json: expected that of the base '{base}', or none")
    return base


def text_rules(folder):
    """What tokenizer.json does with a text, None without it; padding and truncation are ours."""
    path = Path(folder, "tokenizer.json")
    if not path.exists():
        return None
    kept = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    found = read_json(path)
    return [found.get(name) for name in kept]


def adapter_settings(folder):
    """r, alpha, dropout and targets of a PEFT folder; other kinds of adapter are refused."""
    path = Path(folder, "adapter_config.json")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: field 'peft_type': expected LORA, got {config.get('peft_type')}")
    # DoRA, rank patterns, chosen layers and the like: other arithmetic than ours
    variants = [name for name, value in config.items() if value and name not in NEUTRAL]
    if config.get("bias", "none") != "none":
        variants.append("bias")
    if config.get("init_lora_weights") not in PLAIN_STARTS:  # PiSSA, OLoRA, ...
        variants.append("init_lora_weights")
    if variants:
        found = {name: config[name] for name in variants}
        raise InputError(f"{path}: expected plain LoRA, got {found}")

    settings = {name: config[name] for name in SETTINGS if name in config}
    check_fields(settings, SETTINGS, {}, path)
    check_ranges(settings, f"{path}: ")
    targets = settings["target_modules"]
    if not all(isinstance(name, str) for name in targets):
        raise InputError(f"{path}: field 'target_modules': expected names, got {targets}")
    return list(settings.values())


def read_adapter(folder, expected):
    """adapter_model.safetensors -> {name in our decoder: tensor}, as in `expected`."""
    path = Path(folder, "adapter_model.safetensors")
    state = {}
    for name, tensor in read_tensors(path).items():
        _, _, place = name.partition("layers.")  # what is before it depends on the wrapped class
        state["embedding_model.layers." + place.removesuffix(".weight")] = tensor
    for name in (*expected, *state):
        if name not in expected or name not in state:
            raise InputError(f"{path}: tensor '{name}': missing or unknown")
        check_shape(name, state[name], expected[name], path)
    check_finite(state, path)
    return state


def is_released(base):
    """Whether AutoModel(base) is the released class, in which the decoder is `embedding_model`."""
    config = local_folder(base) / "config.json"
    return config.exists() and "text_config" in read_json(config)


def write_adapter(path, state, base, r, alpha, dropout, targets):
    """Writes the folder of a LoRA adapter of AutoModel(base); `state` has our decoder's names."""
    outside = "" if is_released(base) else "embedding_model."  # what AutoModel(base) has not
    file = folder_to_write(path, "config.json") / "adapter_model.safetensors"
    check_finite(state, file)
    tensors = {}
    for name, tensor in state.items():
        name = name.removeprefix(outside)
        tensors[f"base_model.model.{name}.weight"] = tensor.detach().cpu()
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": alpha,
        "bias": "none",
        "lora_dropout": dropout,
        "target_modules": targets,
        "inference_mode": True,
    }
    with renamed(file) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(Path(path, "adapter_config.json"), config)
