"""Qwen3 and Qwen3-Embedding: tied weights, norms of queries and keys, its own query template."""

import json

import pytest
import references as ref
import torch
from compare import TASK, cosine, error_of, gap, random_ids, states
from helpers import command, write_recipe
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

import nvembed
from data import folders, peers
from nvembed import NVEmbed

SHAPE = {"head_dim": 24, "bos_token_id": None, "tie_word_embeddings": True}
TEXTS = ["the sun", "how do plants make food?", "x" * 40, "(7) 苹果 🍎\nend", "the river " * 90]
PROMPT = f"Instruct: {TASK}\nQuery:"  # the text follows without a space
END = "<|endoftext|>"  # it ends a text and pads; <|im_end|> is what the tokenizer calls its eos
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def qwen_tokenizer():
    """A small tokenizer with the parts of Qwen3's, whose words may begin with a ":"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=310,
        special_tokens=[END, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ref.SENTENCES, *[f"{PROMPT}the"] * 20], trainer)
    ending = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, 0)])
    after = [processors.ByteLevel(trim_offsets=False), ending]
    tokenizer.post_processor = processors.Sequence(after)
    return tokenizer


def write_json(path, content):
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny folder with the files of Qwen3-Embedding-0.6B, as sentence-transformers saves it."""
    root = tmp_path_factory.mktemp("qwen3")
    ref.hf_model("qwen3", eos_token_id=0, **SHAPE).save_pretrained(root / "base")
    qwen_tokenizer().save(str(root / "base/tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": END, "padding_side": "left"}
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
    write_json(root / "base/tokenizer_config.json", settings)
    body = Transformer(str(root / "base"))
    model = SentenceTransformer(
        modules=[body, Pooling(64, "lasttoken"), Normalize()],
        prompts={"query": PROMPT, "document": ""},
        device="cpu",
    )
    model.max_seq_length = 100
    model.save_pretrained(str(root / "embedding"))
    return root / "embedding"


# ---- Qwen3-Embedding


def test_vectors_of_qwen3_embedding_are_theirs(folder, capsys):
    peer = SentenceTransformer(str(folder), device="cpu")
    capsys.readouterr()
    model = NVEmbed.from_pretrained(folder)
    assert capsys.readouterr().err == ""  # nothing fresh, dropped or changed
    c = model.config
    assert (c.causal, c.pooling, c.bos_token_id, c.eos_token_id) == (True, "eos", None, 0)
    assert c.query_template == "Instruct: {instruction}\nQuery:"
    assert [text.ids[-1] for text in model.tokenize(TEXTS)] == [0] * len(TEXTS)
    assert len(model.tokenize(TEXTS)[-1].ids) == 100
    queries = peer.encode_query(TEXTS)
    assert cosine(model.encode(TEXTS, TASK), queries) >= 0.999999
    assert cosine(model.encode(TEXTS), peer.encode_document(TEXTS)) >= 0.999999
    # control: the paper's template, with a space, gives other vectors
    other = NVEmbed.from_pretrained(folder, query_template=folders.QUERY_TEMPLATE)
    assert f"query_template {c.query_template}" in capsys.readouterr().err
    assert cosine(other.encode(TEXTS, TASK), queries) < 0.999


def test_the_ids_are_the_tokenizers(folder):
    """Also where ":" and the first letters of the query are one token: it is not pooled."""
    tokenizer = SentenceTransformer(str(folder), device="cpu").tokenizer
    model = NVEmbed.from_pretrained(folder, mask_instruction=True)
    for text in TEXTS[:4]:
        (ours,) = model.tokenize([text], TASK)
        theirs = tokenizer(PROMPT + text)["input_ids"]
        assert ours.ids == theirs
        pooled = model.tokenizer.decode(ours.ids[ours.not_pooled :])
        assert text.endswith(pooled)
        assert len(text) - len(pooled) <= 4
    (tokens,) = model.tokenize(["the sun"], TASK)
    assert model.tokenizer.id_to_token(tokens.ids[tokens.not_pooled - 1]).startswith(":t")


def test_two_templates_in_a_folder_are_refused(folder, tmp_path):
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": {"a": PROMPT + " "}})
    found = peers.template_of_prompts(tmp_path, normalized=True)
    assert found == folders.QUERY_TEMPLATE
    prompts = {"a": PROMPT, "b": PROMPT + " ", "c": ""}
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": prompts})
    message = error_of(peers.template_of_prompts, tmp_path, normalized=True)
    assert "one ending" in message


@pytest.mark.parametrize("template", ["Query: ", "", "{instruction}{instruction}", 3])
def test_a_template_has_a_place_for_the_instruction(template, folder):
    message = error_of(NVEmbed.from_pretrained, folder, query_template=template)
    assert "query_template" in message


def test_its_template_is_saved(folder, tmp_path):
    model = NVEmbed.from_pretrained(folder)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    again = NVEmbed.from_pretrained(tmp_path)
    assert again.config == model.config
    assert gap(again.encode(TEXTS, TASK), model.encode(TEXTS, TASK)) == 0
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nvembed-x"


# ---- bases


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_json):
    """A base with tied weights: its file has no LM head."""
    folder = tmp_path_factory.mktemp("base")
    ref.write_base(folder, tokenizer_json, ref.hf_model("qwen3", lm_head=True, **SHAPE))
    return folder


