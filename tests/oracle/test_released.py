"""The released layout: names, shapes, embeddings; saving and loading; other published layouts."""

import json
import shutil

import pytest
import references as ref
import safetensors.torch
import torch
import transformers
from compare import FAMILIES, TASK, TEXTS, cosine, error_of, gap
from tokenizers import Tokenizer

import nvembed
from data import folders
from nvembed import NVEmbed


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---- names and shapes

SOME_SHAPES = {
    "embedding_model.embed_tokens.weight": (32000, 4096),
    "embedding_model.layers.31.self_attn.k_proj.weight": (1024, 4096),
    "embedding_model.layers.0.mlp.down_proj.weight": (4096, 14336),
    "latent_attention_model.latents": (512, 4096),
    "latent_attention_model.cross_attend_blocks.0.fn.to_q.weight": (32768, 4096),
    "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight": (65536, 4096),
    "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight": (4096, 32768),
    "latent_attention_model.cross_attend_blocks.1.fn.net.0.weight": (32768, 4096),
    "latent_attention_model.cross_attend_blocks.1.fn.net.2.weight": (4096, 16384),
}


def test_full_size_v2_on_the_meta_device(tmp_path, tokenizer_json):
    """All 304 tensors of NV-Embed-v2: 7,851,016,192 parameters (15,702,032,384 bytes)."""
    (tmp_path / "config.json").write_text(json.dumps(ref.released_config(ref.FULL)))
    config = nvembed.read_config(tmp_path)
    assert (config.num_latents, config.num_cross_heads, config.cross_dim_head) == (512, 8, 4096)
    assert not config.causal
    assert not config.keep_eos
    assert config.pooling == "latent"
    assert config.mask_instruction
    with torch.device("meta"):
        model = NVEmbed(config, Tokenizer.from_file(str(tokenizer_json)))
    ours = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert ours == ref.released_shapes(ref.FULL)
    assert len(ours) == 304
    assert sum(p.numel() for p in model.parameters()) == 7_851_016_192
    assert sum(p.numel() for p in model.latent_attention_model.parameters()) == 740_356_096
    for name, shape in SOME_SHAPES.items():
        assert ours[name] == shape


@pytest.mark.parametrize("instruction", ["", TASK])
@pytest.mark.parametrize("shards", [1, 3])
def test_released_layout(shards, instruction, tmp_path, tokenizer_json, capsys):
    folder = tmp_path / "v2"
    ref.write_released(folder, tokenizer_json, shards)
    model = NVEmbed.from_pretrained(folder)
    assert capsys.readouterr().err == ""  # nothing fresh, nothing dropped
    expected = ref.released_embed(folder, TEXTS, instruction, max_length=128)
    ours = model.encode(TEXTS, instruction, max_length=128)
    assert gap(ours, expected) <= 1e-5
    half = NVEmbed.from_pretrained(folder, dtype=torch.bfloat16)
    assert cosine(half.encode(TEXTS, instruction, max_length=128), expected) >= 0.999
    length = len(model.tokenize([""], instruction)[0].ids) + 3
    assert gap(model.encode(TEXTS, instruction, max_length=length), ours) > 0.05
    changes = (
        {"causal": True},
        {"mask_instruction": False},
        {"pooling": "mean"},
        {"pooling": "eos"},
    )
    for settings in changes:
        other = NVEmbed.from_pretrained(folder, **settings)
        embeddings = other.encode(TEXTS, instruction, max_length=128)
        same = not instruction and "mask_instruction" in settings
        assert (gap(embeddings, expected) <= 1e-5) == same, settings


# ---- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_again(dtype, released, tmp_path):
    model = NVEmbed.from_pretrained(released, dtype=dtype)
    model.save_pretrained(tmp_path / "copy", dtype=dtype)
    again = NVEmbed.from_pretrained(tmp_path / "copy", dtype=dtype)
    assert gap(again.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) == 0
    saved = ref.read_released(tmp_path / "copy")
    original = ref.read_released(released)
    assert saved.keys() == original.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == dtype
        assert gap(tensor, original[name].to(dtype)) == 0
    config = config_of(tmp_path / "copy")
    text, latent = config["text_config"], config["latent_attention_config"]
    assert config["model_type"] == "nvembed"
    assert config["is_mask_instruction"]
    assert text["model_type"] == "bidir_mistral"
    assert text["_name_or_path"]
    assert latent["num_latents_value"] == 512
    assert latent["cross_dim_head"] == 64
    assert all(text[k] == v for k, v in ref.TINY.items())
    if dtype == torch.float32:
        embeddings = ref.released_embed(tmp_path / "copy", TEXTS, TASK)
        assert gap(embeddings, model.encode(TEXTS, TASK)) <= 1e-5


def test_saved_tokenizer_loads_with_transformers(released, tmp_path):
    model = NVEmbed.from_pretrained(released)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "special_tokens_map.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<s>", "</s>", "</s>")
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert ids == model.tokenize([text])[0].ids


MISREAD = [
    {"causal": True},
    {"pooling": "mean"},
    {"pooling": "eos"},
    {"pooling": "self"},
    {"mask_instruction": False},
    {"keep_eos": True},
]


@pytest.mark.parametrize("settings", MISREAD)
def test_what_the_released_code_would_misread_is_nvembed_x(settings, released, base, tmp_path):
    source = base if settings.get("pooling") == "self" else released
    model = NVEmbed.from_pretrained(source, **settings)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    assert config_of(tmp_path)["model_type"] == "nvembed-x"
    again = NVEmbed.from_pretrained(tmp_path)
    assert again.config == model.config
    ours, theirs = (m.encode(TEXTS, TASK, max_length=90) for m in (again, model))
    assert gap(ours, theirs) == 0
    plain = NVEmbed.from_pretrained(source).encode(TEXTS, TASK)
    assert gap(again.encode(TEXTS, TASK), plain) > 1e-3 or "keep_eos" in settings


