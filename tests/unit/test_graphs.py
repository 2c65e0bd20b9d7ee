"""Queries replayed as CUDA graphs: when a graph is made, kept, made anew, and when not.

Without a GPU a stand-in takes the place of the capture: it records what is captured and computes
it at replay. With one, the graphs are real.
"""

import contextlib
import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare import gap

from data import graphs
from nvembed import NVEmbed, add_lora

QUERIES = ["how deep is the lake", "who wrote the letter", "a river"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def captured(monkeypatch):
    """The sizes of the batches that were captured."""
    sizes = []
    real = graphs.capture

    def recorded(function, x):
        sizes.append(len(x))
        return real(function, x) if x.is_cuda else function

    monkeypatch.setattr(graphs, "capture", recorded)
    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "is_small", small_on_any_device)
    return sizes


def small_on_any_device(x):
    return len(x) <= graphs.MOST_TOKENS and not torch.is_grad_enabled()


@pytest.fixture
def models(base):
    """The same model twice; the second one replays."""
    plain = NVEmbed.from_pretrained(base, DEVICE)
    return plain, copy.deepcopy(plain).replay_queries()


def same(models, texts=QUERIES):
    plain, replayed = [[model.encode([text]) for text in texts] for model in models]
    return gap(np.concatenate(plain), np.concatenate(replayed)) <= 1e-6


def test_replayed_is_plain_and_captured_once_a_length(models, captured):
    for _ in range(3):
        assert same(models)
    lengths = {len(tokens.ids) for tokens in models[0].tokenize(QUERIES)}
    assert sorted(captured) == sorted(lengths)
    whole = [model.encode(QUERIES) for model in models]  # lengths of a batch of three
    assert gap(*whole) <= 1e-6
    assert captured[-1] == sum(len(tokens.ids) for tokens in models[0].tokenize(QUERIES))


def test_a_changed_model_is_captured_anew(models, captured):
    plain, replayed = models
    assert same(models, QUERIES[:1])
    for model in models:
        model.config.causal = True
    assert same(models, QUERIES[:1])
    assert len(captured) == 2
    before = replayed.encode(QUERIES[:1])
    for model in models:
        weight = model.embedding_model.layers[0].mlp.up_proj.weight
        weight.data = weight.data * 2  # elsewhere in memory
    assert same(models, QUERIES[:1])
    assert len(captured) == 3
    for model in models:
        model.embedding_model.norm.weight.data *= 3  # in place: the graph reads what is there
        model.embedding_model.norm.weight.data[:9] = 0
    assert same(models, QUERIES[:1])
    assert len(captured) == 3
    assert gap(replayed.encode(QUERIES[:1]), before) > 1e-3  # control: the changes are seen
    torch.manual_seed(0)
    add_lora(replayed)
    replayed.encode(QUERIES[:1])
    assert len(captured) == 4


def test_what_is_not_replayed(models, captured, monkeypatch):
    _, replayed = models
    monkeypatch.setattr(graphs, "MOST_TOKENS", 20)
    replayed.encode(["river " * 40])  # a large batch
    tokens = replayed.tokenize(QUERIES[:1])
    replayed(tokens)  # with a graph for gradients
    with torch.no_grad():
        replayed.train()(tokens)
    assert captured == []
    with torch.no_grad():
        replayed.eval()(tokens)  # control
    assert len(captured) == 1


def test_graphs_are_bounded(models, captured, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    texts = ["a", "a river", "a river of the winter"]
    assert same(models, texts)
    kept = models[1].embedding_model.states.graphs
    assert len(captured) == 3 and len(kept) == 2
    assert same(models, texts[1:])
    assert len(captured) == 3  # the oldest went
    assert same(models, texts[:1])
    assert len(captured) == 4


def test_where_capturing_fails_the_plain_function_goes_on(models, captured, monkeypatch, capsys):
    def refuses(function, x):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", refuses)
    assert same(models)
    told = capsys.readouterr().err
    assert told.count("CUDA graphs are off: operation not permitted") == 1
    assert len(told.splitlines()) == 1


def test_copies_make_their_own(models, captured):
    plain, replayed = models
    assert same(models, QUERIES[:1])
    for other in (copy.deepcopy(replayed), pickle.loads(pickle.dumps(replayed))):
        assert not other.embedding_model.states.graphs
        assert other.embedding_model.states.decoder is other.embedding_model
        other.embedding_model.norm.weight.data[:9] = 0
        assert gap(other.encode(QUERIES[:1]), plain.encode(QUERIES[:1])) > 1e-3
    assert same(models, QUERIES[:1])


def test_on_a_cpu_nothing_is_captured(base):
    model = NVEmbed.from_pretrained(base).replay_queries()
    model.encode(QUERIES)
    assert not model.embedding_model.states.graphs


def test_a_replay_keeps_what_its_graph_reads(monkeypatch):
    """A graph knows addresses only: rope tables and lengths have to outlive the call."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stubs = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, **options: contextlib.nullcontext(),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    read = torch.ones(3, 4)
    alive = weakref.ref(read)
    graphs.side_stream.cache_clear()
    replay = graphs.capture(lambda x, read=read: x + read, torch.zeros(3, 4))
    graphs.side_stream.cache_clear()
    del read
    gc.collect()
    assert alive() is not None
    assert (replay(torch.zeros(3, 4)) == 1).all()
    del replay
    gc.collect()
    assert alive() is None  # control


def test_inference_mode_has_graphs_of_its_own(models, captured):
    _, replayed = models
    tokens = replayed.tokenize(QUERIES[:1])
    with torch.inference_mode():
        replayed(tokens)
    with torch.no_grad():
        replayed(tokens)
    assert len(captured) == 2
    replayed(tokens).sum()  # with gradients: what was kept may be saved for them
