"""What the files of a model folder say, in the dialects that are about.

A folder is a Mistral, Llama, Qwen2 or 3 base, NV-Embed-v1 or v2, a model saved by this project, or
a PEFT adapter. What would be computed otherwise than by its authors' code is refused.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from tokenizers import Tokenizer

from data.commands import InputError, check_ranges, one_line, optional_package
from data.files import locked, read_json, remove_abandoned, renamed, sha256, share
from data.files import write_json

DTYPES = ("float32", "bfloat16", "float16")  # of saved weights; oracles compute in float64 too
FAMILIES = ("mistral", "llama", "qwen2", "qwen3", "bidir_mistral")
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


def torch_dtype(dtype):
    """torch.float32 or "float32" -> torch.float32, and the like."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in [getattr(torch, name) for name in (*DTYPES, "float64")]:
        raise InputError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    return found


def model_files(folder):
    """The files that a model's vectors depend on; not a run's checkpoints and logs -> paths.

    They are configs, tokenizer and weights, those of sentence-transformers' modules and those of an
    adapter's base too.
    """
    folder = Path(folder)
    files = []
    for place in (folder, *[folder / place for _, place in read_modules(folder) if place]):
        found = [path for path in place.glob("*.*") if path.suffix in (".json", ".safetensors")]
        files += sorted(found)
    if is_adapter(folder):
        files += model_files(local_folder(adapter_base(folder)))
    return files


def content_hash(folder):
    """What a model is, in 16 digits: the names and the bytes of its files."""
    digests = []
    for path in model_files(folder):
        digests.append((path.name, sha256(path)))
    return hashlib.sha256(str(digests).encode()).hexdigest()[:16]


# ---- weights


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
    """Compares a folder's tensors with the model's -> whether the pooling layer is fresh.

    Prints what is fresh, and what is dropped.
    """
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
    check_architecture(text, rope, rope_type, path)

    values = {name: text[name] for name in names if text.get(name) is not None}
    if "num_attention_heads" in values:  # Llama-1 has as many of both, and names one
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values["rope_scaling"] = rope if rope_type == "llama3" else None
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if isinstance(values.get("eos_token_id"), list):  # Llama-3 lists several, the text's end first
        values["eos_token_id"] = values["eos_token_id"][0]
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
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
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


# ---- folders of sentence-transformers

