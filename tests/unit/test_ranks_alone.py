"""What ranks and GPUs need, as far as one process shows it: PyTorch's versions, agreement."""

import itertools

import pytest
import torch

import nvembed
from data import ranks, runs
from data.commands import InputError

LENGTHS = (5, 3, 8)


def kernel(q, k, v, ends, *_, window_size):
    """varlen_attn of PyTorch 2.11 by SDPA: as many key-value heads as query heads."""
    assert q.shape == k.shape == v.shape
    before, after = [10**6 if side < 0 else side for side in window_size]
    out = []
    for start, end in itertools.pairwise(ends.tolist()):
        qkv = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        place = torch.arange(end - start)
        back = place[:, None] - place
        mask = (back <= before) & (-back <= after)
        out.append(torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask))
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 3)])
def test_attention_without_grouped_queries(monkeypatch, causal, window):
    """PyTorch 2.11's kernel has none: heads are repeated, with the same result."""
    torch.manual_seed(0)
    q = torch.randn(sum(LENGTHS), 4, 8)
    k, v = torch.randn(2, sum(LENGTHS), 2, 8)
    expected = nvembed.attend(q, k, v, LENGTHS, causal, window)
    monkeypatch.setattr(nvembed, "varlen_attn", kernel)
    monkeypatch.setattr(nvembed, "GROUPED_QUERIES", False)
    found = nvembed.attend_varlen(q, k, v, LENGTHS, causal, window)
    torch.testing.assert_close(found, expected)
    other = nvembed.attend(q, k, v, LENGTHS, not causal)
    assert (other - expected).abs().max() > 0.1  # control


def test_gather_of_earlier_versions(monkeypatch):
    monkeypatch.delattr(ranks.dist, "all_gather_single")
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    copy = lambda out, x: out.copy_(torch.cat([x, x + 1]))
    monkeypatch.setattr(ranks.dist, "all_gather_into_tensor", copy)
    assert ranks.all_gather(torch.tensor([[1.0], [2.0]])).flatten().tolist() == [1, 2, 2, 3]


def test_ranks_resume_from_one_checkpoint(monkeypatch, tmp_path):
    """On several nodes without a shared disk only one has the run's folder."""
    asked = []
    monkeypatch.setattr(runs, "check_agreement", asked.append)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"step": 3, "settings": {}, "base": "b", "record": {"step": 3}}
    (tmp_path / "made").mkdir()
    runs.save_checkpoint(tmp_path / "made", 3, model, optimizer, state)
    for folder in ("made", "missing"):
        runs.resume(tmp_path / folder, {}, {}, model, optimizer)
    assert asked == [state, {"step": 0, "record": {"step": 0}}]


def test_groups_of_ranks_have_a_copy_each(monkeypatch):
    asked = []

    def mesh(kind, shape, mesh_dim_names):
        asked.append((shape, mesh_dim_names))

    monkeypatch.setattr(ranks, "world_size", lambda: 4)
    monkeypatch.setattr(ranks.dist, "init_device_mesh", mesh)
    for group in (0, 2, 4):
        ranks.make_mesh(torch.device("cpu"), group)
    assert asked == [((4,), ("shard",)), ((2, 2), ("copy", "shard")), ((4,), ("shard",))]


def test_ranks_have_to_agree(monkeypatch):
    ranks.check_agreement({"lr": 1.0})
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    digests = []

    def gathered(own, op=None):
        digests.append(own[0])
        return [digests[0], digests[0], digests[-1]]  # rank 2 says what was asked last

    monkeypatch.setattr(ranks, "all_reduce", gathered)
    ranks.check_agreement({"lr": 1.0})
    with pytest.raises(
        InputError, match="rank 2: expected the rows, settings, model and checkpoint of"
    ):
        ranks.check_agreement({"lr": 2.0})
