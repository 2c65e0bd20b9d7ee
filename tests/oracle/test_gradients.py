"""How it learns: loss, cached gradients, sampler, optimizer, checkpoints, stages, bad input; with controls
that fail.

Commands run in this process, except where one is killed. Rows hold random words that a tiny random base can
embed."""

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import nvembed
import peft
import pytest
import references
import torch
import train
import transformers
from conftest import ROOT
from nvembed import InputError, NVEmbed
from safetensors.torch import load_file, save_file

from data.prepare import write_rows

WORDS = "river stone engine paper window garden winter music doctor bread island letter".split()
KILLS = int(os.environ.get("NVEMBED_TEST_KILLS", 3))
FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")


def some_rows(n, negatives=2, seed=0):
    rng = random.Random(seed)

    def text(words):
        return " ".join(rng.choices(WORDS, k=words))

    def row(i):
        negative = [text(5) for _ in range(negatives)]
        return {"query": f"{text(3)} {i}", "pos": [f"{text(6)} {i}"], "neg": negative}

    return [row(i) for i in range(n)]


def settings(**changes):
    small = {"steps": 10, "batch": 4, "negatives": 2, "lr": 1e-2, "warmup": 2, "max_length": 48}
    small |= {"micro_tokens": 64, "lora_rank": 4, "dtype": "float32", "export_dtype": "float32"}
    small |= {"held_out": 4, "save_every": 2, "eval_every": 5}
    return train.Settings(**(small | changes))


def a_batch(model, rows, s, symmetric=False):
    data = train.Dataset("set", "Find it", symmetric, rows, [])
    with_rng = [(data, row, np.random.default_rng(i)) for i, row in enumerate(rows)]
    return train.make_batch(model, with_rng, s, train.known_positives([data]))


def trainable(base, s, dtype=torch.float32):
    """A model to train whose LoRA B is random, so that no gradient is zero."""
    model, _ = train.build(base, s, "cpu")
    with torch.no_grad():
        for layer in nvembed.lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    model.dtype = dtype
    return model.to(dtype).train()


# ------------------------------------------------------------------------------------------------------- loss

TEXTS = SimpleNamespace(tokenize=lambda texts, tasks, max_length: [*zip(tasks, texts, strict=True)])


def unit_vectors(count, seed=0):
    x = torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1).requires_grad_()


def text_vectors(batch):
    """A vector for each text, equal for equal ones, so near each other that no softmax saturates."""
    near = 1 + 0.1 * unit_vectors(1 + len(batch.tokens)).detach()
    first = [[text for _, text in batch.tokens].index(text) for _, text in batch.tokens]
    return torch.nn.functional.normalize(near[first], dim=-1).requires_grad_()


def double_loop(e, batch, rows, s):
    """InfoNCE written out over the batch's own texts: batch.tokens are (instruction, text) pairs."""
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
        positives = [text for other in rows if other["query"] == row["query"] for text in other["pos"]]
        terms = [torch.exp(e[i] @ columns[i][0][1] / s.temperature)]
        for j in range(len(rows)):
            for k, (text, d) in enumerate(columns[j]):
                if (i, 0) != (j, k) and text not in positives and (s.in_batch or i == j):
                    terms.append(torch.exp(e[i] @ d / s.temperature))
        total = total - torch.log(terms[0] / sum(terms))
    return total / len(rows)


def tangled_rows(negatives):
    rows = some_rows(7, negatives)
    rows[1]["pos"] = rows[0]["pos"]  # another row's positive is this query's too
    rows[3]["query"] = rows[2]["query"]  # the same query with another positive
    rows[4]["pos"] += ["a second positive", "a third positive"]
    if negatives:
        rows[5]["neg"][0] = rows[5]["pos"][0]  # the positive among its own hard negatives
        rows[6]["neg"][-1] = rows[0]["pos"][0]  # and among another row's
        rows[0]["neg"][0] = "a second positive"  # one that was perhaps not drawn is still known
        rows[2]["neg"] = rows[2]["neg"][:1]  # a short list
    return rows


@pytest.mark.parametrize("temperature", (0.02, 0.5))
@pytest.mark.parametrize("in_batch", (True, False))
@pytest.mark.parametrize("negatives", (0, 2, 7))
def test_info_nce_equals_a_double_loop(in_batch, negatives, temperature):
    s = settings(in_batch=in_batch, negatives=negatives, temperature=temperature)
    rows = tangled_rows(negatives)
    batch = a_batch(TEXTS, rows, s)
    assert batch.valid.shape == (7, 1 + negatives) and batch.positive_ids.shape == (7, 3)
    e = text_vectors(batch)
    loss, accuracy = train.batch_loss(e, batch, s)
    expected = double_loop(e, batch, rows, s)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12) and 0 <= accuracy <= 1
    (ours,), (theirs,) = (torch.autograd.grad(value, e, retain_graph=True) for value in (loss, expected))
    assert (ours - theirs).norm() <= 1e-10 * max(theirs.norm(), 1e-3)
    if in_batch or negatives:
        assert theirs.norm() > 0.01
        blind = batch._replace(positive_ids=torch.zeros_like(batch.positive_ids))
        assert abs(train.batch_loss(e, blind, s)[0].item() - loss.item()) > 1e-3  # control: duplicates count


