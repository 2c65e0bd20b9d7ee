"""What the files of a model folder say, in the dialects that are about.

A folder is a Mistral, Llama, Qwen2 or 3 base, NV-Embed-v1 or v2, a model saved by this project, or
a PEFT adapter. What would be computed otherwise than by its authors' code is refused.
"""

import hashlib
import sys
from pathlib import Path

from data.adapters import adapter_base, is_adapter, is_released
from data.commands import InputError
from data.files import check_fields, read_json, sha256
from data.folders import LATENT_FIELDS, local_folder
from data.peers import added_tokens, check_modules, pooling_fields, read_decoder, read_modules

FAMILIES = ("mistral", "llama", "qwen2", "qwen3", "bidir_mistral")
LLAMA3 = {  # fields of its rope_scaling: types
    "factor": (int, float),
    "low_freq_factor": (int, float),
    "high_freq_factor": (int, float),
    "original_max_position_embeddings": (int, float),
}


# ---- config.json


def config_fields(folder, names):
    """config.json -> {name: value} of those Config fields (`names`) that the folder states."""
    path = Path(folder, "config.json")
    raw, text = read_decoder(folder)
    latent = raw.get("latent_attention_config", {})
    if not isinstance(latent, dict):
        raise InputError(f"{path}: field 'latent_attention_config': expected an object")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # transformers 5, before
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    check_architecture(text, rope, rope_type, path)

    values = {name: text[name] for name in names if text.get(name) is not None}
    if "num_attention_heads" in values:  # Llama-1 has as many of both, and names one
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values["rope_scaling"] = rope if rope_type == "llama3" else None
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    eos = values.get("eos_token_id")
    if isinstance(eos, list) and eos:  # Llama-3 lists several, the text's end first
        values["eos_token_id"] = eos[0]
    family = text.get("model_type")
    values["qkv_bias"] = family == "qwen2" or values.get("qkv_bias", False)
    values["qk_norm"] = family == "qwen3" or values.get("qk_norm", False)
    if family == "qwen3":
        values.setdefault("head_dim", 128)  # transformers' default, whatever D / H is
    values["sliding_window"] = window_of_layers(text, path)
    if isinstance(text.get("is_causal"), bool):
        values["causal"] = text["is_causal"]
    for ours, theirs in LATENT_FIELDS.items():
        if theirs in latent:
            values[ours] = latent[theirs]
    if "text_config" in raw:
        if raw.get("mask_type", "b") != "b":
            raise InputError(f"{path}: field 'mask_type': expected b, got {raw['mask_type']!r}")
        values["mask_instruction"] = raw.get("is_mask_instruction", True)
        values["add_eos"] = raw.get("add_eos", True)
        return values
    if Path(folder, "tokenizer_config.json").exists():
        values["bos_token_id"] = added_tokens(folder)[0]
    return values | pooling_fields(folder, folder)


def check_architecture(text, rope, rope_type, path):
    biased = text.get("attention_bias") or text.get("mlp_bias") or False
    qwen = text.get("model_type") == "qwen2"  # its bias has a place here
    partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    checks = (
        ("model_type", text.get("model_type"), FAMILIES),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", biased and not qwen, (False,)),
        ("rope_scaling", rope_type, ("default", "llama3")),
        ("partial_rotary_factor", partial, (1.0, None)),
        ("quantize", text.get("quantize"), (None,)),  # weights are quantised at load
        ("quantization_config", text.get("quantization_config"), (None,)),
    )
    for field, value, known in checks:
        if value not in known:
            raise InputError(f"{path}: field '{field}': expected one of {known}, got {value!r}")
    if rope_type == "llama3":
        scaling = {name: rope[name] for name in LLAMA3 if name in rope}
        check_fields(scaling, LLAMA3, {}, f"{path}: rope_scaling")


def window_of_layers(text, path):
    """The sliding window, or None; it must be the same in all layers."""
    window, family = text.get("sliding_window"), text.get("model_type")
    if window is None or family == "llama":
        return None
    qwen = family in ("qwen2", "qwen3")
    if qwen and not text.get("use_sliding_window"):
        return None  # it names a window and says that it is not used
    positions = text.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(positions, int) and window >= positions:
        return None
    kinds = text.get("layer_types")
    if kinds is None:
        depth = text.get("num_hidden_layers")
        full = text.get("max_window_layers", 28) if qwen else 0
        if not isinstance(depth, int) or not isinstance(full, int):
            raise InputError(
                f"{path}: fields 'num_hidden_layers' and 'max_window_layers': expected integers"
            )
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(depth)]
    found = set(map(str, kinds))  # a kind that is no string is refused below
    if found == {"full_attention"}:
        return None
    if found != {"sliding_attention"}:
        raise InputError(f"{path}: field 'layer_types': expected one kind of layer, got {kinds}")
    if text.get("is_causal") is False:
        expected = "expected no sliding_window without causal mask"
        raise InputError(f"{path}: field 'is_causal': {expected}, got {window}")
    return window


def tell_changes(folder, values, settings):
    """Prints which settings change what a folder itself states, its Config fields `values`."""
    changes = []
    for name, value in settings.items():
        if name in values and values[name] != value:
            changes.append(f"{name} {values[name]} -> {value}")
    if changes:
        print(f"{folder}: {', '.join(changes)}", file=sys.stderr)


# ---- the whole folder


def is_sentence_transformer(folder):
    """Whether sentence-transformers loads the folder and nvembed does not (BERT and the like).

    Such a folder can name any code to run: what is not of sentence-transformers is refused.
    """
    if is_adapter(folder) or not Path(folder, "modules.json").exists():
        return False
    config = Path(folder, "config.json")
    raw = read_json(config) if config.exists() else {}
    text = raw.get("text_config", raw)
    if isinstance(text, dict) and text.get("model_type") in FAMILIES:
        return False
    check_modules(folder)
    return True


def check_pooling(folder):
    """Refuses an adapter where neither it nor its base pools: a fresh layer would pool for it."""
    if not is_adapter(folder):
        return
    base = adapter_base(folder)
    stated = pooling_fields(folder, base) | config_fields(base, {"pooling"})
    if "pooling" not in stated and not is_released(base):
        message = "expected an adapter that says how to pool, or whose base does"
        raise InputError(f"model '{folder}': {message}: the layer would be an untrained one")


OF_OURS = (".json", ".safetensors")  # endings of a model's files
OF_PEERS = (*OF_OURS, ".bin", ".pt", ".txt", ".model")


def model_files(folder):
    """The files that a model's vectors depend on; not a run's checkpoints and logs -> paths.

    They are configs, tokenizer and weights, those of sentence-transformers' modules and those of an
    adapter's base too.
    """
    folder = Path(folder)
    files = []
    kinds = OF_PEERS if is_sentence_transformer(folder) else OF_OURS
    modules = [place for _, place in read_modules(folder) if place]
    modules.append("1_Pooling")  # it counts without modules.json too
    for place in (folder, *[folder / place for place in dict.fromkeys(modules)]):
        files += sorted(path for path in place.glob("*.*") if path.suffix in kinds)
    if is_adapter(folder):
        files += model_files(local_folder(adapter_base(folder)))
    return files


def content_hash(folder):
    """What a model is, in 16 digits: the names and the bytes of its files."""
    digests = []
    for path in model_files(folder):
        digests.append((path.name, sha256(path)))
    return hashlib.sha256(str(digests).encode()).hexdigest()[:16]