def test_tied_weights(base, capsys):
    names = load_file(base / "model.safetensors").keys()
    assert "lm_head.weight" not in names
    assert "model.layers.0.self_attn.q_norm.weight" in names
    model = NVEmbed.from_pretrained(base, causal=True, pooling="eos")
    assert capsys.readouterr().err == ""
    oracle = ref.hf_model("qwen3", lm_head=True, **SHAPE).model
    ids = random_ids(41)
    expected = ref.hf_states(oracle, [ids], causal=True)[0]
    assert gap(states(model, ids), expected) <= 1e-5
    for block in model.embedding_model.layers:  # control: the norms matter, and where they stand
        norms = block.self_attn.q_norm, block.self_attn.k_norm
        assert norms[0].weight.shape == (24,)
        block.self_attn.q_norm, block.self_attn.k_norm = norms[::-1]
    assert gap(states(model, ids), expected) > 0.01


def test_a_base_has_the_papers_template(base):
    model = NVEmbed.from_pretrained(base)
    assert model.config.query_template == "Instruct: {instruction}\nQuery: "
    assert nvembed.query_prefix(TASK, model.config.query_template) == ref.prefix_of(TASK)


def test_head_width_that_is_not_stated_is_transformers_default(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    assert config.pop("head_dim") == 24
    write_json(tmp_path / "config.json", config)
    assert nvembed.read_config(tmp_path).head_dim == 128
    write_json(tmp_path / "config.json", config | {"attention_bias": True})
    assert "attention_bias" in error_of(nvembed.read_config, tmp_path)


def test_a_run_trains_the_adapters_and_no_norm(base, tmp_path):
    recipe = write_recipe(tmp_path, base)
    code, out, err = command(recipe, "--out", tmp_path / "run", "--steps", 4)
    assert code == 0, err
    assert float(out.split("lowest ")[1].split()[0]) >= 0.9999
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    layer = "layers.1.self_attn."
    for name, same in (("q_norm", True), ("k_norm", True), ("q_proj", False)):
        one = before[f"model.{layer}{name}.weight"]
        other = after[f"embedding_model.{layer}{name}.weight"]
        assert torch.equal(one, other) == same
    model = NVEmbed.from_pretrained(tmp_path / "run")
    assert model.config.qk_norm
    adapted = NVEmbed.from_pretrained(tmp_path / "run/adapter", pooling="mean")
    merged = NVEmbed.from_pretrained(tmp_path / "run", pooling="mean")
    assert cosine(adapted.encode(TEXTS, TASK), merged.encode(TEXTS, TASK)) >= 0.99999
