"""InfoNCE = a double loop over the batch's own texts."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import a_batch, scored, settings, some_rows, tangled_rows

import train


def pairs(texts, instructions, max_length):
    """Stands for a tokenizer: batch.tokens are (instruction, text) pairs."""
    return list(zip(instructions, texts, strict=True))


TEXTS = SimpleNamespace(tokenize=pairs)


def unit_vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1).requires_grad_()


def text_vectors(batch):
    """A vector for each text, equal for equal ones, so near that no softmax saturates."""
    near = 1 + 0.1 * unit_vectors(1 + len(batch.tokens)).detach()
    texts = [text for _, text in batch.tokens]
    first = [texts.index(text) for text in texts]
    return torch.nn.functional.normalize(near[first], dim=-1).requires_grad_()


def double_loop(e, batch, rows, s, shift=0):
    """InfoNCE written out over the batch's own texts.

    With `shift`, a control, false negatives are told by the positive of another row.
    """
    texts = [text for _, text in batch.tokens]
    columns = [[] for _ in rows]  # of each row: (text, embedding), the positive first
    place = len(rows)
    for row, mine in zip(rows, columns, strict=True):
        for _ in range(1 + min(len(row["neg"]), s.negatives)):
            mine.append((texts[place], e[place]))
            place += 1
    assert place == len(texts)
    total = 0
    for i, row in enumerate(rows):
        same = [other for other in rows if other["query"] == row["query"]]
        known = [row["query"], *(text for other in same for text in other["pos"])]
        terms = [torch.exp(e[i] @ columns[i][0][1] / s.temperature)]
        highest = e[i] @ columns[(i + shift) % len(rows)][0][1] + s.false_negatives
        for j in range(len(rows)):
            for k, (text, d) in enumerate(columns[j]):
                negative = (i, 0) != (j, k) and text not in known and (s.in_batch or i == j)
                if negative and e[i] @ d <= highest:
                    terms.append(torch.exp(e[i] @ d / s.temperature))
        total = total - torch.log(terms[0] / sum(terms))
    return total / len(rows)


@pytest.mark.parametrize("temperature", (0.02, 0.5))
@pytest.mark.parametrize("in_batch", (True, False))
@pytest.mark.parametrize("negatives", (0, 2, 7))
def test_info_nce_equals_a_double_loop(in_batch, negatives, temperature):
    s = settings(in_batch=in_batch, negatives=negatives, temperature=temperature)
    rows = tangled_rows(negatives)
    batch = a_batch(TEXTS, rows, s)
    assert batch.valid.shape == (7, 1 + negatives)
    assert batch.positive_ids.shape == (7, 4)
    e = text_vectors(batch)
    loss, accuracy = train.batch_loss(e, batch, s)
    expected = double_loop(e, batch, rows, s)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    assert 0 <= accuracy <= 1
    (ours,) = torch.autograd.grad(loss, e, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, e, retain_graph=True)
    assert (ours - theirs).norm() <= 1e-10 * max(theirs.norm(), 1e-3)
    if in_batch or negatives:
        assert theirs.norm() > 0.01
        blind = replace(batch, positive_ids=torch.zeros_like(batch.positive_ids))
        other = train.batch_loss(e, blind, s)[0].item()
        assert abs(other - loss.item()) > 1e-3  # control: duplicates count


def test_accuracy_by_hand():
    """The share of queries whose positive scores highest; a known positive above it is no error."""
    rows, s = some_rows(3, 1), settings(negatives=1)
    axes = torch.eye(9)
    e = axes[[0, 1, 2, 0, 5, 6, 1, 2, 7]]  # queries, then each row's positive and negative
    e[5] = (axes[1] + axes[6]) * 0.5**0.5  # row 1's positive is less like it than ...
    assert train.batch_loss(e, a_batch(TEXTS, rows, s), s)[1] == pytest.approx(2 / 3)
    rows[1]["neg"] = rows[1]["pos"]  # ... its negative
    assert train.batch_loss(e, a_batch(TEXTS, rows, s), s)[1] == 1


@pytest.mark.parametrize("margin", (0.0, 0.1, 0.3))
@pytest.mark.parametrize("in_batch", (True, False))
def test_false_negatives_equal_a_double_loop(in_batch, margin):
    """Hard negatives and those of other rows that are above the positive by more are left out."""
    rows, changes = tangled_rows(7), {"in_batch": in_batch, "negatives": 7, "temperature": 0.5}
    s = settings(false_negatives=margin, **changes)
    batch = a_batch(TEXTS, rows, s)
    e = unit_vectors(len(batch.tokens))
    loss, _ = train.batch_loss(e, batch, s)
    expected = double_loop(e, batch, rows, s)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (ours,) = torch.autograd.grad(loss, e, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, e)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
    # controls: it masks something, by this row's own positive
    everything = train.batch_loss(e, batch, settings(**changes))[0]
    assert everything > loss + 0.1
    assert abs(double_loop(e, batch, rows, s, shift=1) - loss) > 0.01


def test_false_negatives_are_off_by_default():
    """Bit for bit: the loss is the softmax over all columns that are not known positives."""
    rows, s = some_rows(5), settings(temperature=0.05)
    batch = a_batch(TEXTS, rows, s)
    e = unit_vectors(len(batch.tokens)).float()
    scores = e[:5] @ e[5:].T / s.temperature
    plain = torch.nn.functional.cross_entropy(scores, torch.arange(5) * 3)
    assert train.batch_loss(e, batch, s)[0] == plain
    on = settings(temperature=0.05, false_negatives=0.0)
    assert train.batch_loss(e, batch, on)[0] < plain  # control


def test_with_dims_the_loss_is_the_mean_over_prefixes():
    """Each prefix of unit length again, and the whole, once; accuracy is the whole's."""
    rows, plain = tangled_rows(2), settings(temperature=0.1, false_negatives=0.2)
    s = replace(plain, dims=[5, 2, 8, 5])
    batch = a_batch(TEXTS, rows, s)
    e = unit_vectors(len(batch.tokens))
    loss, accuracy = train.batch_loss(e, batch, s)
    prefixes = [e[:, :width] / e[:, :width].norm(dim=1, keepdim=True) for width in (2, 5)]
    losses = [double_loop(x, batch, rows, s) for x in (*prefixes, e)]
    expected = sum(losses) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (ours,) = torch.autograd.grad(loss, e, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, e)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
    whole, its_accuracy = train.batch_loss(e, batch, plain)
    assert accuracy == its_accuracy and whole == losses[2]
    accuracies = {train.batch_loss(x, batch, plain)[1].item() for x in prefixes}
    assert accuracies != {accuracy.item()}  # control: a prefix's would be another
    unnormed = [double_loop(e[:, :width], batch, rows, s) for width in (2, 5, 8)]
    assert abs(sum(unnormed) / 3 - loss) > 0.1  # control


