"""Folders as sentence-transformers 6 and older write them: its vectors, or refused by name."""

import json
import shutil

import numpy as np
import pytest
import references as ref
import torch
import transformers
from compare import TASK, error_of, gap
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import processors

from data import dialects, folders, peers
from nvembed import NVEmbed

TEXTS = ["the sun", "how do plants make food?", "x" * 40, "(7) 苹果 🍎\nend", "the river " * 90]
PROMPT = ref.prefix_of(TASK)
SIZES = {"vocab_size": 324}  # transformers' tokenizer of Qwen2 has some tokens of its own


def edit(path, **changes):
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | changes))


def write_tokenizer(folder, adds):
    tokenizer = ref.tiny_tokenizer()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(adds, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def make(tmp_path_factory, tokenizer_json):
    """make(family, mode, ...) -> a folder that sentence-transformers wrote, and its model."""

    def folder_of(family="mistral", mode="lasttoken", adds="<s> $A </s>", flags=None, **config):
        root = tmp_path_factory.mktemp("peer")
        ref.write_base(root / "base", tokenizer_json, ref.hf_model(family, **(SIZES | config)))
        write_tokenizer(root / "base", adds)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
        settings |= {"bos_token": "<s>", "eos_token": "</s>"} | (flags or {})
        edit(root / "base/tokenizer_config.json", **settings)
        return save(root)

    def save(root, mode="lasttoken"):
        body = Transformer(str(root / "base"))
        model = SentenceTransformer(modules=[body, Pooling(64, mode), Normalize()], device="cpu")
        model.max_seq_length = 100
        model.save_pretrained(str(root / "st"))
        return root / "st"

    def both(*args, mode="lasttoken", **kind):
        folder = folder_of(*args, **kind)
        if mode != "lasttoken":
            edit(folder / "1_Pooling/config.json", pooling_mode=mode)
        return folder, SentenceTransformer(str(folder), device="cpu")

    return both


def same(folder, peer):
    """Whether our vectors are theirs, with and without a prompt."""
    model = NVEmbed.from_pretrained(folder)
    bare = gap(model.encode(TEXTS), peer.encode(TEXTS, normalize_embeddings=True))
    theirs = peer.encode(TEXTS, prompt=PROMPT, normalize_embeddings=True)
    return max(bare, gap(model.encode(TEXTS, TASK), theirs)) <= 2e-5


CASES = {
    "lasttoken": {},
    "mean": {"mode": "mean"},
    "no eos": {"adds": "<s> $A", "mode": "mean"},
    "no eos, last token": {"adds": "<s> $A"},
    "no bos": {"adds": "$A </s>"},
    "qwen2 without bos": {"family": "qwen2", "adds": "$A </s>"},
    "neither": {"adds": "$A", "mode": "mean"},
    "flags do not count": {"flags": {"add_bos_token": False, "add_eos_token": False}},
    "not causal": {"family": "qwen2", "is_causal": False},
    "window": {"sliding_window": 9},
    "window of qwen2": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 0,
    },
    "window that is not used": {"family": "qwen2", "sliding_window": 9, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_theirs(name, make, capsys):
    folder, peer = make(**CASES[name])
    capsys.readouterr()
    assert same(folder, peer), NVEmbed.from_pretrained(folder).config
    assert capsys.readouterr().err == ""  # nothing fresh, dropped or changed
    assert len(peer.tokenize([TEXTS[-1]])["input_ids"][0]) == 100  # control: it was cut


CONTROLS = [
    {"causal": False},
    {"pooling": "mean"},
    {"add_eos": False, "keep_eos": False},
    {"bos_token_id": None},
    {"max_seq_length": 90},
    {"mask_instruction": True},
]


def test_each_of_it_matters(make, capsys):
    """Controls: with one thing changed the vectors are others, and a line says what was changed."""
    folder, peer = make()
    for settings in CONTROLS:
        capsys.readouterr()
        model = NVEmbed.from_pretrained(folder, **settings)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{folder}: ")
        for name, value in settings.items():
            assert (
                f"{name} {getattr(NVEmbed.from_pretrained(folder).config, name)} -> {value}" in line
            )
        if "mask_instruction" in settings:
            continue  # the last token is pooled either way
        assert gap(model.encode(TEXTS), peer.encode(TEXTS, normalize_embeddings=True)) > 1e-3, (
            settings
        )


OLD = {  # before version 6
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
}


@pytest.fixture
def folder(make, tmp_path):
    """A folder to change, whose model is the last token's."""
    return shutil.copytree(make()[0], tmp_path / "st")


@pytest.mark.parametrize(("flag", "pooling"), [("lasttoken", "eos"), ("mean_tokens", "mean")])
def test_flags_of_old_versions(flag, pooling, folder):
    path = folder / "1_Pooling/config.json"
    path.write_text(
        json.dumps(OLD | {"word_embedding_dimension": 64, f"pooling_mode_{flag}": True})
    )
    model = NVEmbed.from_pretrained(folder)
    assert model.config.pooling == pooling
    assert same(folder, SentenceTransformer(str(folder), device="cpu"))


def test_one_mode_in_a_list_and_none_at_all(folder):
    path = folder / "1_Pooling/config.json"
    path.write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": ["lasttoken"]}))
    assert NVEmbed.from_pretrained(folder).config.pooling == "eos"
    path.write_text(json.dumps({"embedding_dimension": 64}))
    assert same(folder, SentenceTransformer(str(folder), device="cpu"))  # theirs: the mean
    assert NVEmbed.from_pretrained(folder).config.pooling == "mean"


MODES = ["cls", "max", "mean_sqrt_len_tokens", "weightedmean", ["mean", "max"], "other", 3]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_other_poolings_are_refused_by_name(mode, folder):
    edit(folder / "1_Pooling/config.json", pooling_mode=mode)
    message = error_of(NVEmbed.from_pretrained, folder)
    assert "1_Pooling/config.json: field 'pooling_mode'" in message
    assert repr(mode) in message


@pytest.mark.parametrize(
    "flag", [flag for flag in OLD if "last" not in flag and "mean_t" not in flag]
)
def test_other_old_poolings_are_refused_by_name(flag, folder):
    path = folder / "1_Pooling/config.json"
    path.write_text(json.dumps(OLD | {flag: True}))
    name = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}.get(flag)
    name = name or flag.removeprefix("pooling_mode_").replace("weightedmean_tokens", "weightedmean")
    assert name in error_of(NVEmbed.from_pretrained, folder)
    path.write_text(json.dumps(OLD | {flag: True, "pooling_mode_mean_tokens": True}))
    assert "['" in error_of(NVEmbed.from_pretrained, folder)  # two, side by side


REFUSED = [  # file, changes, words of the message
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
    ("config_sentence_transformers.json", {"prompts": {"query": "query: "}}, "prompt 'query'"),
    (
        "config_sentence_transformers.json",
        {"prompts": {"q": PROMPT}, "default_prompt_name": "q"},
        "default_prompt_name",
    ),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
    ("sentence_bert_config.json", {"query_length": 32}, "query_length"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
    ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("config.json", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("config.json", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("file", "changes", "words"), REFUSED)
def test_what_cannot_be_honoured_is_refused(file, changes, words, folder):
    if "layer_types" in changes:
        changes = changes | {"sliding_window": 9}
    edit(folder / file, **changes)
    message = error_of(NVEmbed.from_pretrained, folder)
    assert words in message
    assert file.split("/")[-1] in message


def test_prompts_that_are_ours_are_fine(folder):
    path = folder / "config_sentence_transformers.json"
    edit(path, prompts={"query": PROMPT, "document": ""}, default_prompt_name="document")
    assert NVEmbed.from_pretrained(folder)


def test_scores_that_are_no_cosines(folder):
    """With a Normalize module a dot product is one."""
    edit(folder / "config_sentence_transformers.json", similarity_fn_name="dot")
    assert NVEmbed.from_pretrained(folder)
    path = folder / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    assert "similarity_fn_name" in error_of(NVEmbed.from_pretrained, folder)
    edit(folder / "config_sentence_transformers.json", similarity_fn_name="cosine")
    assert NVEmbed.from_pretrained(folder)


def test_layers_with_and_without_a_window(folder):
    edit(folder / "config.json", model_type="qwen2", use_sliding_window=True, sliding_window=9)
    edit(folder / "config.json", max_window_layers=2)
    assert "layer_types" in error_of(NVEmbed.from_pretrained, folder)
    edit(folder / "config.json", max_window_layers=3)
    found = dialects.config_fields(folder, {"sliding_window"})
    assert found["sliding_window"] is None
    edit(folder / "config.json", max_window_layers=0, is_causal=False)
    assert "without causal mask" in error_of(NVEmbed.from_pretrained, folder)


def test_other_modules_are_refused(folder):
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    for kind in ("sentence_transformers.sentence_transformer.modules.Dense", "evil.Pooling2"):
        path.write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "", "type": kind}]))
        assert kind in error_of(NVEmbed.from_pretrained, folder)
    for content in ("{", "3", "[3]", '[{"type": "x"}]'):
        path.write_text(content)
        assert "modules.json" in error_of(NVEmbed.from_pretrained, folder)