COMPUTED = ("Transformer", "Pooling", "Normalize")  # modules of theirs that nvembed computes
POOLINGS = {"mean": "mean", "lasttoken": "eos"}  # their name -> ours
OLD_POOLINGS = {  # before version 6: a flag for each
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
NEUTRAL_SETTINGS = ("max_seq_length", "transformer_task", "modality_config", "module_output_name")
PROMPT = re.compile(r"Instruct: .*(\nQuery: ?)", re.DOTALL)  # of a query


def read_modules(folder):
    """modules.json -> [(type, name of its folder), ...], [] where there is none."""
    path = Path(folder, "modules.json")
    if not path.exists():
        return []
    try:
        modules = json.loads(path.read_text("utf-8"))
        return [(module["type"], Path(module["path"]).name) for module in modules]
    except (OSError, ValueError, TypeError, KeyError) as error:
        expected = "expected a JSON list of modules with type and path"
        raise InputError(f"{path}: {expected}: {one_line(error)}") from error


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


def check_modules(folder):
    """Refuses to let sentence-transformers load a folder that could run code of its own."""
    for kind, _ in read_modules(folder):
        known = isinstance(kind, str) and kind.startswith("sentence_transformers.")
        if not known or kind.endswith((".Router", ".Asym")):  # which name further types
            message = f"type {kind!r}: expected one of sentence_transformers, without further types"
            raise InputError(f"{folder}/modules.json: {message}")
    check_sentence_transformers(f"model '{folder}'")


def check_sentence_transformers(user):
    """Refuses versions before 6, which would import types from a folder."""
    optional_package("sentence_transformers", user)
    version = importlib.metadata.version("sentence-transformers")
    if int(version.split(".")[0]) < 6:
        raise InputError(f"{user}: expected sentence-transformers 6 or later, got {version}")


def pooling_fields(folder, decoder):
    """How a sentence-transformers folder, such as e5-mistral, embeds -> {Config field: value}.

    {} where it is no such folder. `decoder` is the folder of its config.json: an adapter has none.
    What cannot be honoured is refused.
    """
    modules = read_modules(folder)
    for kind, _ in modules:
        if str(kind).split(".")[-1] not in COMPUTED:
            raise InputError(f"{folder}/modules.json: expected modules {COMPUTED}, got {kind!r}")
    places = [place for kind, place in modules if kind.endswith(".Pooling")]
    if not modules and Path(folder, "1_Pooling", "config.json").exists():
        places = ["1_Pooling"]
    if not modules and not places:
        return {}
    if len(places) != 1:
        raise InputError(f"{folder}/modules.json: expected one Pooling, got {len(places)}")

    path = Path(folder, places[0], "config.json")
    raw = read_json(path)
    mode = raw.get("pooling_mode", [name for old, name in OLD_POOLINGS.items() if raw.get(old)])
    mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode or "mean"
    if not isinstance(mode, str) or mode not in POOLINGS:
        known = list(POOLINGS)
        raise InputError(f"{path}: field 'pooling_mode': expected one of {known}, got {mode!r}")
    if not raw.get("include_prompt", True):
        raise InputError(f"{path}: field 'include_prompt': expected true, got false")
    normalized = any(kind.endswith(".Normalize") for kind, _ in modules)

    text = read_json(Path(decoder, "config.json"))
    text = text.get("text_config", text)
    values = {
        "causal": text.get("is_causal", text.get("model_type") != "bidir_mistral"),
        "pooling": POOLINGS[mode],
        "mask_instruction": False,  # prompts are pooled too
        "query_template": template_of_prompts(folder, normalized),
        "max_seq_length": stated_length(folder, text),
    }
    if Path(folder, "tokenizer_config.json").exists():
        bos, eos = added_tokens(folder)
        values |= {"bos_token_id": bos, "add_eos": eos is not None, "keep_eos": eos is not None}
        if eos is not None:
            values["eos_token_id"] = eos
    return values


def template_of_prompts(folder, normalized):
    """The template of a folder's prompts -> Config's `query_template`.

    Refuses prompts that `encode` cannot write, and scores that are no cosines.
    """
    path = Path(folder, "config_sentence_transformers.json")
    raw = read_json(path) if path.exists() else {}
    prompts = raw.get("prompts") or {}
    endings = set()
    for name, prompt in prompts.items():
        found = PROMPT.fullmatch(prompt) if isinstance(prompt, str) else None
        if found:
            endings.add(found[1])
        elif prompt != "":
            expected = r"expected none or 'Instruct: TASK\nQuery: ', with or without the last space"
            raise InputError(f"{path}: prompt '{name}': {expected}, got {prompt!r}")
    if len(endings) > 1:
        raise InputError(f"{path}: prompts: expected one ending of all, got {sorted(endings)}")
    if prompts.get(raw.get("default_prompt_name")):
        name = raw["default_prompt_name"]
        raise InputError(f"{path}: field 'default_prompt_name': expected none, got {name!r}")
    if raw.get("truncate_dim") is not None:
        dims = raw["truncate_dim"]
        raise InputError(
            f"{path}: field 'truncate_dim': expected none, got {dims}: encode has dims"
        )
    if raw.get("similarity_fn_name") not in (None, "cosine") and not normalized:
        name = raw["similarity_fn_name"]
        raise InputError(f"{path}: field 'similarity_fn_name': expected cosine, got {name!r}")
    return "Instruct: {instruction}" + endings.pop() if endings else QUERY_TEMPLATE


def check_template(template):
    """Refuses a Config's `query_template` that has no place for the instruction."""
    if template.count("{instruction}") != 1:
        expected = "expected a text with {instruction} in it"
        raise InputError(f"field 'query_template': {expected}, got {template!r}")


def stated_length(folder, text):
    """The most tokens of a text, by sentence_bert_config.json or the tokenizer's settings."""
    path = Path(folder, "sentence_bert_config.json")
    raw = read_json(path) if path.exists() else {}
    others = {name: value for name, value in raw.items() if value and name not in NEUTRAL_SETTINGS}
    if others or raw.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise InputError(f"{path}: expected a max_seq_length alone, got {raw}")
    path = Path(folder, "tokenizer_config.json")
    settings = read_json(path) if path.exists() else {}
    stated = [raw.get("max_seq_length"), settings.get("model_max_length")]
    stated = [length for length in stated if isinstance(length, int | float) and length > 0]
    return int(min([*stated[:1], text.get("max_position_embeddings", 512)]))


def added_tokens(folder):
    """Ids of the tokens that a folder's tokenizer puts before and after a text, None for none.

    By tokenizer.json's post-processor, as in transformers 5; where it has none, by the flags of
    tokenizer_config.json.
    """
    settings = read_json(Path(folder, "tokenizer_config.json"))
    if settings.get("truncation_side", "right") != "right":
        raise InputError(f"{folder}/tokenizer_config.json: field 'truncation_side': expected right")
    added = read_json(Path(folder, "tokenizer.json")).get("post_processor")
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    if added is None:
        return tuple(flagged_token(tokenizer, settings, kind) for kind in ("bos", "eos"))
    tokenizer.no_padding()
    encoding = tokenizer.encode("a")
    text = encoding.special_tokens_mask.index(0)
    before, after = encoding.ids[:text], encoding.ids[text:]
    after = [i for i, added in zip(after, encoding.special_tokens_mask[text:]) if added]
    if len(before) > 1 or len(after) > 1:
        raise InputError(
            f"{folder}/tokenizer.json: expected one bos and eos, got {before}, {after}"
        )
    return (before or [None])[0], (after or [None])[0]


def flagged_token(tokenizer, settings, kind):
    token = settings.get(f"{kind}_token")
    if not settings.get(f"add_{kind}_token") or token is None:
        return None
    return tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)


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