def kd_by_hand(e, batch, rows, s, teacher_temperature):
    """KL(teacher || student) row by row; each document's score is found by its text."""
    texts = [text for _, text in batch.tokens]
    place, divergences = len(rows), []
    for i, row in enumerate(rows):
        count = 1 + min(len(row["neg"]), s.negatives)
        drawn = range(place, place + count)
        place += count
        scores = row.get("pos_scores", []) + row.get("neg_scores", [])
        if len(scores) < len(row["pos"] + row["neg"]):
            continue
        score_of = dict(zip(row["pos"] + row["neg"], scores, strict=True))
        teacher = [math.exp(score_of[texts[j]] / teacher_temperature) for j in drawn]
        student = [torch.exp(e[i] @ e[j] / s.temperature) for j in drawn]
        divergence = 0
        for t, u in zip(teacher, student, strict=True):
            p, q = t / sum(teacher), u / sum(student)
            divergence = divergence + p * (math.log(p) - torch.log(q))
        divergences.append(divergence)
    return sum(divergences) / len(divergences)


@pytest.mark.parametrize("temperature", (1.0, 0.5))
@pytest.mark.parametrize("dims", ([], [5]))
def test_kd_equals_a_double_loop(dims, temperature):
    """Of the drawn documents in their order, over the rows with all scores, short ones too."""
    rows = some_rows(9, 5)
    for row in rows[:3]:
        row["pos"].append("another positive")
    scored(rows)
    rows[2]["neg"], rows[2]["neg_scores"] = rows[2]["neg"][:1], rows[2]["neg_scores"][:1]
    rows[3]["neg"], rows[3]["neg_scores"] = [], []
    rows[5]["neg_scores"] = []  # has no scores
    changes = {"negatives": 3, "temperature": 0.5, "dims": dims}
    plain = settings(**changes)
    s = settings(kd=0.7, kd_temperature=temperature, **changes)
    batch = a_batch(TEXTS, rows, s)
    has = [row for row in batch.scores if row.isfinite().any()]
    assert len(has) == 5 and len(rows) == 9
    e = unit_vectors(len(batch.tokens))
    added = train.batch_loss(e, batch, s)[0] - train.batch_loss(e, batch, plain)[0]
    prefixes = [e[:, :width] / e[:, :width].norm(dim=1, keepdim=True) for width in dims]
    terms = [kd_by_hand(x, batch, rows, s, temperature) for x in (*prefixes, e)]
    expected = 0.7 * sum(terms) / len(terms)
    assert added.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,) = torch.autograd.grad(added, e, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, e)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm() and theirs.norm() > 0.01
    # controls: another order of the scores, another temperature
    turned = replace(batch, scores=batch.scores.roll(1, dims=1))
    other = train.batch_loss(e, turned, s)[0] - train.batch_loss(e, batch, plain)[0]
    assert abs(other - added) > 0.01
    assert abs(kd_by_hand(e, batch, rows, s, 2 * temperature) - terms[-1]) > 0.01


