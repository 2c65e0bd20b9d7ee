"""How it learns: loss, cached gradients, sampler, checkpoints; each with a control that fails."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import nvembed
import pytest
import torch
import train
from conftest import ROOT
from nvembed import InputError, NVEmbed
from safetensors.torch import load_file

from data.prepare import write_rows

WORDS = "river stone engine paper window garden winter music doctor bread island letter".split()


def some_rows(n, negatives=2, seed=0):
    rng = random.Random(seed)

    def text(k):
        return " ".join(rng.choices(WORDS, k=k))

    rows = []
    for i in range(n):
        rows.append(
            {"query": f"{text(3)} {i}", "pos": [f"{text(6)} {i}"], "neg": [text(5) for _ in range(negatives)]}
        )
    return rows


def settings(**changes):
    small = {
        "steps": 10,
        "batch": 4,
        "negatives": 2,
        "lr": 1e-2,
        "warmup": 2,
        "max_length": 48,
        "micro_tokens": 64,
    }
    small |= {"lora_rank": 4, "dtype": "float32", "export_dtype": "float32", "held_out": 2, "save_every": 5}
    return train.Settings(**(small | {"eval_every": 5} | changes))


def make_dataset(rows, held=0, symmetric=False, instruction="Find it"):
    return train.Dataset("set", instruction, symmetric, rows[held:], rows[:held])


def a_batch(model, rows, s, **how):
    data = make_dataset(rows, **how)
    with_rng = [(data, row, train.np.random.default_rng(i)) for i, row in enumerate(data.rows)]
    return train.make_batch(model, with_rng, s, train.known_positives([data]))


def trainable(base, s, dtype=torch.float32):
    model, _ = train.build(base, s, "cpu")
    model.train()
    with torch.no_grad():
        for layer in nvembed.lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    model.dtype = dtype
    return model.to(dtype)


def double_loop(q, d, rows, s):
    """InfoNCE written out: q (B, D), d[i] = embeddings of row i's [positive, negatives...], texts beside them."""
    total = []
    for i, row in enumerate(rows):
        positives = {t for other in rows if other["query"] == row["query"] for t in other["pos"]}
        terms = [math.exp(float(q[i] @ d[i][0]) / s.temperature)]
        for j, other in enumerate(rows):
            for k, text in enumerate([other["pos"][0], *other["neg"]]):
                if (i, 0) != (j, k) and text not in positives and (s.in_batch or i == j):
                    terms.append(math.exp(float(q[i] @ d[j][k]) / s.temperature))
        total.append(-math.log(terms[0] / sum(terms)))
    return sum(total) / len(total)


@pytest.mark.parametrize("in_batch", (True, False))
@pytest.mark.parametrize("negatives", (0, 2, 7))
def test_info_nce_equals_a_double_loop(base, in_batch, negatives):
    s = settings(in_batch=in_batch, negatives=negatives, temperature=0.5)
    rows = some_rows(5, negatives)
    rows[1] |= {"pos": rows[0]["pos"]}  # another row's positive is this query's too
    rows[3] |= {"query": rows[2]["query"]}  # the same query again
    if negatives:
        rows[4]["neg"][0] = rows[4]["pos"][0]  # a duplicate of the positive among the hard negatives
    model = NVEmbed.from_pretrained(base)
    batch = a_batch(model, rows, s)
    e = torch.nn.functional.normalize(torch.randn(len(batch.tokens), 16, dtype=torch.float64), dim=-1)
    d = e[5:].unflatten(0, (5, 1 + negatives))
    loss, _ = train.batch_loss(e, batch, s)
    assert loss.item() == pytest.approx(double_loop(e[:5], d, rows, s), rel=1e-9)
    if in_batch or negatives:  # control: without the known positives the duplicates count as negatives
        blind = batch._replace(positive_ids=torch.zeros_like(batch.positive_ids))
        assert abs(train.batch_loss(e, blind, s)[0].item() - loss.item()) > 1e-3


def test_short_negatives_are_masked_not_repeated(base):
    model, rows = NVEmbed.from_pretrained(base), some_rows(4, 1)
    one, seven = (a_batch(model, rows, settings(negatives=n)) for n in (1, 7))
    e = torch.nn.functional.normalize(torch.randn(12, 16, dtype=torch.float64), dim=-1)
    losses = [train.batch_loss(e, b, settings())[0].item() for b in (one, seven)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and seven.valid.sum() == 8


def gradients(model, batch, s, **how):
    torch.manual_seed(3)
    model.zero_grad()
    train.backward(model, batch.tokens, lambda e: train.batch_loss(e, batch, s), s.micro_tokens, **how)
    return {name: p.grad.clone() for name, p in train.trained(model).items()}


def worst(one, other):
    assert all(g.norm() > 0 for g in one.values())
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in one)