def test_other_rows_are_negatives_only_in_batch():
    rows = some_rows(5)
    on, off = (settings(in_batch=value, temperature=0.5) for value in (True, False))
    batch = a_batch(TEXTS, rows, on)
    e = unit_vectors(len(batch.tokens))
    assert train.batch_loss(e, batch, on)[0] > train.batch_loss(e, batch, off)[0] + 0.5
    no_negatives = settings(in_batch=False, negatives=0)
    assert train.batch_loss(e[:10], a_batch(TEXTS, rows, no_negatives), no_negatives)[0] == 0


@pytest.mark.parametrize("in_batch", (True, False))
def test_short_negatives_are_masked_not_repeated(in_batch):
    rows, s = some_rows(4, 1), settings(in_batch=in_batch, temperature=0.5)
    one, seven = (a_batch(TEXTS, rows, settings(negatives=n)) for n in (1, 7))
    e = unit_vectors(12)
    losses = [train.batch_loss(e, batch, s)[0].item() for batch in (one, seven)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-14) and seven.valid.sum() == 8
    repeated = [row | {"neg": row["neg"] * 7} for row in rows]  # control
    batch = a_batch(TEXTS, repeated, settings(negatives=7))
    copies = torch.cat([e[:4], *(torch.stack([e[4 + 2 * i], *[e[5 + 2 * i]] * 7]) for i in range(4))])
    assert train.batch_loss(copies, batch, s)[0].item() > losses[0] + 0.5


def test_one_positive_and_the_negatives_are_drawn():
    row, s = some_rows(1, 6)[0], settings(negatives=2)
    drawn = [
        {text for _, text in a_batch(TEXTS, [row] * 8, s).tokens[8:][3 * i + 1 : 3 * i + 3]} for i in range(8)
    ]
    assert all(len(texts) == 2 and texts <= set(row["neg"]) for texts in drawn)
    assert set.union(*drawn) == set(row["neg"])
    row["pos"] += ["a second positive", "a third positive"]
    positives = {text for _, text in a_batch(TEXTS, [row] * 16, s).tokens[16::3]}
    assert positives == set(row["pos"])


def test_instruction_goes_where_it_belongs(base):
    model, s, rows = NVEmbed.from_pretrained(base), settings(), some_rows(2, 1)
    rows[1]["prompt"] = "Other"  # of the row, instead of the data set's
    tasks = ("Find it", "Other")

    def tokens(instructed):
        pairs = zip(rows, tasks, strict=True)
        texts = [(task, text) for row, task in pairs for text in row["pos"] + row["neg"]]
        return [model.tokenize([text], task if instructed else "", s.max_length)[0] for task, text in texts]

    queries = [model.tokenize([r["query"]], task)[0] for r, task in zip(rows, tasks, strict=True)]
    assert tokens(True) != tokens(False) and queries[0].ids[: queries[0].masked] != queries[1].ids
    assert a_batch(model, rows, s).tokens == queries + tokens(False)
    assert a_batch(model, rows, s, symmetric=True).tokens == queries + tokens(True)


# --------------------------------------------------------------------------------------------------- gradient


def gradients(model, batch, s, **how):
    """-> (loss, gradient by name), with the same random numbers at every call."""
    torch.manual_seed(3)
    model.zero_grad()
    out = train.backward(model, batch.tokens, lambda e: train.batch_loss(e, batch, s), s.micro_tokens, **how)
    return out[0].item(), {name: p.grad.clone() for name, p in train.trained(model).items()}


def worst(one, other):
    """Largest relative error of a gradient, |difference| / |gradient|; none of them may be zero."""
    assert one.keys() == other.keys() and all(g.norm() > 0 for g in one.values())
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def test_cached_gradient_equals_plain_with_dropout(base, monkeypatch):
    s = settings(temperature=0.2)
    model = trainable(base, s, torch.float64)
    batch = a_batch(model, tangled_rows(2), s)
    assert len(nvembed.pack(batch.tokens, s.micro_tokens)) > 3
    (plain_loss, plain), (loss, cached) = (gradients(model, batch, s, cached=c) for c in (False, True))
    assert loss == pytest.approx(plain_loss, rel=1e-12) and worst(plain, cached) <= 1e-10
    monkeypatch.setattr(train, "reseed", lambda *key: None)
    assert worst(plain, gradients(model, batch, s)[1]) > 1e-3  # control: other dropout in the second run


