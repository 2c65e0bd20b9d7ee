"""LoRA = PEFT: forward pass, gradient, files in both directions; its dropout; merging."""

import json
import shutil

import peft
import pytest
import references as ref
import safetensors.torch
import torch
import transformers
from compare import TASK, TEXTS, cosine, error_of, gap, random_ids, random_states, states

import nvembed
from nvembed import NVEmbed

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def with_lora(base, randomised=True, **settings):
    model = NVEmbed.from_pretrained(base, **settings)
    nvembed.add_lora(model, r=4, alpha=8, dropout=0.1)
    generator = torch.Generator().manual_seed(0)
    if randomised:
        for layer in nvembed.lora_layers(model).values():
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.05
    return model.eval()


def load_peft(model, base):
    """Our adapter, loaded by PEFT onto transformers' model, trainable and without dropout."""
    folder = base.parent / "adapter"
    nvembed.save_adapter(model, folder, base)
    oracle = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(oracle, folder, is_trainable=True).eval()


class NVEmbedModel(transformers.PreTrainedModel):
    """The decoder where the released class has it."""

    config_class = transformers.MistralConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding_model = transformers.MistralModel(config)
        self.post_init()

    def forward(self, **inputs):
        return self.embedding_model(**inputs)


def test_an_adapter_of_a_released_model_in_peft(released, tmp_path):
    model = with_lora(released)
    nvembed.save_adapter(model, tmp_path, released)
    shape = ref.TINY | {"sliding_window": None}
    oracle = NVEmbedModel(transformers.MistralConfig(**shape, attn_implementation="eager")).eval()
    oracle.load_state_dict(ref.read_released(released), strict=False)
    ids = random_ids(20)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": ref.bidirectional_mask([20])}
    with torch.no_grad():
        plain = oracle(**inputs).last_hidden_state[0]
        oracle = peft.PeftModel.from_pretrained(oracle, tmp_path).eval()
        theirs = oracle(**inputs).last_hidden_state[0]
        ours = model.embedding_model(torch.tensor(ids), (20,), torch.float32)
    assert (theirs - ours).abs().max() <= 1e-4
    assert (theirs - plain).abs().max() > 0.1  # control
    again = NVEmbed.from_pretrained(tmp_path)
    assert gap(again.encode(TEXTS), model.encode(TEXTS)) <= 1e-6


# ---- forward and backward


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_lora_step_0_is_the_base(pooling, base):
    plain = NVEmbed.from_pretrained(base, pooling=pooling)
    model = with_lora(base, randomised=False, pooling=pooling)
    names = {f"embedding_model.layers.{i}.{part}" for i in range(3) for part in PARTS}
    assert nvembed.lora_layers(model).keys() == names
    own = {n for n in model.state_dict() if ".lora_" not in n}
    assert plain.state_dict().keys() == own  # base names never change
    assert gap(model.encode(TEXTS, TASK), plain.encode(TEXTS, TASK)) == 0
    adapted = with_lora(base, pooling=pooling)
    assert gap(adapted.encode(TEXTS, TASK), plain.encode(TEXTS, TASK)) > 0.01


def test_only_the_adapters_are_to_be_trained(base):
    """A loaded model is frozen, whatever is added to it is not."""
    assert not any(p.requires_grad for p in NVEmbed.from_pretrained(base).parameters())
    named = with_lora(base).named_parameters()
    assert {n for n, p in named if p.requires_grad} == {
        f"embedding_model.layers.{i}.{part}.{matrix}"
        for i in range(3)
        for part in PARTS
        for matrix in ("lora_A", "lora_B")
    }


def test_lora_gradients_equal_peft(base):
    """B starts at zero, so A's gradient is zero: randomised here, and every norm asserted."""
    model = with_lora(base, pooling="eos", causal=True)
    oracle = load_peft(model, base)
    ids, target = random_ids(20), random_states(20)
    hidden = model.embedding_model(torch.tensor(ids), (20,), torch.float32)
    (hidden * target).sum().backward()
    (oracle(input_ids=torch.tensor([ids])).last_hidden_state[0] * target).sum().backward()
    theirs = {n: p.grad for n, p in oracle.named_parameters() if "lora_" in n}
    assert len(theirs) == 2 * 7 * 3
    for name, wanted in theirs.items():
        *layer, kind, _, _ = name.removeprefix("base_model.model.").split(".")
        got = getattr(model.embedding_model.get_submodule(".".join(layer)), kind).grad
        assert wanted.norm() > 0, name
        assert (got - wanted).norm() / wanted.norm() <= 1e-5, name


def test_lora_dropout_only_in_training(base):
    model, ids = with_lora(base, pooling="mean"), random_ids(20)
    assert gap(states(model, ids), states(model, ids)) == 0
    model.train()
    assert gap(states(model, ids), states(model, ids)) > 1e-3
    model.eval()
    quiet = states(model, ids)
    for block in model.embedding_model.layers:
        block.self_attn.dropout.p = 0.0
        block.mlp.dropout.p = 0.0
    assert gap(states(model.train(), ids), quiet) == 0


