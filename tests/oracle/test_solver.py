"""SparseGPT's solver against two independent forms: inverses written out, and column by column."""

import numpy as np
import pytest
import torch

from experiments import compress


def problem(rows=12, width=64, seed=0):
    """A layer's weight (out, in) and X^T X of inputs that are correlated as a network's are."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width, width)) * np.linspace(0.1, 2, width)
    x = rng.standard_normal((400, width)) @ mixing
    return rng.standard_normal((rows, width)), x.T @ x


def output_error(weight, new, gram):
    """|X (W - W')^T| / |X W^T|, by X^T X."""
    apart = weight - new
    squares = np.trace(apart @ gram @ apart.T) / np.trace(weight @ gram @ weight.T)
    return squares**0.5


def brain_surgeon(weight, gram, group, decide):
    """Column by column, with the inverse of what is left of the Hessian written out.

    w_k -= e / [H^-1]_jj [H^-1]_jk. decide(columns, [H^-1]_jj of each) -> bool mask, True = keep,
    for `group` columns at a time.
    """
    w = weight.copy()
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    first = [np.linalg.inv(hessian[j:, j:])[0] for j in range(len(hessian))]
    for j in range(len(hessian)):
        if j % group == 0:
            end = min(j + group, len(hessian))
            diagonal = np.array([first[k][0] for k in range(j, end)])
            mask = decide(w[:, j:end], diagonal)
        for row in range(len(w)):
            before = w[row, j]
            w[row, j] = before * mask[row, j % group]
            w[row, j + 1 :] -= (before - w[row, j]) / first[j][0] * first[j][1:]
    return w


def half(columns, inverse):
    """Zeroes the half of all numbers whose loss w^2 / [H^-1]_jj is least."""
    loss = columns**2 / inverse
    return loss >= np.sort(loss.ravel())[loss.size // 2]


def two_of_four(columns, inverse):
    order = (columns**2 / inverse).argsort(axis=1)
    mask = np.zeros(columns.shape, dtype=bool)
    np.put_along_axis(mask, order[:, 2:], True, axis=1)
    return mask


def solve(weight, gram, kind):
    weight, gram = torch.from_numpy(weight).float(), torch.from_numpy(gram).float()
    return compress.prune(weight, gram, "sparsegpt", compress.read_sparsity(kind)).numpy()


@pytest.mark.parametrize(("kind", "decide", "group"), [("0.5", half, 64), ("2:4", two_of_four, 4)])
def test_solver_equals_explicit_inverses(kind, decide, group):
    weight, gram = problem()
    ours = solve(weight, gram, kind)
    expected = brain_surgeon(weight, gram, group, decide)
    plain = brain_surgeon(weight, np.eye(64), group, decide)
    assert np.abs(ours - expected).max() <= 2e-3 < 0.1 < np.abs(ours - plain).max()
    error, expected_error, plain_error = (
        output_error(weight, new, gram) for new in (ours, expected, plain)
    )
    assert error == pytest.approx(expected_error, rel=1e-2) and error < 0.9 * plain_error


@pytest.mark.parametrize(("kind", "decide", "group"), [("0.5", half, 64), ("2:4", two_of_four, 4)])
def test_solver_of_several_blocks_equals_explicit_inverses(kind, decide, group, monkeypatch):
    """Blocks of 16 columns, the last one shorter; masks are decided inside a block."""
    monkeypatch.setattr(compress, "SOLVER_COLUMNS", 16)
    weight, gram = problem(width=56)
    ours = solve(weight, gram, kind)
    expected = brain_surgeon(weight, gram, min(group, 16), decide)
    assert np.abs(ours - expected).max() <= 2e-3
    monkeypatch.setattr(compress, "SOLVER_COLUMNS", 64)  # control: other blocks, other masks of 0.5
    other = np.abs(solve(weight, gram, kind) - expected).max()
    assert other > 0.1 if kind == "0.5" else other <= 2e-3


def rank_one(weight, gram, group, compared):
    """The solver without blocks: each column updates all columns right of it, in fp32."""
    factor = compress.inverse_factor(gram)
    diagonal = factor.diagonal()
    w = weight.clone()
    for j in range(w.shape[1]):
        if j % group == 0:
            costs = (w[:, j : j + group] / diagonal[j : j + group]) ** 2
            groups = costs.reshape(-1, compared or costs.numel())
            lowest = groups.argsort(dim=1, stable=True)[:, : groups.shape[1] // 2]
            mask = torch.ones_like(groups).scatter_(1, lowest, 0.0).view(costs.shape)
        new = w[:, j] * mask[:, j % group]
        w[:, j + 1 :] -= torch.outer((w[:, j] - new) / diagonal[j], factor[j, j + 1 :])
        w[:, j] = new
    return w


@pytest.mark.parametrize(("kind", "group", "compared"), [("0.5", 128, None), ("2:4", 4, 4)])
def test_blocks_equal_rank_one_updates(kind, group, compared):
    """576 columns are four blocks of 128 and a shorter one."""
    weight, gram = problem(rows=48, width=576)
    weight, gram = torch.from_numpy(weight).float(), torch.from_numpy(gram).float()
    expected = rank_one(weight, gram, group, compared)
    ours = compress.sparsegpt(weight, gram, compress.read_sparsity(kind))
    assert torch.equal(ours == 0, expected == 0) and (ours == 0).float().mean() == 0.5
    assert (ours - expected).norm() <= 5e-7 * expected.norm()
    alone = compress.sparsegpt(weight, torch.eye(576), compress.read_sparsity(kind))
    assert (alone - expected).norm() > 0.1 * expected.norm()  # control: nothing is made up for