def test_kd_is_off_by_default_and_rows_without_scores_do_not_count():
    s = settings(temperature=0.5)
    bare, rows = some_rows(4), scored(some_rows(4))
    batch, with_scores = a_batch(TEXTS, bare, s), a_batch(TEXTS, rows, s)
    e = unit_vectors(len(batch.tokens))
    loss = train.batch_loss(e, batch, s)[0]
    assert train.batch_loss(e, with_scores, s)[0] == loss  # bit for bit
    on = replace(s, kd=1.0)
    assert train.batch_loss(e, batch, on)[0] == loss  # no row has scores
    assert train.batch_loss(e, with_scores, on)[0] > loss + 0.1


def test_other_rows_are_negatives_only_in_batch():
    rows = some_rows(5)
    on = settings(in_batch=True, temperature=0.5)
    off = settings(in_batch=False, temperature=0.5)
    batch = a_batch(TEXTS, rows, on)
    e = unit_vectors(len(batch.tokens))
    assert train.batch_loss(e, batch, on)[0] > train.batch_loss(e, batch, off)[0] + 0.5
    alone = settings(in_batch=False, negatives=0)
    assert train.batch_loss(e[:10], a_batch(TEXTS, rows, alone), alone)[0] == 0


@pytest.mark.parametrize("in_batch", (True, False))
def test_short_negatives_are_masked_not_repeated(in_batch):
    rows, s = some_rows(4, 1), settings(in_batch=in_batch, temperature=0.5)
    one = a_batch(TEXTS, rows, settings(negatives=1))
    seven = a_batch(TEXTS, rows, settings(negatives=7))
    e = unit_vectors(12)
    losses = [train.batch_loss(e, batch, s)[0].item() for batch in (one, seven)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)
    assert seven.valid.sum() == 8
    repeated = [row | {"neg": row["neg"] * 7} for row in rows]  # control
    batch = a_batch(TEXTS, repeated, settings(negatives=7))
    copies = [e[:4]]
    for i in range(4):
        copies.append(torch.stack([e[4 + 2 * i], *[e[5 + 2 * i]] * 7]))
    assert train.batch_loss(torch.cat(copies), batch, s)[0].item() > losses[0] + 0.5


def test_one_positive_and_the_negatives_are_drawn():
    row, s = some_rows(1, 6)[0], settings(negatives=2)
    texts = [text for _, text in a_batch(TEXTS, [row] * 8, s).tokens[8:]]
    drawn = [set(texts[3 * i + 1 : 3 * i + 3]) for i in range(8)]
    for negatives in drawn:
        assert len(negatives) == 2
        assert negatives <= set(row["neg"])
    assert set.union(*drawn) == set(row["neg"])
    row["pos"] += ["a second positive", "a third positive"]
    positives = {text for _, text in a_batch(TEXTS, [row] * 16, s).tokens[16::3]}
    assert positives == set(row["pos"])