def folder_to_write(path, other):
    """A folder for a model or an adapter -> Path; with the file `other` in it, it would be both."""
    if not path:
        raise InputError(f"path: expected a folder to write, got {path!r}")
    if Path(path, other).exists():
        raise InputError(f"{path}: expected another folder: {other} is in this one")
    return Path(path)


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


# ---- adapters of PEFT


NEUTRAL = (  # fields of PEFT's LoRA that change nothing, or that our own fields and tensors tell
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("bias", "init_lora_weights", "exclude_modules", "megatron_core", "qalora_group_size"),
    "runtime_config",
)
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


def check_pooling(folder):
    """Refuses an adapter where neither it nor its base pools: a fresh layer would pool for it."""
    if not is_adapter(folder):
        return
    base = adapter_base(folder)
    stated = pooling_fields(folder, base) | config_fields(base, {"pooling"})
    if "pooling" not in stated and "text_config" not in read_json(base / "config.json"):
        message = "expected an adapter that says how to pool, or whose base does"
        raise InputError(f"model '{folder}': {message}: the layer would be an untrained one")


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

    kinds = {"r": int, "lora_alpha": int | float, "lora_dropout": int | float}
    for name, kind in (kinds | {"target_modules": list}).items():
        if not isinstance(config.get(name), kind):
            raise InputError(f"{path}: field '{name}': expected {kind}, got {config.get(name)!r}")
    settings = [config[name] for name in (*kinds, "target_modules")]
    check_ranges(dict(zip(kinds, settings)), f"{path}: ")
    return settings


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


def write_adapter(path, state, base, r, alpha, dropout, targets):
    """Writes the folder of a LoRA adapter of AutoModel(base); `state` has our decoder's names."""
    file = folder_to_write(path, "config.json") / "adapter_model.safetensors"
    check_finite(state, file)
    tensors = {}
    for name, tensor in state.items():
        name = name.removeprefix("embedding_model.")
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
