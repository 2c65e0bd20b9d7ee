"""Fixtures of all tests: one thread, no hub, a tiny tokenizer, tiny models, real tokenizers.

oracle/  equality with independent references      unit/  fast, one part at a time
system/  processes, kills, ranks                   A test of more than a few seconds is marked slow.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a shell starts what it runs in the background deaf to Ctrl-C, and that is inherited
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
for folder in ("tests/system", "tests/oracle", "tests", "."):
    sys.path.insert(0, str(ROOT / folder))

import pytest
import references
import torch
from mistral_tokenizer import mistral_tokenizer

import data.base

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", 'slow: takes more than a few seconds; -m "not slow" skips it'
    )


def pytest_collection_modifyitems(items):
    """The longest file goes first, so that another process has the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE of 320 tokens, <s> = 1, </s> = 2, whose space merges with the next word."""
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
    return {"mistral": mistral_tokenizer(), "smollm2": data.base.base() / "tokenizer.json"}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, base):
    """A recipe of 40 rows that trains the tiny base for ten steps."""
    from helpers import write_recipe

    return write_recipe(tmp_path_factory.mktemp("recipe"), base)


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory):
    """A finished run of that recipe, never stopped; a test that changes it takes a copy."""
    from helpers import command

    run = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = command(recipe, "--out", run)
    assert code == 0, err
    assert "global batch 4 = 1 rank x 4 rows, micro-batches of at most 64 tokens" in out
    return run


@pytest.fixture(scope="session")
def stopped(recipe, tmp_path_factory):
    """The same run after SIGTERM during step 5."""
    from helpers import stopped_run

    return stopped_run(recipe, tmp_path_factory.mktemp("runs") / "stopped", 5)


@pytest.fixture
def unexported(whole, tmp_path):
    """A run whose last checkpoint is written, and not yet the finished model."""
    ignored = shutil.ignore_patterns("adapter", "config.json", "finished")
    return shutil.copytree(whole, tmp_path / "run", ignore=ignored)
