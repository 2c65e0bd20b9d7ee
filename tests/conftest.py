"""Fixtures shared by the tests: one thread, no hub, tiny tokenizer and models, real tokenizers."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import references
import torch
from mistral_tokenizer import mistral_tokenizer

from data import prepare

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE of 320 tokens with <s> = 1, </s> = 2 whose space merges with the next word."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    references.tiny_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="session")
def released(tmp_path_factory, tokenizer_json):
    """A tiny NV-Embed-v2 folder as released: sharded, with an index."""
    folder = tmp_path_factory.mktemp("released") / "v2"
    references.write_released(folder, tokenizer_json, shards=3)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_json):
    """A tiny Mistral base as transformers writes it, with lm_head."""
    folder = tmp_path_factory.mktemp("base") / "mistral"
    references.write_base(folder, tokenizer_json, references.hf_model("mistral", lm_head=True))
    return folder


@pytest.fixture(scope="session")
def real_tokenizers():
    """Name -> tokenizer.json of Mistral-7B-v0.1 and of the default base."""
    return {"mistral": mistral_tokenizer(), "smollm2": prepare.base() / "tokenizer.json"}
