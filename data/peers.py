"""Folders of sentence-transformers, such as e5-mistral: how they pool, prompt, cut and end a text.

Those of a family that nvembed computes become fields of its Config. The others (BERT and the like)
are left to sentence-transformers, which runs no code of a folder that was let through here.
"""

import importlib.metadata
import json
import re
from pathlib import Path

from data.commands import InputError, one_line, optional_package
from data.files import check_fields, read_json
from data.folders import QUERY_TEMPLATE, load_tokenizer

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
DECODER = {  # fields of config.json that are used before nvembed.Config checks its own: type
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "max_position_embeddings": int,
    "layer_types": list,
    "rope_parameters": dict,
    "rope_scaling": dict,
}
PROMPTS = {"prompts": dict, "default_prompt_name": str}
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


def read_decoder(folder):
    """config.json -> (the whole of it, the decoder's fields, which NV-Embed nests)."""
    path = Path(folder, "config.json")
    raw = read_json(path)
    text = raw.get("text_config", raw)
    if not isinstance(text, dict):
        raise InputError(f"{path}: field 'text_config': expected an object, got {text!r}")
    for name, value in check_stated(text, DECODER, path).items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"{path}: field '{name}': expected 1 or more, got {value}")
    return raw, text


def check_stated(found, types, where):
    """Checks those of {field: type} that an object states -> them; null counts as missing."""
    stated = {name: found[name] for name in types if found.get(name) is not None}
    check_fields(stated, {}, types, where)
    return stated


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

    _, text = read_decoder(decoder)
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
    check_stated(raw, PROMPTS, path)
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
    return int(min([*stated[:1], text.get("max_position_embeddings") or 512]))


def added_tokens(folder):
    """Ids of the tokens that a folder's tokenizer puts before and after a text, None for none.

    By tokenizer.json's post-processor, as in transformers 5; where it has none, by the flags of
    tokenizer_config.json.
    """
    settings = read_json(Path(folder, "tokenizer_config.json"))
    if settings.get("truncation_side", "right") != "right":
        raise InputError(f"{folder}/tokenizer_config.json: field 'truncation_side': expected right")
    added = read_json(Path(folder, "tokenizer.json")).get("post_processor")
    tokenizer = load_tokenizer(Path(folder, "tokenizer.json"))
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
