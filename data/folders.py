"""What the files of a model folder say, in the dialects that are about.

A folder is a Mistral / Llama / Qwen2 base, NV-Embed-v1 / v2, a model saved by this project, or a
PEFT adapter. What would be computed otherwise than by its authors' code is refused.
"""

from pathlib import Path

import safetensors.torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

from data.commands import InputError, one_line
from data.files import read_json

FAMILIES = ("mistral", "llama", "qwen2", "bidir_mistral")
LATENT_FIELDS = {  # our name -> the name in NV-Embed's latent_attention_config
    "num_latents": "num_latents_value",
    "num_cross_heads": "num_cross_heads",
    "cross_dim_head": "cross_dim_head",
}


def local_folder(path):
    """A folder as it is, or the safetensors and JSON files (never code) of a hub model -> Path."""
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"])
    except (OSError, ValueError) as error:  # no network, no such model, not a hub id
        message = f"model '{path}': not a folder, and not to be had from the hub"
        raise InputError(f"{message}: {one_line(error)}") from error
    return Path(folder)


def is_sentence_transformer(folder):
    """Whether sentence-transformers loads the folder and nvembed does not (BERT and the like)."""
    if not Path(folder, "modules.json").exists():
        return False
    raw = read_json(Path(folder, "config.json"))
    return raw.get("text_config", raw).get("model_type") not in FAMILIES


def weight_files(folder):
    """The safetensors files of a folder, in the order of their names."""
    index = Path(folder, "model.safetensors.index.json")
    if not index.exists():
        return [Path(folder, "model.safetensors")]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index}: field 'weight_map': expected an object, got {places!r}")
    return [Path(folder, name) for name in sorted(set(places.values()))]