def test_lora_dropout_is_dropout():
    """A quarter of the numbers is zero, anywhere; the others are scaled to keep the mean."""
    dropout = nvembed.LoraDropout()
    dropout.p = 0.25
    x = torch.ones(4000, 63)
    out = dropout.train()(x)
    assert sorted(out.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert abs(float(out.mean()) - 1) < 0.01
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.005
    assert out.std(dim=0).min() > 0.4
    assert not torch.equal(dropout(x), out)  # drawn at each call
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (2, 3, 4)])
def test_random_mask_has_its_shape_and_its_seed(shape):
    masks = []
    for _ in range(2):
        torch.manual_seed(0)
        masks.append(nvembed.random_mask(shape, 0.5, "cpu"))
    assert masks[0].shape == shape
    assert masks[0].dtype == torch.bool
    assert torch.equal(*masks)


def test_random_mask_keeps_at_the_rate():
    for p in (0.0, 0.1, 0.5, 0.9):
        kept = nvembed.random_mask((1000, 300), p, "cpu").double().mean()
        assert abs(float(kept) - (1 - p)) < 0.005
    assert nvembed.random_mask((1000, 300), 0.0, "cpu").all()


# ---- files


def test_lora_merged_is_adapted(base, tmp_path):
    model = with_lora(base)
    model.save_pretrained(tmp_path / "fp32", dtype=torch.float32)
    merged = NVEmbed.from_pretrained(tmp_path / "fp32")
    assert not any(".lora_" in n for n in merged.state_dict())
    assert gap(merged.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) <= 1e-5
    model.save_pretrained(tmp_path / "own")
    assert ref.read_released(tmp_path / "own")["embedding_model.norm.weight"].dtype == torch.float32
    model.save_pretrained(tmp_path / "bf16", torch.bfloat16)
    half = NVEmbed.from_pretrained(tmp_path / "bf16")
    assert 0.999 <= cosine(half.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) < 0.9999999
    saved = ref.read_released(tmp_path / "bf16")
    assert saved["embedding_model.norm.weight"].dtype == torch.bfloat16
    forgotten = NVEmbed.from_pretrained(base)  # control: export without the adapters
    assert gap(forgotten.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_peft_loads_our_adapter(causal, base):
    model, ids = with_lora(base, pooling="eos", causal=causal), random_ids(20)
    expected = ref.hf_states(load_peft(model, base), [ids], causal)[0]
    assert gap(states(model, ids), expected) <= 1e-5
    plain = NVEmbed.from_pretrained(base, pooling="eos", causal=causal)
    assert gap(states(plain, ids), expected) > 0.01


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForCausalLM"])
def test_we_load_an_adapter_of_peft(head, base, tmp_path):
    torch.manual_seed(0)
    oracle = getattr(transformers, head).from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
    )
    oracle = peft.get_peft_model(oracle, config).eval()
    oracle.save_pretrained(tmp_path)
    ids = random_ids(20)
    decoder = oracle.base_model.model
    if head == "AutoModelForCausalLM":
        decoder = decoder.model
    expected = ref.hf_states(decoder, [ids], causal=True)[0]
    plain = NVEmbed.from_pretrained(base, causal=True, pooling="eos")
    assert gap(states(plain, ids), expected) > 0.01
    for model in (
        nvembed.load_adapter(plain, tmp_path),
        NVEmbed.from_pretrained(tmp_path, causal=True, pooling="eos"),  # it names its base
    ):
        assert len(nvembed.lora_layers(model)) == 9
        assert not any(module.training for module in model.modules())  # else dropout would be on
        assert gap(states(model, ids), expected) <= 1e-5


# ---- bad adapters

CHANGES = (
    ({"peft_type": "IA3"}, "adapter_config.json"),
    ({"use_dora": True}, "adapter_config.json"),
    ({"use_rslora": True}, "adapter_config.json"),
    ({"r": 8}, "lora_"),
    ({"target_modules": ["q_proj"]}, "down_proj.lora_A': missing or unknown"),
)


def test_bad_adapters(base, tmp_path):
    model, folder = with_lora(base), tmp_path / "adapter"
    nvembed.save_adapter(model, folder, base)

    def load():
        return nvembed.load_adapter(NVEmbed.from_pretrained(base), folder)

    assert gap(load().eval().encode(TEXTS), model.encode(TEXTS)) <= 1e-6
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    for change, word in CHANGES:
        config.write_text(json.dumps(settings | change))
        assert word in error_of(load), change
    for field in ("r", "lora_alpha", "target_modules"):
        config.write_text(json.dumps({k: v for k, v in settings.items() if k != field}))
        message = error_of(load)
        assert "adapter_config.json" in message
        assert field in message
    config.write_text(json.dumps(settings))
    for damaged in (whole[:-1], whole[:5]):
        weights.write_bytes(damaged)
        assert "adapter_model.safetensors" in error_of(load)
    weights.unlink()
    assert "adapter_model.safetensors" in error_of(load)


def test_a_second_adapter_does_not_replace_the_first(base):
    model = with_lora(base)
    assert "adapter" in error_of(nvembed.add_lora, model)


