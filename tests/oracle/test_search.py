"""Search is brute force: the same scores, ids and order, in any blocks, shards and arithmetic."""

import mine
import numpy as np
import pytest
import torch


def brute_force(queries, shards, k):
    """By products of the vectors as they are stored, in fp64; ties by row."""
    documents = torch.cat(shards)
    scores = queries.to(documents.dtype).double() @ documents.double().T
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores.numpy(), order, axis=1), order


def random_vectors(n, width, seed=0):
    vectors = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=1, keepdim=True)


def recall(ids, true):
    shares = [len({*a} & {*b}) / len(b) for a, b in zip(ids.tolist(), true.tolist(), strict=True)]
    return np.mean(shares)


class Spy:
    """mine.scan that notes the arithmetic of each call."""

    def __init__(self):
        self.scan = mine.scan
        self.dtypes = []

    def __call__(self, queries, *arguments):
        self.dtypes.append(queries.dtype)
        return self.scan(queries, *arguments)


@pytest.fixture
def spy(monkeypatch):
    """mine.scan, spied on, as on a CPU that has products in bf16."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    found = Spy()
    monkeypatch.setattr(mine, "scan", found)
    return found


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [2**30, 2**19])
def test_search_is_brute_force(width, dtype, memory):
    """faiss, products and exact scores, one shard and several, blocks of any size: the same scores
    to the last bit."""
    queries = random_vectors(40, width)
    documents = random_vectors(1500, width, 1).to(dtype)
    documents[700:750] = documents[100:150]  # exact ties
    shards = list(documents.split(400))
    scores, ids = mine.search(queries, shards, 50, memory)
    true_scores, true_ids = brute_force(queries, shards, 50)
    assert (ids == true_ids).all()
    assert np.abs(scores - true_scores).max() < 1e-6
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (ids[:, :-1] + 600 == ids[:, 1:]).any()  # a tie: the lower row first

    whole_scores, whole_ids = mine.search(queries, [documents], 50)
    assert (whole_scores == scores).all()
    assert (whole_ids == ids).all()
    every, _ = mine.search(queries, shards, 5000, memory)
    assert every.shape == (40, 1500)


def test_search_in_bf16_is_brute_force(spy):
    """As above where products are rounded: few candidates, all documents as candidates, ties."""
    queries = random_vectors(20, 1024)
    documents = random_vectors(300, 1024, 1).bfloat16()
    documents[200:250] = documents[100:150]
    shards = list(documents.split(100))
    for k in (5, 100, 200, 300, 1000):
        for memory in (2**30, 2**19):
            scores, ids = mine.search(queries, shards, k, memory)
            true_scores, true_ids = brute_force(queries, shards, k)
            assert (ids == true_ids).all()
            assert np.abs(scores - true_scores).max() < 1e-6
    assert torch.bfloat16 in spy.dtypes


def test_products_in_bf16_alone_are_not_enough(spy):
    """Without exact scores the order is wrong; without the second search documents are lost, where
    scores crowd."""
    common = random_vectors(1, 1024, 5)
    queries = 0.9 * common + 0.1 * random_vectors(30, 1024)
    crowd = 0.9 * common + 0.03 * random_vectors(3000, 1024, 1)
    shards = [crowd.bfloat16()]
    _, ids = mine.search(queries, shards, 10)
    _, true_ids = brute_force(queries, shards, 10)
    assert (ids == true_ids).all()
    assert spy.dtypes == [torch.bfloat16, torch.float32]
    _, rounded = spy.scan(queries.bfloat16(), shards, 20, 2**30)
    assert recall(rounded, ids) < 0.5

    spy.dtypes.clear()
    mine.search(random_vectors(30, 1024), [random_vectors(3000, 1024, 1).bfloat16()], 10)
    assert spy.dtypes == [torch.bfloat16]  # where they do not, nothing is searched twice


def test_approximate_index():
    queries = random_vectors(40, 32)
    shards = list(random_vectors(4000, 32, 1).split(1000))
    products = queries @ torch.cat(shards).T
    _, true_ids = brute_force(queries, shards, 20)
    recalls = []
    for text in ("Flat", "IVF32,Flat nprobe=32", "IVF32,Flat nprobe=2"):
        index = mine.build_index(shards, text)
        scores, ids = mine.search(queries, shards, 20, index=index)
        recalls.append(recall(ids, true_ids))
        exact = products.gather(1, torch.from_numpy(ids)).numpy()
        assert np.abs(scores - exact).max() < 1e-5
    assert recalls[:2] == [1, 1]
    assert 0.1 < recalls[2] < 0.9
    index = mine.build_index(shards, "IVF64,Flat nprobe=1")
    scores, _ = mine.search(queries[:1], shards, 2000, index=index)
    assert np.isneginf(scores[0, -1])  # fewer found than asked for