# ---- bases


def test_a_base_has_a_bos_where_its_tokenizer_adds_one(base, tmp_path):
    """As in transformers; where nothing says so, as in the default base, config.json does."""
    for adds, bos in (("<s> $A", 1), ("$A", None)):
        folder = shutil.copytree(base, tmp_path / adds)
        edit(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>")
        write_tokenizer(folder, adds)
        model = NVEmbed.from_pretrained(folder)
        assert model.config.bos_token_id == bos
        theirs = transformers.AutoTokenizer.from_pretrained(folder)("sun")["input_ids"]
        assert model.tokenize(["sun"])[0].ids == [*theirs, 2]
    assert NVEmbed.from_pretrained(base).config.bos_token_id == 1


def test_flags_count_where_there_is_no_post_processor(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    edit(folder / "tokenizer.json", post_processor=None)
    for flag, bos in ((True, 1), (False, None), (None, None)):
        edit(folder / "tokenizer_config.json", bos_token={"content": "<s>"}, add_bos_token=flag)
        assert NVEmbed.from_pretrained(folder).config.bos_token_id == bos


def test_a_base_without_a_causal_mask(base, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "base")
    assert not NVEmbed.from_pretrained(folder).config.causal
    edit(folder / "config.json", is_causal=True)
    assert NVEmbed.from_pretrained(folder).config.causal
    capsys.readouterr()
    NVEmbed.from_pretrained(folder, causal=False, pooling="mean")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{folder}: causal True -> False"  # it says nothing of pooling
    assert len(lines) == 2  # and its LM head is dropped


# ---- folders that run code

CODE = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Body:\n    pass\n"


@pytest.fixture
def peer_folder(tmp_path, tokenizer_json):
    """A tiny BERT folder of sentence-transformers."""
    tokenizer = ref.tiny_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=320, intermediate_size=32, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "bert")
    edit(
        tmp_path / "bert/tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token="<unk>",
    )
    body = Transformer(str(tmp_path / "bert"))
    model = SentenceTransformer(modules=[body, Pooling(32, "mean")], device="cpu")
    model.save_pretrained(str(tmp_path / "peer"))
    return tmp_path / "peer"


def test_folders_that_name_code_are_refused(peer_folder, tmp_path, monkeypatch):
    assert dialects.is_sentence_transformer(peer_folder)  # control
    mark = tmp_path / "ran"
    (peer_folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    path = peer_folder / "modules.json"
    modules = json.loads(path.read_text())
    kinds = ("evil.Body", "sentence_transformersx.Body", "sentence_transformers.models.Router", 3)
    for kind in kinds:
        path.write_text(json.dumps([modules[0] | {"type": kind}, *modules[1:]]))
        message = error_of(dialects.is_sentence_transformer, peer_folder)
        assert "modules.json" in message
        assert repr(kind) in message
    assert not mark.exists()


def test_old_versions_of_sentence_transformers_are_refused(peer_folder, monkeypatch):
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "5.4.0")
    message = error_of(dialects.is_sentence_transformer, peer_folder)
    assert "expected sentence-transformers 6 or later, got 5.4.0" in message


def test_all_of_a_folder_decides_its_vectors(make, tmp_path):
    """`model_files`, by which results and vectors are found again."""
    folder = make()[0]
    names = {str(path.relative_to(folder)) for path in dialects.model_files(folder)}
    assert {"config.json", "model.safetensors", "1_Pooling/config.json", "modules.json"} <= names
    assert np.isfinite(NVEmbed.from_pretrained(folder).encode(["a"])).all()
    assert torch.is_tensor(folders.read_weights(folder, None, None)["embedding_model.norm.weight"])
