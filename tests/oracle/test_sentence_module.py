"""nvembed.SentenceModule: a run in sentence-transformers gives the vectors of NVEmbed.encode."""

import json
import pickle
import shutil
import subprocess
import sys

import mteb
import numpy as np
import pytest
import references as ref
import torch
import transformers
from compare import TASK, TEXTS, cosine, error_of, gap
from conftest import ROOT
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers.processors import TemplateProcessing

import eval as evaluation
import nvembed
from data import dialects
from data.sentence import instruction_of
from data.tasks import find_tasks, instruction, score_task
from nvembed import NVEmbed, SentenceModule

MORE = [*TEXTS, *["a river " * n for n in (40, 3, 17, 90, 1)]]  # in no order of length


@pytest.fixture(scope="module")
def peer(whole):
    """The finished run of the small recipe, whose only instruction is "Find it"."""
    return SentenceTransformer(str(whole), trust_remote_code=True, device="cpu")


def wrapped(folder, **settings):
    return SentenceTransformer(modules=[SentenceModule(folder, **settings)], device="cpu")


def test_a_run_is_loaded_by_its_path(whole, peer):
    model = NVEmbed.from_pretrained(whole)
    for batch_size in (1, 4, 32):
        theirs = peer.encode(MORE, batch_size=batch_size)
        assert theirs.dtype == np.float32
        assert cosine(theirs, model.encode(MORE)) >= 0.99999
    queries = peer.encode_query(MORE)
    assert cosine(queries, model.encode(MORE, "Find it")) >= 0.99999
    assert cosine(peer.encode(MORE, prompt_name="rows"), queries) >= 0.999999
    assert cosine(peer.encode_document(MORE), model.encode(MORE)) >= 0.99999
    other = peer.encode(MORE, prompt=f"Instruct: {TASK}\nQuery: ")
    assert cosine(other, model.encode(MORE, TASK)) >= 0.99999
    # controls: the instruction matters, and so does the order of the texts
    assert cosine(queries, model.encode(MORE)) < 0.999
    assert cosine(queries[::-1].copy(), model.encode(MORE, "Find it")) < 0.999
    assert peer.get_embedding_dimension() == 64
    assert peer.encode("the sun").shape == (64,)
    assert peer.encode([]).size == 0


def test_a_run_is_loaded_as_a_module(whole, peer):
    """Without trust; its prompts are there too, but for those that are given."""
    by_hand = wrapped(whole)
    assert (
        by_hand.prompts
        == peer.prompts
        == {
            "query": "Instruct: Find it\nQuery: ",
            "document": "",
            "rows": "Instruct: Find it\nQuery: ",
        }
    )
    assert gap(by_hand.encode_query(MORE), peer.encode_query(MORE)) == 0
    module = SentenceModule(NVEmbed.from_pretrained(whole))
    given = SentenceTransformer(modules=[module], prompts={"query": "Instruct: b\nQuery: "})
    assert given.prompts == {"query": "Instruct: b\nQuery: ", "document": ""}
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(whole))


POOLINGS = [
    {"pooling": "latent"},
    {"pooling": "mean", "causal": True},
    {"pooling": "eos", "causal": True},
    {"pooling": "self"},
]