def read_tensors(path):
    """A safetensors file -> {name: tensor}, mapped from the file."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected whole safetensors: {one_line(error)}") from error


def read_weights(folder, device, dtype):
    """All tensors of a folder by released name; those of a base get the prefix that they lack.

    With device None they stay as they are in the files.
    """
    state = {}
    for file in weight_files(folder):
        for name, tensor in read_tensors(file).items():
            if not name.startswith(("embedding_model.", "latent_attention_model.")):
                name = "embedding_model." + name.removeprefix("model.")
            state[name] = tensor.to(device, dtype) if device else tensor
    return state


def check_weights(state, expected, folder):
    """Compares a folder's tensors with the model's -> names that are fresh, that are dropped."""
    dropped = []
    for name, tensor in state.items():
        if name in expected:
            check_shape(name, tensor, expected[name], folder)
        elif name.startswith("latent_attention_model.") or name.endswith(
            ("lm_head.weight", "rotary_emb.inv_freq")
        ):
            dropped.append(name)
        else:
            raise InputError(f"{folder}: tensor '{name}': not part of this architecture")
    missing = [name for name in expected if name not in state]
    pooling = [name for name in expected if name.startswith("latent_attention_model.")]
    if missing and missing != pooling:  # a base has no pooling layer yet; half a layer is an error
        raise InputError(f"{folder}: tensor '{missing[0]}': missing")
    return missing, dropped


def check_shape(name, tensor, expected, where):
    if tensor.shape != expected.shape:
        shapes = f"expected shape {tuple(expected.shape)}, got {tuple(tensor.shape)}"
        raise InputError(f"{where}: tensor '{name}': {shapes}")


def read_tokenizer(folder, c):
    """tokenizer.json, checked against a Config: number of tokens, bos and eos."""
    path = Path(folder, "tokenizer.json")
    model = read_json(path).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise InputError(f"{path}: expected a tokenizer with a model and its vocab")
    tokenizer = Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size()
    added = tokenizer.get_added_tokens_decoder().items()
    special = {i for i, token in added if token.special}
    wanted = {c.bos_token_id, c.eos_token_id} - {None}
    if size > c.vocab_size or not wanted <= special:
        need = f"expected <= {c.vocab_size} tokens, special {wanted}"
        raise InputError(f"{path}: {need}; got {size}, special {special}")
    return tokenizer


# ---- config.json


def config_fields(folder, names):
    """config.json -> {name: value} of those Config fields (`names`) that the folder states."""
    path = Path(folder, "config.json")
    raw = read_json(path)
    text = raw.get("text_config", raw)  # NV-Embed nests the decoder's fields
    latent = raw.get("latent_attention_config", {})
    if not isinstance(text, dict) or not isinstance(latent, dict):
        raise InputError(f"{path}: field '*_config': expected objects")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # transformers 5, before
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    check_architecture(text, rope_type, path)

    values = {name: text[name] for name in names if text.get(name) is not None}
    values["rope_scaling"] = rope if rope_type == "llama3" else None
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if isinstance(values.get("eos_token_id"), list):  # Llama-3 lists several, the text's end first
        values["eos_token_id"] = values["eos_token_id"][0]
    if text.get("model_type") == "qwen2":
        values["qkv_bias"] = True
        if not text.get("use_sliding_window"):  # it names a window and says that it is not used
            values["sliding_window"] = None
    for ours, theirs in LATENT_FIELDS.items():
        if theirs in latent:
            values[ours] = latent[theirs]
    if "text_config" in raw:
        values["mask_instruction"] = raw.get("is_mask_instruction", True)
    else:
        values.update(pooling_fields(folder))
    return values


def check_architecture(text, rope_type, path):
    biased = text.get("attention_bias") or text.get("mlp_bias") or False
    qwen = text.get("model_type") == "qwen2"  # its bias has a place here
    checks = (
        ("model_type", text.get("model_type"), FAMILIES),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", biased and not qwen, (False,)),
        ("rope_scaling", rope_type, ("default", "llama3")),
        ("quantize", text.get("quantize"), (None,)),  # weights are quantised at load
    )
    for field, value, known in checks:
        if value not in known:
            raise InputError(f"{path}: field '{field}': expected one of {known}, got {value!r}")


def pooling_fields(folder):
    """How a sentence-transformers folder such as e5-mistral pools its causal decoder."""
    path = Path(folder, "1_Pooling", "config.json")
    if not path.exists():
        return {}
    last = read_json(path).get("pooling_mode_lasttoken", False)
    pooling = "eos" if last else "mean"
    return {"causal": True, "pooling": pooling, "mask_instruction": False}


def released_files(fields, tokenizer, path, dtype):
    """The JSON files of the released layout: file name -> content, config.json last.

    `fields` are Config's, `tokenizer` names the special tokens, dtype is that of the weights.
    """
    text = {
        "model_type": "bidir_mistral",
        "architectures": ["MistralModel"],
        "_name_or_path": str(path),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **fields,
    }
    latent = {
        "model_type": "latent_attention",
        "hidden_dim": fields["hidden_size"],
        "latent_dim": fields["hidden_size"],
        "output_normalize": True,
    }
    for ours, theirs in LATENT_FIELDS.items():
        latent[theirs] = fields[ours]
    config = {
        "model_type": "nvembed" if released_code_can_read(fields) else "nvembed-x",
        "architectures": ["NVEmbedModel"],
        "hidden_size": fields["hidden_size"],
        "torch_dtype": dtype,
        "padding_side": "right",
        "mask_type": "b",
        "is_mask_instruction": fields["mask_instruction"],
        "add_eos": True,
        "add_pad_token": True,
        "text_config": text,
        "latent_attention_config": latent,
    }
    special = {}
    for name, kind in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "eos")):
        i = fields[f"{kind}_token_id"]
        if i is not None:
            special[name] = tokenizer.id_to_token(i)
    loading = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": "bos_token" in special,
    }
    return {
        "tokenizer_config.json": special | loading,
        "special_tokens_map.json": special,
        "config.json": config,
    }


def released_code_can_read(fields):
    """Whether the released modelling code would embed the same; it does not read our own fields."""
    if fields["pooling"] != "latent" or not fields["mask_instruction"]:
        return False
    ours = ("causal", "qkv_bias", "rope_scaling", "keep_eos")
    return not any(fields[name] for name in ours)


# ---- adapters of PEFT


def is_adapter(folder):
    """Whether a folder holds a PEFT adapter and no model of its own."""
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def adapter_settings(folder):
    """r, alpha, dropout and targets of a PEFT folder; other kinds of adapter are refused."""
    path = Path(folder, "adapter_config.json")
    config = read_json(path)
    settings = [config.get(name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")]
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    variants = []  # DoRA, rank patterns and the like: other arithmetic than ours
    for name, value in config.items():
        if value and ("use_" in name or name.endswith(("_pattern", "modules_to_save"))):
            variants.append(name)
    if not plain or variants or None in settings:
        need = "expected LoRA with r, lora_alpha, lora_dropout, target_modules"
        raise InputError(f"{path}: {need}; got {variants or config}")
    return settings


def read_adapter(path):
    """adapter_model.safetensors -> {name in our decoder: tensor}."""
    state = {}
    for name, tensor in read_tensors(path).items():
        _, _, place = name.partition("layers.")  # what is before it depends on the wrapped class
        state["embedding_model.layers." + place.removesuffix(".weight")] = tensor
    return state


def adapter_config(base, r, alpha, dropout, targets):
    """adapter_config.json of a LoRA adapter of AutoModel(base)."""
    return {
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