def test_adapter_settings_are_not_silently_ignored(base, tmp_path):
    model = with_lora(base)
    nvembed.save_adapter(model, tmp_path, base)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    changes = (
        {"alpha_pattern": {"q_proj": 64}},
        {"target_modules": ".*_proj"},
        {"bias": "all"},
    )
    for change in changes:
        path.write_text(json.dumps(settings | change))
        message = error_of(nvembed.load_adapter, NVEmbed.from_pretrained(base), tmp_path)
        assert str(tmp_path) in message, change


VARIANTS = [  # what PEFT computes otherwise, or with another base
    {"use_rslora": True},
    {"use_dora": True},
    {"use_qalora": True},
    {"fan_in_fan_out": True},
    {"layers_to_transform": [0]},
    {"layers_pattern": "layers"},
    {"modules_to_save": ["embed_tokens"]},
    {"alpha_pattern": {"q_proj": 64}},
    {"rank_pattern": {"q_proj": 2}},
    {"layer_replication": [[0, 2], [1, 3]]},
    {"lora_bias": True},
    {"trainable_token_indices": [5]},
    {"target_parameters": ["x"]},
    {"bias": "lora_only"},
    {"revision": "v2"},
    {"some_field_of_the_future": 1},
    *[{"init_lora_weights": name} for name in ("pissa", "pissa_niter_4", "olora", "eva", "corda")],
    *[{"init_lora_weights": name} for name in ("loftq", "lora_ga")],
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_variants_of_lora_are_refused_by_name(change, base, tmp_path):
    nvembed.save_adapter(with_lora(base), tmp_path, base)
    assert NVEmbed.from_pretrained(tmp_path)  # control
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = error_of(NVEmbed.from_pretrained, tmp_path)
    ((field, value),) = change.items()
    assert str(path) in message
    assert f"'{field}': {value!r}" in message


def test_all_fields_that_peft_writes_are_known(base, tmp_path):
    """An adapter as PEFT saves it, with every field that it has, is read."""
    oracle = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
    for start in (True, False, "gaussian", "orthogonal"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
        model = peft.get_peft_model(oracle, config)
        model.save_pretrained(tmp_path / str(start))
        assert NVEmbed.from_pretrained(tmp_path / str(start))
        oracle = model.unload()


BASES = [(None, "got None"), ("", "got ''"), ("gone/base", "not a folder"), (7, "got 7")]


@pytest.mark.parametrize(("name", "words"), BASES)
def test_an_adapter_whose_base_is_null_or_gone(name, words, base, tmp_path):
    nvembed.save_adapter(with_lora(base), tmp_path, base)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    message = error_of(NVEmbed.from_pretrained, tmp_path)
    assert message.startswith(f"{path}: field 'base_model_name_or_path': ")
    assert words in message


def test_an_adapter_of_an_adapter(base, tmp_path):
    nvembed.save_adapter(with_lora(base), tmp_path / "a", base)
    nvembed.save_adapter(with_lora(base), tmp_path / "b", tmp_path / "a")
    (tmp_path / "c").mkdir()
    nvembed.save_adapter(with_lora(base), tmp_path / "c", tmp_path / "c")
    assert "expected a whole model" in error_of(NVEmbed.from_pretrained, tmp_path / "b")
    assert "expected a whole model" in error_of(NVEmbed.from_pretrained, tmp_path / "c")
    shutil.copy(base / "model.safetensors", tmp_path / "a")
    assert "a model or an adapter, got both" in error_of(NVEmbed.from_pretrained, tmp_path / "a")


def test_settings_of_add_lora(base):
    model = NVEmbed.from_pretrained(base)
    for targets in (["v_porj"], ["q_proj", "v_porj"], "q_proj", [], ["lm_head"]):
        message = error_of(nvembed.add_lora, model, targets=targets)
        assert f"targets: expected some of {nvembed.PROJECTIONS}, got {targets}" in message
    for settings in ({"r": 0}, {"r": -2}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        assert "add_lora: " in error_of(nvembed.add_lora, model, **settings)
    assert not nvembed.lora_layers(model)
    nvembed.add_lora(model, targets=["q_proj"])  # control
    assert len(nvembed.lora_layers(model)) == 3


def test_a_model_without_adapter_saves_none(base, tmp_path):
    message = error_of(nvembed.save_adapter, NVEmbed.from_pretrained(base), tmp_path / "a", base)
    assert message == "save_adapter: expected a model with an adapter"
    assert not (tmp_path / "a").exists()


def test_adapters_with_nan_are_neither_saved_nor_loaded(base, tmp_path):
    model, name = with_lora(base), "embedding_model.layers.1.mlp.up_proj.lora_B"
    nvembed.save_adapter(model, tmp_path / "a", base)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.inf
    assert f"tensor '{name}': expected finite" in error_of(
        nvembed.save_adapter, model, tmp_path / "b", base
    )
    assert not (tmp_path / "b").exists()
    file = tmp_path / "a/adapter_model.safetensors"
    state = safetensors.torch.load_file(file)
    state[f"base_model.model.{name.removeprefix('embedding_model.')}.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(state, file)
    assert f"tensor '{name}': expected finite" in error_of(NVEmbed.from_pretrained, tmp_path / "a")