SAVED = ["qwen2-bias", "qwen3-norms", "llama3-scaling", "mistral-window", "mistral-wide-heads"]


@pytest.mark.parametrize("name", SAVED)
def test_every_family_survives_saving(name, tmp_path, tokenizer_json):
    family, changes = FAMILIES[name]
    ref.write_base(tmp_path / "a", tokenizer_json, ref.hf_model(family, **changes))
    model = NVEmbed.from_pretrained(tmp_path / "a", causal="window" in name)
    model.save_pretrained(tmp_path / "b", dtype=torch.float32)
    again = NVEmbed.from_pretrained(tmp_path / "b")
    assert again.config == model.config
    assert gap(again.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) == 0
    kind = config_of(tmp_path / "b")["model_type"]
    assert kind == ("nvembed" if name == "mistral-wide-heads" else "nvembed-x")


def test_saving_over_a_sharded_folder(released, tmp_path):
    """An old index or shard beside the new weights would be read in their place."""
    shutil.copytree(released, tmp_path / "m")
    model = NVEmbed.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        model.embedding_model.layers[0].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(tmp_path / "m", dtype=torch.float32)
    again = NVEmbed.from_pretrained(tmp_path / "m")
    assert gap(again.encode(TEXTS), model.encode(TEXTS)) == 0
    assert gap(again.encode(TEXTS), NVEmbed.from_pretrained(released).encode(TEXTS)) > 0.05


def test_saving_in_shards(released, tmp_path, monkeypatch):
    whole = folders.save_torch_state_dict

    def small(*args, **kind):
        return whole(*args, **(kind | {"max_shard_size": "500KB"}))

    monkeypatch.setattr(folders, "save_torch_state_dict", small)
    model = NVEmbed.from_pretrained(released)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert gap(NVEmbed.from_pretrained(tmp_path).encode(TEXTS), model.encode(TEXTS)) == 0


def test_saved_files_have_the_mode_of_new_files(released, tmp_path):
    """safetensors and temporary files are their owner's alone."""
    model = NVEmbed.from_pretrained(released)
    nvembed.add_lora(model, r=2)
    nvembed.save_adapter(model, tmp_path / "m/adapter", released)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    assert len(files) == 9
    assert {path.stat().st_mode for path in files} == {usual}


def test_weights_that_are_not_finite_are_not_saved(released, tmp_path):
    model = NVEmbed.from_pretrained(released)
    model.save_pretrained(tmp_path / "m", torch.float32)
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    name = "embedding_model.layers.2.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = torch.inf
    message = error_of(model.save_pretrained, tmp_path / "m", torch.float32)
    assert f"tensor '{name}': expected finite numbers" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    error_of(model.save_pretrained, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_save_that_fails_leaves_what_was_there(released, tmp_path, monkeypatch):
    model = NVEmbed.from_pretrained(released)
    model.save_pretrained(tmp_path, torch.float32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save = folders.save_torch_state_dict

    def full(state, folder, **kind):
        save({name: state[name] for name in list(state)[:3]}, folder, **kind)
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    model.save_pretrained(tmp_path, torch.float16)  # control: now it does change
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before


# ---- other layouts


def write_e5(folder, tokenizer_json):
    """e5-mistral-7b-instruct's: MistralModel's own names, sentence-transformers' pooling."""
    oracle = ref.hf_model("mistral", sliding_window=4096)
    ref.write_base(folder, tokenizer_json, oracle)
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert "layers.0.self_attn.q_proj.weight" in names
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 64,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return oracle


def test_e5_mistral_layout(tmp_path, tokenizer_json, capsys):
    oracle = write_e5(tmp_path, tokenizer_json)
    capsys.readouterr()
    model = NVEmbed.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    c = model.config
    assert c.causal
    assert c.pooling == "eos"
    assert c.keep_eos
    assert not hasattr(model, "latent_attention_model")
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    rows = []
    for text in TEXTS:
        ids = tokenizer.encode(ref.prefix_of(TASK) + text, add_special_tokens=False).ids
        ids = [1, *ids][:89] + [2]
        rows.append(ref.hf_states(oracle, [ids], causal=True)[0, -1])
    expected = ref.unit(torch.stack(rows))
    assert gap(model.encode(TEXTS, TASK, max_length=90), expected) <= 1e-5
    bidirectional = NVEmbed.from_pretrained(tmp_path, causal=False)
    assert gap(bidirectional.encode(TEXTS, TASK, max_length=90), expected) > 0.05


def test_base_model_gets_a_fresh_pooling_layer(base, capsys):
    model = NVEmbed.from_pretrained(base)
    (line,) = capsys.readouterr().err.splitlines()
    assert "latent_attention_model" in line
    assert "lm_head.weight" in line
    assert str(base) in line
    assert model.config.pooling == "latent"
    assert model.latent_attention_model.latents.shape == (512, 64)
    assert not any(p.isnan().any() for p in model.parameters())
    torch.manual_seed(1)
    again = NVEmbed.from_pretrained(base)  # an untrained layer is the same at every load
    assert gap(again.encode(TEXTS), model.encode(TEXTS)) == 0
    before = torch.get_rng_state()
    NVEmbed.from_pretrained(base)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is left alone
    capsys.readouterr()
    NVEmbed.from_pretrained(base, pooling="mean")
    (line,) = capsys.readouterr().err.splitlines()
    assert "latent_attention_model" not in line
    assert "lm_head.weight" in line
