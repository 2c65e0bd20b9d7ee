"""Folders of other people that say what cannot be honoured; folders that would be two things."""

import json
import shutil

import pytest
import references
from small_suite import error, suite  # noqa: F401

import eval as evaluation
import nvembed
from data.commands import InputError
from data.adapters import adapter_base, adapter_settings
from data.dialects import content_hash
from data.files import read_json, write_json
from nvembed import NVEmbed


@pytest.fixture
def adapter(base, tmp_path):
    """A PEFT adapter of a base, with the base's tokenizer beside it."""
    model = NVEmbed.from_pretrained(base, pooling="mean")
    nvembed.add_lora(model, 2)
    nvembed.save_adapter(model, tmp_path / "adapter", base)
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_with_another_tokenizer(base, adapter):
    """Its ids would come from the base's: refused; padding alone makes no other text."""
    path = adapter / "tokenizer.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"padding": None, "truncation": None}))
    assert adapter_base(adapter) == base
    path.write_text(json.dumps(found | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(InputError, match="tokenizer.json: expected that of the base"):
        NVEmbed.from_pretrained(adapter, pooling="mean")


def test_an_adapter_that_says_how_it_pools(base, adapter):
    (adapter / "1_Pooling").mkdir()
    write_json(adapter / "1_Pooling/config.json", {"pooling_mode": "mean"})
    assert NVEmbed.from_pretrained(adapter).config.pooling == "mean"
    assert NVEmbed.from_pretrained(base).config.pooling == "latent"  # control


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": True}, "field 'r': expected int, got True"),
        ({"lora_alpha": None}, "field 'lora_alpha': expected int or float, got None"),
        ({"target_modules": [["q"]]}, "field 'target_modules': expected names, got [['q']]"),
    ],
)
def test_odd_settings_of_an_adapter(change, message, adapter):
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError) as caught:
        adapter_settings(adapter)
    assert str(caught.value) == f"{path}: {message}"


def test_a_folder_is_a_model_or_an_adapter(base, adapter, tmp_path):
    model = NVEmbed.from_pretrained(base, pooling="mean")
    with pytest.raises(InputError, match="adapter_config.json is in this one"):
        model.save_pretrained(adapter)
    nvembed.add_lora(model, 2)
    whole = shutil.copytree(base, tmp_path / "whole")
    with pytest.raises(InputError, match="expected another folder: config.json is in this one"):
        nvembed.save_adapter(model, whole, base)
    for path in ("", None):
        with pytest.raises(InputError, match="path: expected a folder to write"):
            model.save_pretrained(path)
    nvembed.save_adapter(model, tmp_path / "new", base)  # control


def test_a_path_that_is_not_there():
    for path in ("/no/such", "./no", "a/b/c"):
        with pytest.raises(InputError, match=f"model '{path}': no such folder"):
            NVEmbed.from_pretrained(path)


def test_a_base_with_as_many_heads_of_both_kinds(tmp_path, tokenizer_json):
    """Old Llama configs do not name the key-value heads."""
    hf = references.hf_model("llama")
    references.write_base(tmp_path / "llama", tokenizer_json, hf)
    path = tmp_path / "llama/config.json"
    config = json.loads(path.read_text())
    heads = config.pop("num_key_value_heads")
    path.write_text(json.dumps(config))
    found = nvembed.read_config(tmp_path / "llama")
    assert found.num_key_value_heads == config["num_attention_heads"] != heads


def test_an_empty_text_of_a_tokenizer_that_adds_nothing(base):
    model = NVEmbed.from_pretrained(base, pooling="mean", bos_token_id=None, add_eos=False)
    with pytest.raises(InputError, match=r"tokens \[\]: expected an id"):
        model.encode(["a lake", ""])
    assert model.encode(["a lake"]).shape == (1, 64)


def test_two_words_for_one_setting(suite, monkeypatch, capsys):  # noqa: F811
    for spec in ("model:mean:causal:bidirectional", "model:latent:mean", "model:mean:mean"):
        message = error(monkeypatch, capsys, "--model", spec)
        assert f"--model {spec}: expected one word for a setting, got two" in message
    assert evaluation.split_spec("model:mean:causal") == ("model", ["mean", "causal"])  # control


# ---- sentence-transformers


@pytest.fixture
def pooled(base, tmp_path):
    """A base beside 1_Pooling, without modules.json: it pools by the mean."""
    folder = shutil.copytree(base, tmp_path / "pooled")
    write_json(folder / "1_Pooling/config.json", {"pooling_mode": "mean"})
    return folder


def test_how_a_folder_pools_is_part_of_its_hash(pooled):
    before = content_hash(pooled)
    assert NVEmbed.from_pretrained(pooled).config.pooling == "mean"
    write_json(pooled / "1_Pooling/config.json", {"pooling_mode": "lasttoken"})
    assert NVEmbed.from_pretrained(pooled).config.pooling == "eos"
    assert content_hash(pooled) != before


@pytest.mark.parametrize("name", ("0_Transformer/pytorch_model.bin", "vocab.txt"))
def test_all_files_of_a_peer_are_part_of_its_hash(name, tmp_path):
    """sentence-transformers loads weights and vocabularies in formats that are not ours."""
    module = "sentence_transformers.models.Transformer"
    modules = [{"idx": 0, "path": "0_Transformer", "type": module}]
    write_json(tmp_path / "modules.json", modules)
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / name).write_text("one")
    before = content_hash(tmp_path)
    (tmp_path / "README.md").write_text("no part of it")
    assert content_hash(tmp_path) == before
    (tmp_path / name).write_text("two")
    assert content_hash(tmp_path) != before


def test_a_folder_that_states_no_length(pooled):
    path = pooled / "config.json"
    write_json(path, read_json(path) | {"max_position_embeddings": None})
    assert NVEmbed.from_pretrained(pooled).config.max_seq_length == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["x"]}, "field 'prompts': expected dict, got ['x']"),
        ({"default_prompt_name": ["x"]}, "field 'default_prompt_name': expected str, got ['x']"),
    ],
)
def test_odd_prompts(change, message, pooled):
    path = pooled / "config_sentence_transformers.json"
    write_json(path, change)
    with pytest.raises(InputError) as caught:
        NVEmbed.from_pretrained(pooled)
    assert str(caught.value) == f"{path}: {message}"


def test_a_tokenizer_that_the_library_cannot_read(pooled):
    write_json(pooled / "tokenizer_config.json", {})
    write_json(pooled / "tokenizer.json", {})
    with pytest.raises(InputError, match="pooled/tokenizer.json: expected a tokenizer: "):
        NVEmbed.from_pretrained(pooled)
