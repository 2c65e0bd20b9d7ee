"""Folders that must not load: each error is one line that names the file and what is wrong."""

import json
import shutil

import pytest
import references as ref
import safetensors.torch
import torch
from compare import LATENT, error_of

from nvembed import NVEmbed


@pytest.fixture
def folder(released, tmp_path):
    """A copy of the released folder to break."""
    return shutil.copytree(released, tmp_path / "v2")


def edit_shard(folder, change, number=1):
    path = folder / f"model-{number:05}-of-00003.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


def edit_config(folder, part, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    fields = raw[part] if part else raw
    fields.update(changes)
    path.write_text(json.dumps(raw))


# ---- weights


def test_damaged_weights(folder):
    assert NVEmbed.from_pretrained(folder)  # control: whole, it loads
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:5], b"", b"\xff" * 100):
        shard.write_bytes(damaged)
        assert shard.name in error_of(NVEmbed.from_pretrained, folder)
    shard.unlink()
    assert shard.name in error_of(NVEmbed.from_pretrained, folder)


def test_a_tensor_of_another_shape(folder):
    norm = "embedding_model.norm.weight"
    edit_shard(folder, lambda state: state.update({norm: torch.ones(32)}), 2)
    message = error_of(NVEmbed.from_pretrained, folder)
    for part in (str(folder), norm, "32", "64"):
        assert part in message


def test_a_missing_tensor(folder):
    norm = "embedding_model.norm.weight"
    edit_shard(folder, lambda state: state.pop(norm), 2)
    message = error_of(NVEmbed.from_pretrained, folder)
    for part in (str(folder), norm, "missing"):
        assert part in message


def test_a_tensor_too_many(folder):
    name = "embedding_model.layers.3.norm.weight"
    edit_shard(folder, lambda state: state.update({name: torch.ones(4)}))
    assert name in error_of(NVEmbed.from_pretrained, folder)


def test_a_latent_layer_of_two_blocks(folder):
    name = "latent_attention_model.cross_attend_blocks.2.fn.to_q.weight"
    edit_shard(folder, lambda state: state.update({name: torch.ones(4)}))
    assert name in error_of(NVEmbed.from_pretrained, folder)
    NVEmbed.from_pretrained(folder, pooling="mean")  # control: which has no such layer


def without_latents(state):
    for name in list(state):
        if name.startswith(LATENT):
            del state[name]