@pytest.mark.parametrize("settings", POOLINGS, ids=lambda s: s["pooling"])
def test_every_pooling_and_mask(settings, base, tmp_path):
    model = NVEmbed.from_pretrained(base, **settings)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    loaded = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert loaded.prompts == {"query": "", "document": ""}  # no recipe, no prompts
    prompt = f"Instruct: {TASK}\nQuery: "
    assert cosine(loaded.encode(MORE), model.encode(MORE)) >= 0.99999
    assert cosine(loaded.encode(MORE, prompt=prompt), model.encode(MORE, TASK)) >= 0.99999
    # no plain modules: transformers does not know the layout
    with pytest.raises(ValueError, match="nvembed"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_run_is_ours_and_no_peer(whole, tmp_path):
    assert not dialects.is_sentence_transformer(whole)
    assert dialects.model_files(whole)
    names = {path.name for path in whole.iterdir()}
    assert {"modules.json", "config_sentence_transformers.json", "README.md"} <= names
    assert not list(whole.rglob("*.py"))
    # control: the same files round a model of another family name code to run
    folder = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "bert"
    (folder / "config.json").write_text(json.dumps(config))
    assert "'nvembed.SentenceModule'" in error_of(dialects.is_sentence_transformer, folder)


def test_prompts_are_whole_ones(peer):
    c = peer[0].model.config
    assert instruction_of(None, c) == instruction_of("", c) == ""
    assert instruction_of("Instruct: a\nQuery: b\nQuery: ", c) == "a\nQuery: b"
    for prompt in ("query: ", "Find it", "Instruct: Find it\nQuery:"):
        assert repr(prompt) in error_of(peer.encode, ["a"], prompt=prompt)
    assert "expected a str" in error_of(peer.encode, [("a", "b")])


def test_lengths_and_tokens(peer):
    assert peer.max_seq_length == peer[0].model.config.max_seq_length
    long = ["river " * 99, "river " * 200]
    whole_texts = peer.encode(long)
    peer.max_seq_length = 20
    try:
        assert cosine(*peer.encode(long)[:, None]) > 0.999999
        assert cosine(peer.encode(long), whole_texts) < 0.9999
        assert "max_length" in error_of(setattr, peer, "max_seq_length", 0)
    finally:
        peer.max_seq_length = 512
    text = "how do plants make food?"
    assert peer.tokenizer.decode(peer.tokenizer.encode(text).ids).endswith(text)


def test_it_is_saved_and_loaded_again(peer, whole, tmp_path):
    peer.save_pretrained(str(tmp_path / "a"))
    again = SentenceTransformer(str(tmp_path / "a"), trust_remote_code=True, device="cpu")
    assert again.prompts == peer.prompts
    assert gap(again.encode_query(MORE), peer.encode_query(MORE)) <= 1e-6
    assert gap(NVEmbed.from_pretrained(tmp_path / "a").encode(MORE), peer.encode(MORE)) <= 1e-6
    copy = pickle.loads(pickle.dumps(peer[0]))  # as pools of processes do
    assert type(copy) is SentenceModule is nvembed.SentenceModule
    assert gap(copy.model.encode(MORE), peer.encode(MORE)) <= 1e-6


def test_settings_reach_the_model(whole):
    half = SentenceTransformer(
        str(whole),
        trust_remote_code=True,
        device="cpu",
        model_kwargs={"dtype": torch.bfloat16, "pooling": "mean"},
    )
    assert half[0].model.dtype == torch.bfloat16
    assert half[0].model.config.pooling == "mean"
    assert wrapped(whole, dtype="bfloat16")[0].model.dtype == torch.bfloat16
    assert "colour" in error_of(SentenceModule, whole, colour="red")


LAZY = """
import sys
import nvembed
assert "sentence_transformers" not in sys.modules, "imported too early"
assert not hasattr(nvembed, "Sentence")
nvembed.SentenceModule
assert "sentence_transformers" in sys.modules
"""


@pytest.mark.slow
def test_the_package_is_imported_when_it_is_asked_for():
    line = [sys.executable, "-c", LAZY]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- plain modules


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("pooling", "mode"), [("eos", "lasttoken"), ("mean", "mean")])
def test_what_plain_modules_can_do(causal, pooling, mode, tmp_path):
    """data/README.md's table: all of last-token pooling, the documents of mean pooling.

    Why no run is written as plain modules: queries are not exact where their instruction is not
    pooled. sentence-transformers leaves out as many tokens as the bare prompt has, and in a text
    its last space is part of the first word.
    """
    ref.hf_model("llama", vocab_size=324, is_causal=causal).save_pretrained(tmp_path)
    tokenizer = ref.tiny_tokenizer()
    tokens = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=tokens)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    body = Transformer(str(tmp_path))
    plain = Pooling(64, mode, include_prompt=mode == "lasttoken")
    peer = SentenceTransformer(modules=[body, plain, Normalize()], device="cpu")
    model = NVEmbed.from_pretrained(tmp_path, causal=causal, pooling=pooling)
    assert cosine(peer.encode(MORE), model.encode(MORE)) >= 0.99999
    queries = peer.encode(MORE[2:], prompt=f"Instruct: {TASK}\nQuery: ")
    found = cosine(queries, model.encode(MORE[2:], TASK))
    assert found >= 0.99999 if pooling == "eos" else found < 0.9999


# ---- scores


@pytest.mark.slow
def test_their_evaluator_finds_our_score(tmp_path):
    """nDCG@10 of SQuAD's first questions by sentence-transformers' evaluator and by eval.py."""
    source = evaluation.resolve("smollm2:2")
    model = NVEmbed.from_pretrained(source, pooling="mean", causal=True)
    model.save_pretrained(tmp_path / "model", torch.float32)
    (task,) = find_tasks("local", "SQuAD", limit=40)
    model = evaluation.Encoder(str(tmp_path / "model"), 64, "float32", limit=40)
    ours = score_task(task, model, mteb.ResultCache(tmp_path))[0] / 100

    task.load_data()
    part = task.dataset["default"]["test"]
    queries = dict(zip(part["queries"]["id"], part["queries"]["text"], strict=True))
    corpus = dict(zip(part["corpus"]["id"], part["corpus"]["text"], strict=True))
    relevant = {query: set(found) for query, found in part["relevant_docs"].items()}
    peer = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    peer.max_seq_length = 64
    prompt = f"Instruct: {instruction(task.metadata, 'query')}\nQuery: "
    scores = []
    for query_prompt in (prompt, ""):
        evaluator = InformationRetrievalEvaluator(
            queries, corpus, relevant, ndcg_at_k=[10], query_prompt=query_prompt
        )
        scores.append(evaluator(peer)["cosine_ndcg@10"])
    assert 0.05 < ours < 0.95
    assert abs(scores[0] - ours) <= 1e-4
    assert abs(scores[1] - ours) > 1e-3  # control: without the instruction