def test_cached_gradient_equals_plain_with_dropout(base, monkeypatch):
    s = settings(temperature=0.2)
    model = trainable(base, s, torch.float64)
    batch = a_batch(model, some_rows(6), s)
    assert len(nvembed.pack(batch.tokens, s.micro_tokens)) > 3
    plain = gradients(model, batch, s, cached=False)
    assert worst(plain, gradients(model, batch, s)) <= 1e-10
    monkeypatch.setattr(
        train, "set_random_state", lambda state: None
    )  # control: other dropout in the second run
    assert worst(plain, gradients(model, batch, s)) > 1e-3


def test_one_micro_batch_needs_no_cache(base):
    s = settings(micro_tokens=10**6)
    model, calls = trainable(base, s), []
    model.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, a_batch(model, some_rows(6), s), s)
    assert len(calls) == 1


def test_blended_schedule_visits_each_row_once_an_epoch():
    s, sizes = settings(batch=4), [7, 3, 11]
    seen = [row for step in range(21) for row in train.schedule(sizes, s, step)]  # 84 places = 4 epochs of 21
    for epoch in range(4):
        rows = [(d, i) for e, d, i in seen if e == epoch]
        assert sorted(rows) == [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    assert train.schedule(sizes, s, 5) == seen[20:24]
    assert train.schedule(sizes, settings(batch=4, seed=1), 5) != seen[20:24]
    for step in range(20):
        task = train.schedule(sizes, settings(batch=3, batching="task"), step)
        assert len({d for _, d, _ in task}) == 1 and len(set(task)) == 3


def test_learning_rate():
    s = settings(steps=10, warmup=4, lr=1.0)
    assert [train.learning_rate(s, i) for i in range(10)] == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_instruction_goes_where_it_belongs(base):
    model = NVEmbed.from_pretrained(base)
    rows = some_rows(2, 1)
    rows[1]["prompt"] = "Other"
    batch = a_batch(model, rows, settings(), instruction="Find it")
    expected = [model.tokenize([r["query"]], t)[0] for r, t in zip(rows, ("Find it", "Other"), strict=True)]
    assert batch.tokens[:2] == expected and all(t.masked == 0 for t in batch.tokens[2:])
    both = a_batch(model, rows, settings(), symmetric=True)
    assert all(t.masked > 0 for t in both.tokens)


def test_what_is_trained(base):
    s = settings()
    model = trainable(base, s)
    names = set(train.trained(model))
    assert sum(".lora_" in name for name in names) == 2 * 7 * len(model.embedding_model.layers)
    assert sum(name.startswith("latent_attention_model.") for name in names) == 14
    assert len(names) == 2 * 7 * len(model.embedding_model.layers) + 14
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(train.trained(model).values(), lr=0.1, fused=True)
    train.train_step(model, optimizer, a_batch(model, some_rows(4), s), s, 1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names  # latents and to_kv among them, the base not


@pytest.fixture
def recipe(tmp_path, base):
    write_rows(tmp_path / "rows.jsonl", some_rows(40))
    entry = {"name": "rows", "file": "rows.jsonl", "kind": "retrieval", "instruction": "Find it"}
    stage = {k: v for k, v in vars(settings()).items() if v != getattr(train.Settings(), k)}
    found = {"base": str(base), "seed": 0, "datasets": [entry | {"stages": [1, 2]}]}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(found | {"stages": {"1": stage, "2": stage | {"in_batch": False}}}))
    return path


def command(recipe, *flags, **how):
    line = [sys.executable, str(ROOT / "train.py"), "--recipe", str(recipe), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )


def finish(recipe, *flags):
    process = command(recipe, *flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(run):
    return {
        n: t
        for f in ("trained", "optimizer")
        for n, t in load_file(train.checkpoint(run) / f"{f}.safetensors").items()
    }


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:]]
    return [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in lines]


