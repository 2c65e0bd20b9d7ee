"""A model folder: where it is, the tensors and the tokenizer in it, and how one is written.

What a folder says of itself is read by dialects.py, with adapters.py (PEFT) and peers.py
(sentence-transformers). Those import this file, which knows none of them.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from tokenizers import Tokenizer

from data.commands import DTYPES, InputError, one_line
from data.files import check_fields, locked, read_json, remove_abandoned, renamed, share
from data.files import write_json

QUERY_TEMPLATE = "Instruct: {instruction}\nQuery: "  # the paper's; Qwen3-Embedding's has no space
LATENT_FIELDS = {  # our name -> the name in NV-Embed's latent_attention_config
    "num_latents": "num_latents_value",
    "num_cross_heads": "num_cross_heads",
    "cross_dim_head": "cross_dim_head",
}


def local_folder(path):
    """A folder as it is, or the safetensors and JSON files (never code) of a hub model -> Path."""
    if not isinstance(path, str | Path) or path == "":
        raise InputError(f"model: expected a folder or hub id, got {path!r}")
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists():
        raise InputError(f"model '{path}': expected a folder, got a file")
    if str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1:
        raise InputError(f"model '{path}': no such folder")
    try:
        folder = snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"])
    except (OSError, ValueError) as error:  # no network, no such model, not a hub id
        message = f"model '{path}': not a folder, and not to be had from the hub"
        raise InputError(f"{message}: {one_line(error)}") from error
    return Path(folder)


def folder_to_write(path, other):
    """A folder for a model or an adapter -> Path; with the file `other` in it, it would be both."""
    if not path:
        raise InputError(f"path: expected a folder to write, got {path!r}")
    if Path(path, other).exists():
        raise InputError(f"{path}: expected another folder: {other} is in this one")
    return Path(path)


def torch_dtype(dtype):
    """torch.float32 or "float32" -> torch.float32, and the like."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in [getattr(torch, name) for name in (*DTYPES, "float64")]:
        raise InputError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    return found


def check_template(template):
    """Refuses a Config's `query_template` that has no place for the instruction."""
    if template.count("{instruction}") != 1:
        expected = "expected a text with {instruction} in it"
        raise InputError(f"field 'query_template': {expected}, got {template!r}")


# ---- weights


def weight_files(folder):
    """The safetensors files of a folder, in the order of their names."""
    index = Path(folder, "model.safetensors.index.json")
    if not index.exists():
        return [Path(folder, "model.safetensors")]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index}: field 'weight_map': expected an object, got {places!r}")
    check_fields(places, {}, dict.fromkeys(places, str), f"{index}: weight_map")
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
            state[name] = tensor if device is None else tensor.to(device, dtype)
    return state


def check_weights(state, expected, folder):
    """Compares a folder's tensors with the model's -> whether the pooling layer is fresh.

    Prints what is fresh, and what is dropped.
    """
    pooling = [name for name in expected if name.startswith("latent_attention_model.")]
    unused = ["lm_head.weight", "rotary_emb.inv_freq", "latent_attention_model.latents"]
    dropped = []
    for name, tensor in state.items():
        if name in expected:
            check_shape(name, tensor, expected[name], folder)
        elif name.endswith(tuple(unused)) or (
            not pooling and name.startswith("latent_attention_model.")
        ):
            dropped.append(name)
        else:
            raise InputError(f"{folder}: tensor '{name}': not part of this architecture")
    missing = [name for name in expected if name not in state]
    if missing and missing != pooling:  # a base has no pooling layer yet; half a layer is an error
        raise InputError(f"{folder}: tensor '{missing[0]}': missing")
    check_finite(state, folder)
    if missing or dropped:
        line = f"{folder}: fresh: {shortened(missing)}; dropped: {shortened(dropped)}"
        print(line, file=sys.stderr)
    return bool(missing)


def shortened(names):
    """Names as text, by the first two of them."""
    if len(names) <= 2:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def check_finite(state, where):
    """Refuses weights with a NaN or an infinity. A sum has one where a number is one."""
    for name, tensor in state.items():
        sum_of_it = tensor.sum(dtype=torch.float32)  # may overflow where each number is finite
        if not sum_of_it.isfinite() and not tensor.isfinite().all():
            raise InputError(f"{where}: tensor '{name}': expected finite numbers")


def check_shape(name, tensor, expected, where):
    if tensor.shape != expected.shape:
        shapes = f"expected shape {tuple(expected.shape)}, got {tuple(tensor.shape)}"
        raise InputError(f"{where}: tensor '{name}': {shapes}")


def read_tokenizer(folder, c):
    """tokenizer.json, checked against a Config: number of tokens, bos and eos, template."""
    path = Path(folder, "tokenizer.json")
    model = read_json(path).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise InputError(f"{path}: expected a tokenizer with a model and its vocab")
    tokenizer = load_tokenizer(path)
    size = tokenizer.get_vocab_size()
    added = tokenizer.get_added_tokens_decoder().items()
    special = {i for i, token in added if token.special}
    wanted = {c.bos_token_id, c.eos_token_id} - {None}
    if size > c.vocab_size or not wanted <= special:
        need = f"expected <= {c.vocab_size} tokens, special {wanted}"
        raise InputError(f"{path}: {need}; got {size}, special {special}")
    for _, token in added:
        if token.special and token.content in c.query_template:
            got = f"{token.content!r} in {c.query_template!r}"
            raise InputError(f"{folder}: query_template: expected no special token, got {got}")
    return tokenizer


def load_tokenizer(path):
    """tokenizer.json -> Tokenizer."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: expected a tokenizer: {one_line(error)}") from error


# ---- the released layout

PEER_FILES = {  # by which sentence-transformers loads a model saved here
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "nvembed.SentenceModule"}],
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


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
        "add_eos": fields["add_eos"],
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
    return PEER_FILES | {
        "tokenizer_config.json": special | loading,
        "special_tokens_map.json": special,
        "config.json": config,
    }


def released_code_can_read(fields):
    """Whether the released modelling code would embed the same; it does not read our own fields."""
    if fields["pooling"] != "latent" or not fields["mask_instruction"] or not fields["add_eos"]:
        return False
    if fields["query_template"] != QUERY_TEMPLATE:
        return False
    ours = ("causal", "qkv_bias", "qk_norm", "rope_scaling", "keep_eos")
    return not any(fields[name] for name in ours)


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def write_model(path, state, fields, tokenizer):
    """Writes a folder in the released layout: tensors by name, Config's fields, the tokenizer.

    config.json is removed first and written last: with it the folder is whole. What is there, and
    may be mapped by this very model, stays until all weights are written.
    """
    path = folder_to_write(path, "adapter_config.json")
    check_finite(state, path)
    path.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path, ".weights.")
    with tempfile.TemporaryDirectory(dir=path, prefix=".weights.") as folder, locked(folder):
        save_torch_state_dict(state, folder, max_shard_size="5GB")
        (path / "config.json").unlink(missing_ok=True)
        for old in path.iterdir():
            if WEIGHTS.fullmatch(old.name):
                old.unlink()
        for new in Path(folder).iterdir():
            share(new)
            os.replace(new, path / new.name)
    with renamed(path / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    for name, content in released_files(fields, tokenizer, path, dtype).items():
        write_json(path / name, content)