def test_micro_batches_do_not_change_the_batch(base):
    """In-batch negatives are those of the whole batch however it is split; dropout 0, since masks follow the
    split."""
    s, rows = settings(temperature=0.2, lora_dropout=0.0), some_rows(6)
    model = trainable(base, s, torch.float64)
    batch = a_batch(model, rows, s)
    whole_loss, whole = gradients(model, batch, settings(temperature=0.2, micro_tokens=10**6))
    for micro_tokens in (44, 64, 200):
        split = settings(temperature=0.2, micro_tokens=micro_tokens)
        assert len(nvembed.pack(batch.tokens, micro_tokens)) > 1
        loss, gradient = gradients(model, batch, split)
        assert loss == pytest.approx(whole_loss, rel=1e-12) and worst(whole, gradient) <= 1e-10
    halves = [a_batch(model, half, s) for half in (rows[:3], rows[3:])]
    plain = [gradients(model, half, s) for half in halves]  # control: accumulation sees half the negatives
    assert sum(loss for loss, _ in plain) / 2 < whole_loss - 0.1
    assert worst(whole, {name: (plain[0][1][name] + plain[1][1][name]) / 2 for name in whole}) > 1e-2


def test_compiled_gradient_is_the_eager_one(base):
    """With dropout, whose masks are drawn outside of what is compiled; cached and not."""
    s = settings(temperature=0.2)
    batch = a_batch(NVEmbed.from_pretrained(base), tangled_rows(2), s)
    found = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = trainable(base, settings(temperature=0.2, compile=compiled))
        found += [gradients(model, batch, s, cached=cached)[1] for cached in (True, False)]
        ran = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert ran == compiled  # control: it was compiled
    assert max(worst(found[0], other) for other in found[1:]) <= 1e-4


@pytest.mark.parametrize("micro_tokens", (10**6, 64))
def test_one_micro_batch_needs_no_cache(base, micro_tokens):
    s = settings(micro_tokens=micro_tokens)
    model, calls = trainable(base, s), []
    model.register_forward_hook(lambda *_: calls.append(1))
    batch = a_batch(model, some_rows(6), s)
    gradients(model, batch, s)
    parts = len(nvembed.pack(batch.tokens, micro_tokens))
    assert len(calls) == (1 if parts == 1 else 2 * parts) and (parts == 1) == (micro_tokens == 10**6)