def test_half_a_pooling_layer_is_not_fresh(folder):
    edit_shard(folder, without_latents)
    assert LATENT in error_of(NVEmbed.from_pretrained, folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_bad_index(index, folder):
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_of(NVEmbed.from_pretrained, folder)


def test_no_weights_at_all(base, tmp_path):
    shutil.copy(base / "config.json", tmp_path)
    assert "tokenizer.json" in error_of(NVEmbed.from_pretrained, tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    assert "model.safetensors" in error_of(NVEmbed.from_pretrained, tmp_path)


def test_the_hub_cannot_be_reached():
    assert "no/such-model" in error_of(NVEmbed.from_pretrained, "no/such-model")


def test_names_that_are_no_models(base):
    for path in (None, "", 3, ["a"]):
        message = error_of(NVEmbed.from_pretrained, path)
        assert message == f"model: expected a folder or hub id, got {path!r}"
    file = base / "model.safetensors"
    assert (
        error_of(NVEmbed.from_pretrained, file) == f"model '{file}': expected a folder, got a file"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("device", ["cpu", None])
def test_weights_that_are_not_finite(value, device, folder):
    name = "embedding_model.norm.weight"

    def change(state):
        state[name][7] = value

    edit_shard(folder, change, 2)
    message = error_of(NVEmbed.from_pretrained, folder, device)
    assert message == f"{folder}: tensor '{name}': expected finite numbers"


def test_large_weights_are_finite(folder):
    """Control: their sum overflows, they do not."""
    edit_shard(folder, lambda state: state["embedding_model.norm.weight"].fill_(3e38), 2)
    assert NVEmbed.from_pretrained(folder)
    assert torch.full((64,), 3e38).sum().isinf()


def test_an_override_is_told_where_the_folder_states_another(folder, capsys):
    for settings, line in (
        ({}, ""),
        ({"causal": False, "pooling": "latent"}, ""),  # it states neither
        ({"max_position_embeddings": 100}, f"{folder}: max_position_embeddings 512 -> 100\n"),
        ({"max_position_embeddings": 512}, ""),
        ({"mask_instruction": False}, f"{folder}: mask_instruction True -> False\n"),
    ):
        NVEmbed.from_pretrained(folder, **settings)
        assert capsys.readouterr().err == line
    edit_config(folder, "text_config", causal=True, pooling="eos")
    capsys.readouterr()
    NVEmbed.from_pretrained(folder, causal=False, pooling="latent")
    assert capsys.readouterr().err == f"{folder}: causal True -> False, pooling eos -> latent\n"


def test_what_is_fresh_or_dropped_is_named_and_counted(base, capsys):
    NVEmbed.from_pretrained(base)
    (line,) = capsys.readouterr().err.splitlines()
    fresh, dropped = line.removeprefix(f"{base}: ").split("; ")
    assert fresh.startswith("fresh: latent_attention_model.latents, ")
    assert fresh.endswith(" and 12 more")
    assert dropped == "dropped: embedding_model.lm_head.weight"
    NVEmbed.from_pretrained(base, pooling="mean")
    assert "fresh: none; dropped: embedding_model.lm_head" in capsys.readouterr().err


# ---- config.json

BAD_TEXT_CONFIG = {
    "vocab_size": None,
    "hidden_size": "64",
    "num_hidden_layers": 2.5,
    "model_type": "gpt2",
    "attention_bias": True,
    "hidden_act": "gelu",
    "rope_theta": "big",
    "causal": "yes",
    "pooling": "max",
    "quantize": "int4",  # weights that version 1 rounded
    "quantization_config": {"quant_method": "gptq"},
    "partial_rotary_factor": 0.5,
    "is_causal": False,  # with a window
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("field", BAD_TEXT_CONFIG)
def test_bad_config_field(field, folder):
    edit_config(folder, "text_config", **{field: BAD_TEXT_CONFIG[field]})
    message = error_of(NVEmbed.from_pretrained, folder)
    assert "config.json" in message
    assert field in message


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}
ODD_TEXT_CONFIG = [
    ({"rope_scaling": "yarn"}, "field 'rope_scaling': expected dict, got 'yarn'"),
    ({"rope_parameters": [1]}, "field 'rope_parameters': expected dict, got [1]"),
    ({"rope_scaling": LLAMA3}, "rope_scaling: field 'low_freq_factor': missing"),
    (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": "1"}},
        "rope_scaling: field 'low_freq_factor': expected int or float, got '1'",
    ),
    ({"eos_token_id": []}, "field 'eos_token_id': expected <class 'int'>, got []"),
    ({"layer_types": 5}, "field 'layer_types': expected list, got 5"),
    ({"layer_types": [["x"]]}, "field 'layer_types': expected one kind of layer, got [['x']]"),
    (
        {"num_attention_heads": 0, "head_dim": None},
        "field 'num_attention_heads': expected 1 or more, got 0",
    ),
    ({"max_position_embeddings": "8"}, "field 'max_position_embeddings': expected int, got '8'"),
]


@pytest.mark.parametrize(("changes", "message"), ODD_TEXT_CONFIG)
def test_odd_config_field(changes, message, folder):
    if "rope_scaling" in changes:
        changes = {"rope_parameters": None} | changes
    edit_config(folder, "text_config", **changes)
    assert error_of(NVEmbed.from_pretrained, folder) == f"{folder}/config.json: {message}"


def test_fields_of_version_1_that_say_nothing(folder):
    """Its folders name "pruned" and "quantize"; where nothing was quantised they still load."""
    edit_config(folder, "text_config", quantize=None, pruned=True)
    assert NVEmbed.from_pretrained(folder)


CONTENTS = ["{", "[]", "", "3", '{"text_config": 3}', '{"latent_attention_config": 1}']


@pytest.mark.parametrize("content", CONTENTS)
def test_bad_config_file(content, folder):
    (folder / "config.json").write_text(content)
    assert "config.json" in error_of(NVEmbed.from_pretrained, folder)


def test_bad_settings(released):
    assert "pooling" in error_of(NVEmbed.from_pretrained, released, pooling="max")
    assert "colour" in error_of(NVEmbed.from_pretrained, released, colour="red")


# ---- tokenizer.json


def test_tokenizer_of_another_vocabulary(folder, real_tokenizers):
    shutil.copy(real_tokenizers["mistral"], folder / "tokenizer.json")
    message = error_of(NVEmbed.from_pretrained, folder)
    for part in ("tokenizer.json", "320", "32000"):
        assert part in message


def test_a_template_of_special_tokens(folder):
    """They would be read as the letters that they are written with."""
    message = error_of(NVEmbed.from_pretrained, folder, query_template="<s>{instruction}: ")
    wanted = "query_template: expected no special token, got '<s>' in '<s>{instruction}: '"
    assert message == f"{folder}: {wanted}"
    NVEmbed.from_pretrained(folder, query_template="<t>{instruction}: ")  # control


def test_tokenizer_without_the_special_tokens(folder):
    small = ref.tiny_tokenizer().to_str()
    small = small.replace('"</s>"', '"<end>"').replace('"<s>"', '"<start>"')
    raw = json.loads(small)
    raw["added_tokens"] = raw["added_tokens"][:1]  # ids 1 and 2 are no special tokens here
    raw["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert "tokenizer.json" in error_of(NVEmbed.from_pretrained, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in error_of(NVEmbed.from_pretrained, folder)


def test_tokenizer_that_the_library_cannot_read(folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "New"}}))
    message = error_of(NVEmbed.from_pretrained, folder)
    assert message.startswith(f"{path}: expected a tokenizer: ")