def test_resume_is_exact_after_kills(recipe, tmp_path):
    """10 steps in one go = stopped by SIGTERM, killed by SIGKILL at random moments, resumed: bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(recipe, "--out", whole, "--save-every", 1)[0] == 0
    rng = random.Random(0)
    for attempt in range(3):
        process = command(recipe, "--out", broken, "--save-every", 1)
        while not (broken / "latest").exists():
            time.sleep(0.05)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGTERM if attempt == 0 else signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
        if attempt == 0:
            assert process.returncode == 0 and ("stopped after step" in out or "saved in" in out)
        assert train.checkpoint(broken).is_dir()
    code, out, err = finish(recipe, "--out", broken, "--save-every", 1)
    assert code == 0, err
    one, other = weights(whole), weights(broken)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert losses(whole) == losses(broken) and [step for step, *_ in losses(whole)] == list(range(11))
    assert len(list(broken.glob("step_*"))) == 1  # older checkpoints are gone
    code, out, err = finish(recipe, "--out", broken, "--save-every", 1)
    assert code == 0 and "finished already" in out
    code, out, err = finish(recipe, "--out", broken, "--save-every", 1, "--lr", 0.5)
    assert code == 2 and "lr = 0.01, now 0.5" in err and len(err.strip().splitlines()[-1:]) == 1


def test_two_stages_and_finished_run(recipe, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    code, out, err = finish(recipe, "--out", one, "--steps", 3)
    assert code == 0, err
    assert float(out.split("lowest ")[1].split()[0]) >= 0.9999
    s = settings(in_batch=False)
    model, base = train.build(one, s, "cpu")
    stored = load_file(train.checkpoint(one) / "trained.safetensors")
    assert all(torch.equal(p.detach(), stored[n]) for n, p in train.trained(model).items())  # unmerged
    code, out, err = finish(recipe, "--out", two, "--stage", 2, "--init", one, "--steps", 2)
    assert code == 0, err
    assert json.loads((train.checkpoint(two) / "state.json").read_text())["base"] == base
    texts = ["a river", "the doctor's letter"]
    model.eval()
    loaded = NVEmbed.from_pretrained(one).encode(texts, "Find it")
    assert (loaded * model.encode(texts, "Find it")).sum(axis=1).min() >= 0.9999
    monkeypatch.chdir(tmp_path)
    code, out, err = finish(recipe, "--stage", 2)
    assert code == 2 and "run --stage 1 first" in err


def test_own_rows_from_a_model(recipe, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = finish(recipe, "--data", tmp_path / "rows.jsonl", "--init", base, "--steps", 2)
    assert code == 0 and (tmp_path / "runs" / "rows" / "config.json").exists(), err


def test_disk_full_keeps_the_last_checkpoint(base, tmp_path, monkeypatch):
    s = settings()
    model = trainable(base, s)
    optimizer = torch.optim.AdamW(train.trained(model).values(), fused=True)
    train.save_checkpoint(tmp_path, 1, model, optimizer, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(InputError, match="No space left on device.*step_000001"):
        train.save_checkpoint(tmp_path, 2, model, optimizer, {"step": 2})
    assert train.checkpoint(tmp_path).name == "step_000001" and weights(tmp_path)
    stored = train.checkpoint(tmp_path) / "trained.safetensors"
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(InputError, match="trained.safetensors"):
        train.load_tensors(train.trained(model), stored)


def test_nan_stops_with_rows_and_checkpoint(recipe, base, tmp_path, monkeypatch):
    entries = json.loads(recipe.read_text())["datasets"]
    entries[0]["file"] = str(tmp_path / "rows.jsonl")
    true_loss, calls = train.batch_loss, []

    def broken(*args):
        calls.append(1)
        loss, accuracy = true_loss(*args)
        return loss * (math.nan if len(calls) > 4 else 1), accuracy

    monkeypatch.setattr(train, "batch_loss", broken)
    with pytest.raises(InputError, match=r"step 4 .*not finite; rows rows\[\d+\].*step_000003"):
        (tmp_path / "run").mkdir()
        train.train(tmp_path / "run", base, entries, 1, settings(save_every=1, held_out=4))
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--micro-tokens", 5], "batch_tokens: expected at least"),
        (["--short", "fail", "--negatives", 3], "field 'neg': expected 3 texts, got 2"),
        (["--pooling", "max"], "field 'pooling'"),
        (["--batching", "odd"], "batching: expected blended or task"),
        (["--dtype", "int7"], "dtype: expected one of"),
        (["--nonsense", 1], "unrecognized arguments: --nonsense"),
        (["--init", "no/such"], "model 'no/such'"),
    ],
)
def test_bad_flags(recipe, tmp_path, flags, told):
    code, out, err = finish(recipe, "--out", tmp_path / "run", *flags)
    assert code == 2 and told in err.strip().splitlines()[-1] and "Traceback" not in err


def test_bad_recipe(recipe, tmp_path):
    found = json.loads(recipe.read_text())
    for name, value, told in (
        ("stepz", 3, "unknown setting 'stepz'"),
        ("steps", "3", "stages.1.steps: expected int"),
    ):
        found["stages"]["1"] = {name: value}
        recipe.write_text(json.dumps(found))
        code, out, err = finish(recipe, "--out", tmp_path / "run")
        assert code == 2 and told in err