# --------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("batch", (4, 5))  # 5 does not divide the 21 rows: batches cross epochs
def test_blended_schedule_visits_each_row_once_an_epoch(batch):
    s, sizes = settings(batch=batch), [7, 3, 11]
    every = [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    seen = [row for step in range(21) for row in train.schedule(sizes, s, step)]  # `batch` epochs
    orders = [[(d, i) for e, d, i in seen if e == epoch] for epoch in range(batch)]
    assert all(sorted(order) == every for order in orders) and len(seen) == 21 * batch
    assert all(order != orders[0] for order in orders[1:]) and orders[0] != every
    assert [e for e, _, _ in seen] == sorted(e for e, _, _ in seen)
    train.epoch_order.cache_clear()
    assert (
        train.schedule(sizes, s, 5) == seen[5 * batch : 6 * batch]
    )  # of the step alone, not of earlier calls
    assert train.schedule(sizes, settings(batch=batch, seed=1), 5) != seen[5 * batch : 6 * batch]


def test_task_batches_are_of_one_set():
    sizes, s = [7, 3, 11], settings(batch=3, batching="task")
    batches = [train.schedule(sizes, s, step) for step in range(24)]  # 2 + 1 + 3 batches an epoch
    assert all(len({d for _, d, _ in batch}) == 1 and len(set(batch)) == 3 for batch in batches)
    for epoch in range(4):
        sets = [batch[0][1] for batch in batches if batch[0][0] == epoch]
        assert sorted(sets) == [0, 0, 1, 2, 2, 2]
    assert {(d, i) for batch in batches for _, d, i in batch} == {
        (d, i) for d in range(3) for i in range(sizes[d])
    }
    blended = [train.schedule(sizes, settings(batch=3), step) for step in range(24)]
    assert any(len({d for _, d, _ in batch}) > 1 for batch in blended)  # control


def test_held_out_rows_and_samples(tmp_path):
    rows, s = some_rows(50), settings()
    write_rows(tmp_path / "rows.jsonl", rows)
    entry = {"name": "rows", "file": str(tmp_path / "rows.jsonl"), "instruction": "", "stages": [1]}
    (all_of_it,) = train.read_datasets([entry], 1, s)
    (capped,) = train.read_datasets([entry | {"samples": 7}], 1, s)
    kept, held = ([row["query"] for row in part] for part in (all_of_it.rows, all_of_it.held_out))
    assert len(kept) == 46 and len(held) == 4 and sorted(kept + held) == sorted(row["query"] for row in rows)
    assert len(capped.rows) == 7 and capped.held_out == all_of_it.held_out
    assert all(row in all_of_it.rows for row in capped.rows)
    (again,), (other,) = (train.read_datasets([entry], 1, settings(seed=seed)) for seed in (0, 1))
    assert again == all_of_it and other.held_out != all_of_it.held_out
    (small,) = train.read_datasets([entry], 1, settings(held_out=64))
    assert len(small.held_out) == 5  # at most a tenth
    with pytest.raises(InputError, match="expected a data set of stage 2"):
        train.read_datasets([entry], 2, s)


# -------------------------------------------------------------------------------------------------- optimizer


def test_learning_rate():
    rates = [train.learning_rate(settings(steps=10, warmup=4, lr=2.0), i) / 2 for i in range(10)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [train.learning_rate(settings(steps=2, warmup=0), i) for i in (0, 1)] == pytest.approx(
        [1e-2, 5e-3]
    )
    assert train.learning_rate(settings(steps=2, warmup=500), 1) == pytest.approx(1e-2 * 2 / 500)


def test_what_is_trained(base):
    s = settings()
    model = trainable(base, s)
    names, layers, c = set(train.trained(model)), model.embedding_model.layers, model.config
    assert sum(".lora_" in name for name in names) == 2 * 7 * len(layers) == len(names) - 14
    assert sum(name.startswith("latent_attention_model.") for name in names) == 14
    d, f, kv = c.hidden_size, c.intermediate_size, c.head_dim * c.num_key_value_heads
    lora = 4 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f)) * len(layers)
    pooling = sum(p.numel() for p in model.latent_attention_model.parameters())
    assert sum(p.numel() for p in train.trained(model).values()) == lora + pooling
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(train.trained(model).values(), lr=0.1, fused=True)
    train.train_step(model, optimizer, a_batch(model, some_rows(4), s), s, 1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names and len(before) > len(names)  # the base, bit for bit, is not
    assert "latent_attention_model.latents" in moved
    assert "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight" in moved


def test_first_step_is_adamw_by_hand(recipe, base, tmp_path):
    """p (1 - lr decay) - lr m / (sqrt(v) + 1e-8) of a clipped gradient, whose moments are in the
    checkpoint."""
    flags = ("--steps", 1, "--warmup", 0, "--weight-decay", 0.5, "--clip", 1e-3)
    assert command(recipe, "--out", tmp_path / "run", *flags)[0] == 0
    assert command(recipe, "--out", tmp_path / "free", *flags[:-1], 1e9)[0] == 0  # control: no clipping
    s, stored = settings(weight_decay=0.5), load_file(train.checkpoint(tmp_path / "run") / FILES[0])
    start = {name: p.detach() for name, p in train.trained(train.build(base, s, "cpu")[0]).items()}
    optimizer = load_file(train.checkpoint(tmp_path / "run") / FILES[1])
    for name, p in start.items():
        m, v = optimizer[f"{name}.exp_avg"] / (1 - 0.9), optimizer[f"{name}.exp_avg_sq"] / (1 - 0.999)
        step = s.lr * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(stored[name], p * (1 - s.lr * 0.5) - step, rtol=1e-5, atol=1e-6)
        assert p.norm() == 0 or not torch.allclose(stored[name], p - step, rtol=1e-5, atol=1e-6)  # no decay
    norms = {}
    for name in ("run", "free"):
        found = load_file(train.checkpoint(tmp_path / name) / FILES[1])
        norms[name] = (
            sum(float(t.norm()) ** 2 for n, t in found.items() if n.endswith("exp_avg")) ** 0.5 / 0.1
        )
    logged = [log(tmp_path / name)[-1]["grad_norm"] for name in norms]
    assert norms["run"] == pytest.approx(1e-3, rel=1e-3) and logged[0] == logged[1] > 0.01
    assert norms["free"] == pytest.approx(logged[1], rel=1e-4)


# --------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("recipe")
    write_rows(folder / "rows.jsonl", some_rows(40))
    entry = {"name": "rows", "file": "rows.jsonl", "kind": "retrieval", "instruction": "Find it"}
    stage = {k: v for k, v in vars(settings()).items() if v != getattr(train.Settings(), k)}
    found = {"base": str(base), "seed": 0, "datasets": [entry | {"stages": [1, 2]}]}
    path = folder / "recipe.json"
    path.write_text(json.dumps(found | {"stages": {"1": stage, "2": stage | {"in_batch": False}}}))
    return path


def command(recipe, *flags):
    """train.py in this process -> (exit status, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["train.py", "--recipe", str(recipe), *map(str, flags)])
        try:
            nvembed.run(train.main)
        except SystemExit as error:
            code = error.code
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def told(result):
    """The one line of an error; what a load tells of fresh and dropped tensors may stand before it."""
    code, _, err = result
    lines = [line for line in err.splitlines() if "fresh:" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:]]


def learned(run):
    """What two equal runs share, bit for bit: weights, optimizer state, figures of every step."""
    tensors = [load_file(train.checkpoint(run) / name) for name in FILES[:2]]
    tensors = {name: tensor.numpy().tobytes() for part in tensors for name, tensor in part.items()}
    names = ("step", "loss", "accuracy", "lr", "grad_norm", "held_out_loss")
    return tensors, [[line.get(name) for name in names] for line in log(run)]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A finished run of 10 steps, never stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = command(recipe, "--out", run)
    assert code == 0, err
    assert "global batch 4 = 1 rank x 4 rows, micro-batches of at most 64 tokens" in out
    return run


def test_kept_models(recipe, whole, tmp_path):
    """--keep: a model for each checkpoint; the last one is the run's own, rounded as its base, the first another."""
    run, fast = (
        tmp_path / "run",
        ("--save-every", "5", "--keep", "--dtype", "float32", "--export-dtype", "float32"),
    )
    assert command(recipe, *fast, "--out", run)[0] == 0
    models = [NVEmbed.from_pretrained(run / name) for name in ("kept_000005", "kept_000010", ".")]
    early, late, final = (model.encode(["the sun", "rises"]) for model in models)
    assert abs(late - final).max() <= 1e-6 and abs(early - final).max() > 1e-3


def test_log(whole):
    head, lines = json.loads((whole / "log.jsonl").read_text().splitlines()[0]), log(whole)
    assert {"versions", "hardware", "commit", "settings"} <= head.keys() and head["settings"]["steps"] == 10
    assert [line["step"] for line in lines] == list(range(11))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 5, 10]
    assert lines[10]["held_out_loss"] < lines[0]["held_out_loss"]  # it learns
    figures = {
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "share_of_peak",
        "memory_gib",
        "seconds_left",
    }
    assert all(figures <= line.keys() for line in lines[1:])
    assert all(0 < line["share_of_peak"] < 1.5 and line["memory_gib"] > 0.01 for line in lines[1:])


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """The same run after SIGTERM during step 5."""
    run, write_log = tmp_path_factory.mktemp("runs") / "stopped", train.write_log

    def signalled(log, record):
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        write_log(log, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_log", signalled)
        code, out, err = command(recipe, "--out", run)
    assert code == 0 and "stopped after step 5" in out, err
    assert train.checkpoint(run).name == "step_000005" and not (run / "config.json").exists()
    return run


def test_ten_steps_are_five_and_five(recipe, whole, stopped, tmp_path):
    again, control = (shutil.copytree(stopped, tmp_path / name) for name in ("again", "control"))
    code, _, err = command(recipe, "--out", again)
    assert code == 0, err
    assert learned(again) == learned(whole)
    with pytest.MonkeyPatch.context() as patch:  # control: it goes on with other random numbers
        true_reseed = train.reseed
        patch.setattr(train, "reseed", lambda *key: true_reseed(9, *key))
        assert command(recipe, "--out", control)[0] == 0
    ours, theirs = learned(control), learned(whole)
    assert all(ours[0][name] != theirs[0][name] for name in theirs[0] if not name.endswith(".step"))
    assert ours[1][:6] == theirs[1][:6] and all(
        a != b for a, b in zip(ours[1][6:], theirs[1][6:], strict=True)
    )


def test_resume_is_exact_when_compiled(recipe, whole, tmp_path):
    """4 steps are 2 and 2 there too; what is compiled is not what is eager, bit for bit."""
    runs, write_log = [tmp_path / "whole", tmp_path / "halves"], train.write_log
    fast = ("--compile", "--steps", "4", "--out")

    def signalled(log, record):
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write_log(log, record)

    assert command(recipe, *fast, runs[0])[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_log", signalled)
        assert "stopped after step 2" in command(recipe, *fast, runs[1])[1]
    assert command(recipe, *fast, runs[1])[0] == 0
    assert learned(runs[0]) == learned(runs[1])
    losses, eager = ([line["loss"] for line in log(run)[1:5]] for run in (runs[0], whole))
    assert (
        losses == pytest.approx(eager, rel=2e-2) and losses != eager
    )  # control: another schedule of lr, other sums


@pytest.mark.parametrize("kill", range(KILLS))
def test_resume_is_exact_after_sigkill(recipe, whole, tmp_path, kill):
    """Killed at a random moment, then finished: bit for bit the run that was never stopped."""
    run, rng, saving = tmp_path / "run", random.Random(kill), ("--save-every", 2)
    line = [sys.executable, ROOT / "train.py", "--recipe", recipe, "--out", run, *saving]
    process = subprocess.Popen(list(map(str, line)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = rng.randint(1, 11)  # of its log: one that says what it is, then steps 0 to 9
    while process.poll() is None and not (
        (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) > lines
    ):
        time.sleep(0.002)
    time.sleep(rng.random() * 0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    if (run / "latest").exists():  # whole, whatever was being written
        folder = train.checkpoint(run)
        assert all(load_file(folder / name) for name in FILES[:2])
        assert folder.name == f"step_{json.loads((folder / FILES[2]).read_text())['step']:06d}"
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert learned(run) == learned(whole)
    assert [path.name for path in sorted(run.glob("*step_*"))] == ["step_000010"]  # nothing is left behind


def test_half_a_log_line_does_not_stop_a_resume(recipe, whole, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    code, _, err = command(recipe, "--out", run)
    assert code == 0, err
    assert learned(run) == learned(whole)


def test_finished_runs_and_changed_settings(recipe, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, out, err = command(recipe, "--out", run)
    assert code == 0 and "finished already" in out, err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    for flag, value, message in (
        ("--lr", 0.5, "lr = 0.01, now 0.5"),
        ("--lora-dropout", 0.2, "lora_dropout = 0.1, now 0.2"),
        ("--steps", 11, "steps = 10, now 11"),
    ):
        assert message in told(command(recipe, "--out", run, flag, value))
    code, out, err = command(recipe, "--out", run, "--restart", "--steps", 1)
    assert code == 0 and [line["step"] for line in log(run)] == [0, 1], err


def test_a_run_does_not_go_on_from_another_base(recipe, base, stopped, tmp_path):
    run, other = shutil.copytree(stopped, tmp_path / "run"), shutil.copytree(base, tmp_path / "other")
    assert str(other) in told(command(recipe, "--out", run, "--init", other))


@pytest.mark.parametrize("name", FILES)
def test_truncated_checkpoint(recipe, stopped, tmp_path, name):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = train.checkpoint(run) / name
    path.write_bytes(path.read_bytes()[:-100])
    assert name in told(command(recipe, "--out", run))


def test_checkpoint_of_another_shape(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = train.checkpoint(run) / FILES[1]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3)}, path)
    assert FILES[1] in (line := told(command(recipe, "--out", run))) and name in line


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def kill_points(save, template, state, targets):
    """Kills save(...) of step 2 before each of its operations on files -> the moments at which no whole
    checkpoint could be loaded, and the number of moments."""
    lost, moment, finished = [], 0, False
    while not finished:
        run = shutil.copytree(template, template.parent / f"{save.__name__}{moment}")
        left = [moment]

        def mortal(function, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((train, "save_file"), (os, "fsync"), (shutil, "rmtree")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            for name in ("mkdir", "write_text", "rename"):
                patch.setattr(Path, name, mortal(getattr(Path, name)))
            with contextlib.suppress(Killed):
                save(run, 2, *state, {"step": 2})
                finished = True
        try:
            stored = load_file(train.checkpoint(run) / FILES[0]), load_file(train.checkpoint(run) / FILES[1])
            step = json.loads((train.checkpoint(run) / FILES[2]).read_text())["step"]
            assert sum(map(len, stored)) == targets and train.checkpoint(run).name == f"step_{step:06d}"
        except (OSError, AssertionError):
            lost.append(moment)
        moment += 1
        train.save_checkpoint(run, 2, *state, {"step": 2})  # what comes after a resume
        assert sorted(path.name for path in run.iterdir()) == ["latest", "step_000002"]
    return lost, moment


def test_killed_while_saving(tmp_path):
    model = torch.nn.Linear(2, 2)
    state = model, torch.optim.AdamW(model.parameters())
    (tmp_path / "run").mkdir()
    train.save_checkpoint(tmp_path / "run", 1, *state, {"step": 1})
    lost, moments = kill_points(train.save_checkpoint, tmp_path / "run", state, 2 + 6)
    assert lost == [] and moments > 15

    def hasty(run, step, *rest):  # control
        (run / "latest").write_text(f"step_{step:06d}\n")
        train.save_checkpoint(run, step, *rest)

    assert len(kill_points(hasty, tmp_path / "run", state, 2 + 6)[0]) > 5


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_disk_full_keeps_the_last_checkpoint(recipe, stopped, whole, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    before = learned(run)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_file", full)
        line = told(command(recipe, "--out", run))
    assert "No space left on device" in line and f"last good checkpoint: {run / 'step_000005'}" in line
    assert learned(run)[0] == before and [path.name for path in run.glob("*step_*")] == ["step_000005"]
    assert command(recipe, "--out", run)[0] == 0 and learned(run) == learned(whole)


@pytest.fixture
def unexported(whole, tmp_path):
    """A run whose last checkpoint is written, and not yet the finished model."""
    return shutil.copytree(
        whole, tmp_path / "run", ignore=lambda _, names: {"adapter", "config.json"} & {*names}
    )


def test_disk_full_at_the_export(recipe, unexported, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nvembed, "save_torch_state_dict", full)
        assert "No space left on device" in told(command(recipe, "--out", unexported))
    assert command(recipe, "--out", unexported)[0] == 0 and (unexported / "config.json").exists()


def test_killed_while_exporting(recipe, unexported, monkeypatch):
    """A run counts as finished only when everything of it is written."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(nvembed, "save_adapter", killed)
        command(recipe, "--out", unexported)
    assert command(recipe, "--out", unexported)[0] == 0
    assert (unexported / "adapter" / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------------------------- stages and finished runs


def test_another_rank_goes_on_from_the_merged_model(whole, base):
    """The same rank: own adapters on the base. Full fine-tuning or another rank: the run's merged weights."""
    texts, same = ["river stone", "a letter from the island"], settings().lora_rank
    expected = NVEmbed.from_pretrained(whole, dtype=torch.float32).encode(texts)
    for lora_rank, start in ((same, base), (0, whole), (same + 1, whole)):
        model, found = train.build(whole, settings(lora_rank=lora_rank), "cpu")
        assert found == str(start)
        np.testing.assert_allclose(model.eval().encode(texts), expected, atol=1e-6)
        full = "embedding_model.layers.0.self_attn.q_proj.weight" in train.trained(model)
        assert full == (lora_rank == 0)
    assert np.abs(NVEmbed.from_pretrained(base, dtype=torch.float32).encode(texts) - expected).max() > 1e-3


def test_stage_two_goes_on_with_stage_one(recipe, whole, base, tmp_path, monkeypatch):
    stored = load_file(train.checkpoint(whole) / FILES[0])
    model, name = train.build(whole, settings(), "cpu")
    ours = {n: p.detach() for n, p in train.trained(model).items()}
    assert (
        ours.keys() == stored.keys()
        and all(torch.equal(ours[n], stored[n]) for n in ours)
        and name == str(base)
    )
    fresh = {n: p.detach() for n, p in train.trained(train.build(base, settings(), "cpu")[0]).items()}
    assert not any(torch.equal(ours[n], fresh[n]) for n in ours)  # control
    two = tmp_path / "two"
    code, _, err = command(recipe, "--stage", 2, "--init", whole, "--out", two, "--steps", 2, "--in-batch")
    assert code == 0, err
    assert log(two)[0]["held_out_loss"] == log(whole)[-1]["held_out_loss"]  # before its first step
    optimizer = load_file(train.checkpoint(two) / FILES[1])
    assert {float(t) for n, t in optimizer.items() if n.endswith(".step")} == {2.0}  # begun anew
    assert json.loads((train.checkpoint(two) / FILES[2]).read_text())["base"] == str(base)
    line = told(
        command(recipe, "--stage", 2, "--init", whole, "--out", tmp_path / "odd", "--pooling", "mean")
    )
    assert "latent_attention_model" in line and "missing or of another shape" in line
    monkeypatch.chdir(tmp_path)
    assert "runs/stage1: no finished run; run --stage 1 first" in told(command(recipe, "--stage", 2))
    assert not (tmp_path / "runs").exists()


def test_stages_by_their_default_folders(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in (1, 2):
        code, _, err = command(recipe, "--stage", stage, "--steps", 1)
        assert code == 0 and (tmp_path / "runs" / f"stage{stage}" / "config.json").exists(), err
    heads = [
        json.loads(Path(f"runs/stage{n}/log.jsonl").read_text().splitlines()[0])["settings"] for n in (1, 2)
    ]
    assert [head["in_batch"] for head in heads] == [True, False]


def test_finished_run_loads(whole, base):
    texts = ["a river", "the doctor's letter", "music of the winter"]
    model = train.build(whole, settings(), "cpu")[0].eval()
    adapted, plain = (one.encode(texts, "Find it") for one in (model, NVEmbed.from_pretrained(base)))
    loaded = NVEmbed.from_pretrained(whole).encode(texts, "Find it")
    assert (loaded * adapted).sum(axis=1).min() >= 0.9999 > (plain * adapted).sum(axis=1).max()
    theirs = transformers.AutoModel.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    ids = [t.ids for t in model.tokenize(texts)]
    untrained = references.hf_states(theirs, ids, causal=False)
    states = references.hf_states(
        peft.PeftModel.from_pretrained(theirs, whole / "adapter").eval(), ids, causal=False
    )
    with torch.no_grad():
        for text, found, before in zip(ids, states, untrained, strict=True):
            ours = model.embedding_model(torch.tensor(text), (len(text),), torch.float32)
            assert (found[: len(text)] - ours).abs().max() <= 1e-4 < (before[: len(text)] - ours).abs().max()


def test_export_tells_the_cosine(recipe, unexported, tmp_path):
    code, out, err = command(recipe, "--out", unexported)
    assert code == 0 and float(out.split("lowest ")[1].split()[0]) >= 0.9999, err
    code, out, _ = command(recipe, "--out", tmp_path / "half", "--steps", 1, "--export-dtype", "bfloat16")
    assert code == 0 and 0.999 <= float(out.split("lowest ")[1].split()[0]) < 1  # control: rounding shows
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_own_rows_from_a_released_model(recipe, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my.jsonl.gz", [row | {"prompt": "Mine"} for row in some_rows(20, 1)])
    flags = ("--data", "my.jsonl.gz", "--init", released, "--steps", 2)
    code, _, err = command(recipe, *flags)
    assert code == 0, err
    run = tmp_path / "runs" / "my"
    assert NVEmbed.from_pretrained(run).encode(["a river"]).shape == (1, 64)
    start = references.read_released(released)["latent_attention_model.latents"]
    stored = load_file(train.checkpoint(run) / FILES[0])["latent_attention_model.latents"]
    assert 0 < (stored - start).norm() < 0.2 * start.norm()  # the released pooling layer, two steps on


def test_mined_rows_are_used(recipe, tmp_path):
    mined = tmp_path / "mined"
    mined.mkdir()
    write_rows(mined / "rows.jsonl", some_rows(40, 3))
    code, out, err = command(recipe, "--out", tmp_path / "run", "--steps", 1, "--mined", mined)
    assert code == 0 and f"rows of {mined / 'rows.jsonl'}" in out, err
    assert "no/such" in told(command(recipe, "--out", tmp_path / "odd", "--steps", 1, "--mined", "no/such"))


# -------------------------------------------------------------------------------------------------- bad input


def test_nan_stops_with_rows_and_checkpoint(recipe, tmp_path, monkeypatch):
    true_step, steps = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or true_step(*args))
    true_loss = train.batch_loss

    def broken(*args):
        loss, accuracy = true_loss(*args)
        return loss * (math.nan if len(steps) == 4 else 1), accuracy

    monkeypatch.setattr(train, "batch_loss", broken)
    line = told(command(recipe, "--out", tmp_path / "run"))
    rows = ", ".join(f"rows[{i}]" for _, _, i in train.schedule([36], settings(), 3))
    assert "step 4 " in line and "not finite" in line and rows in line
    assert line.endswith(f"last checkpoint: {tmp_path / 'run' / 'step_000002'}")
    stored = [load_file(train.checkpoint(tmp_path / "run") / name) for name in FILES[:2]]
    assert all(tensor.isfinite().all() for part in stored for tensor in part.values())
    monkeypatch.undo()
    assert command(recipe, "--out", tmp_path / "run")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--micro-tokens", 5], "expected at least"),
        (["--short", "fail", "--negatives", 3], "rows.jsonl:1: field 'neg': expected 3 texts, got 2"),
        (["--short", "odd"], "short: expected"),
        (["--pooling", "max"], "field 'pooling'"),
        (["--batching", "odd"], "batching: expected blended or task"),
        (["--batching", "task", "--batch", 37], "batch: expected at most 36"),
        (["--batch", 37], "batch: expected at most 36"),
        (["--batch", 0], "batch: expected"),
        (["--lora-rank", -1], "lora_rank: expected"),
        (["--tensorboard", "board"], "expected the package tensorboard"),
        (["--dtype", "int7"], "dtype: expected one of"),
        (["--export-dtype", "int7"], "dtype: expected one of"),
        (["--init", "no/such"], "model 'no/such'"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--recipe", "no.json"], "no.json"),
    ],
)
def test_bad_flags(recipe, tmp_path, flags, message):
    assert message in told(command(recipe, "--out", tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "latest").exists()


@pytest.mark.parametrize("flags", (["--nonsense", 1], ["--steps", "many"], ["--stage", 3]))
def test_bad_arguments(recipe, tmp_path, flags):
    code, _, err = command(recipe, "--out", tmp_path / "run", *flags)
    assert code == 2 and flags[0] in err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_budget_below_a_text_is_found_before_training(recipe, tmp_path):
    entry = {"name": "rows", "file": str(recipe.parent / "rows.jsonl"), "instruction": "", "stages": [1]}
    (data,) = train.read_datasets([entry], 1, settings())
    (_, _, i), *_ = train.schedule([36], settings(), 8)
    rows = some_rows(40)
    late = next(row for row in rows if row["query"] == data.rows[i]["query"])  # of the last step of an epoch
    late["neg"] = [" ".join(WORDS * 5)] * 2
    write_rows(tmp_path / "rows.jsonl", rows)
    line = told(
        command(recipe, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--micro-tokens", 40)
    )
    assert "expected at least" in line and not (tmp_path / "run" / "latest").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stepz", 3, "stages.1: unknown setting 'stepz'"),
        ("steps", "3", "stages.1.steps: expected int, got '3'"),
        ("steps", 3.5, "stages.1.steps: expected int, got 3.5"),
        ("in_batch", 1, "stages.1.in_batch: expected bool, got 1"),
        ("steps", True, "stages.1.steps: expected int, got True"),
    ],
)
def test_bad_stage_setting(recipe, tmp_path, name, value, message):
    found = json.loads(recipe.read_text())
    found["stages"]["1"][name] = value
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(found))
    line = told(command(path, "--out", tmp_path / "run"))
    assert message in line and str(path) in line
