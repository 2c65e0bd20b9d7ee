"""A suite of small sets and a model without weights, for the tests of evaluation."""

import gzip
import json
import socket
import sys
import zlib

import numpy as np
import pytest

import data.tasks
import eval as evaluation
import nvembed
from data.commands import run_command
from data.files import write_json

TOPICS = {
    "animal": "cat dog horse fish bird",
    "food": "bread soup cheese rice cake",
    "sky": "sun moon star cloud rain",
}
CONFIG = {  # of the fake model: no more than what an evaluation reads
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
}
TASKS = ("SQuAD", "TREC", "WikipediaTopics", "WordSim353")  # those of the small suite


class FakeModel:
    """A text is the sum of fixed random vectors of its words; an instruction changes nothing.

    The calls of `encode` are kept.
    """

    def __init__(self):
        self.calls = []

    def encode(self, texts, instruction="", max_length=512, progress=False, dims=None):
        self.calls.append((instruction, list(texts)))
        return np.stack([self.embed(text)[:dims] for text in texts])

    def embed(self, text):
        seeds = [zlib.crc32(word.encode()) for word in text.lower().split()]
        vector = sum(np.random.default_rng(seed).normal(size=8) for seed in seeds)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def small_sets():
    """{file: rows} of a set of each type."""
    rng = np.random.default_rng(0)
    labelled = []
    for label, words in TOPICS.items():
        for word in words.split() * 4:
            labelled.append((f"{word} {rng.integers(40)}", label))
    documents = [f"{a} {b}" for (a, _), (b, _) in zip(labelled, labelled[7:])]
    queries = []
    for document in dict.fromkeys(documents[:20]):
        words = document.split()
        queries.append({"query": f"{words[0]} {words[2]}", "pos": [document]})
    halves = []
    for i, (text, label) in enumerate(labelled):
        halves.append({"text": text, "label": label, "split": ("train", "test")[i % 2]})
    pairs = []
    for (a, label), (b, other) in zip(labelled, labelled[9:]):
        pairs.append({"text1": a, "text2": b, "score": float(label == other)})
    return {
        "squad": queries + [{"doc": document} for document in documents],
        "trec": halves,
        "topics": [{"text": text, "label": label} for text, label in labelled],
        "sts": pairs,
    }


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The small suite in place of the local one, a folder "model", and the fake model behind it.

    Paths are relative to tmp_path. The network is refused.
    """

    def refuse(*args):
        raise AssertionError("the local suite asked for the network")

    (tmp_path / "eval").mkdir()
    for name, rows in small_sets().items():
        with gzip.open(tmp_path / "eval" / f"{name}.jsonl.gz", "wt") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", CONFIG)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights of the first training")
    model = FakeModel()
    local_tasks = data.tasks.local_tasks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(data.tasks, "RESAMPLES", 50)  # quick
    monkeypatch.setattr(data.tasks.Clustering, "n_clusters", 10)  # quick
    monkeypatch.setattr(
        data.tasks, "local_tasks", lambda limit=None: local_tasks(tmp_path / "eval", limit)
    )
    monkeypatch.setattr(nvembed.NVEmbed, "from_pretrained", lambda *args, **settings: model)
    return model


def local(name):
    """A loaded task of the small suite."""
    (task,) = [task for task in data.tasks.local_tasks() if task.metadata.name == name]
    task.load_data()
    return task


def cells(table):
    """A Markdown table -> {first cell: the other cells}."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in rows}


def output(monkeypatch, capsys, *args, main=None):
    """What a command prints: eval.py's, or another `main`."""
    monkeypatch.setattr(sys, "argv", ["command", *[str(arg) for arg in args]])
    capsys.readouterr()
    run_command(main or evaluation.main)
    return capsys.readouterr().out


def error(monkeypatch, capsys, *args, main=None, notes=0):
    """The line that a command ends with: an error and exit status 2.

    Beside it there is nothing but progress bars and `notes` other lines.
    """
    with pytest.raises(SystemExit) as exit:
        output(monkeypatch, capsys, *args, main=main)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and "%|" not in line]
    assert len(lines) == 1 + notes and lines[-1].startswith("error: "), lines
    return lines[-1]
