"""What the tests of training share: rows, settings, batches, the command and what a run leaves."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nvembed
import train
from data.commands import run_command
from data.files import write_rows
from data.runs import RunLog, checkpoint
from data.sampling import Dataset, known_positives

WORDS = "river stone engine paper window garden winter music doctor bread island letter".split()
FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")


# ---- rows, settings, batches


def some_rows(n, negatives=2, seed=0):
    """Rows of random words that a tiny random base can embed."""
    rng = random.Random(seed)

    def text(words):
        return " ".join(rng.choices(WORDS, k=words))

    rows = []
    for i in range(n):
        negative = [text(5) for _ in range(negatives)]
        rows.append({"query": f"{text(3)} {i}", "pos": [f"{text(6)} {i}"], "neg": negative})
    return rows


def tangled_rows(negatives):
    """Rows whose positives and negatives overlap in every way that the loss must know of."""
    rows = some_rows(7, negatives)
    rows[1]["pos"] = rows[0]["pos"]  # another row's positive is this query's too
    rows[3]["query"] = rows[2]["query"]  # the same query with another positive
    rows[4]["pos"] += ["a second positive", "a third positive"]
    if negatives:
        rows[5]["neg"][0] = rows[5]["pos"][0]  # the positive among its own hard negatives
        rows[6]["neg"][-1] = rows[0]["pos"][0]  # and among another row's
        rows[0]["neg"][0] = "a second positive"  # one that was perhaps not drawn is still known
        rows[2]["neg"] = rows[2]["neg"][:1]  # a short list
        rows[5]["neg"][-1] = rows[5]["query"]  # the query itself, as in pairs both ways
    return rows


def scored(rows):
    """Gives two of three rows scores like a reranker's, the last of them an all but certain one."""
    rng = random.Random(1)
    for i, row in enumerate(rows):
        if i % 3 != 1:
            row["pos_scores"] = [rng.uniform(-4, 8) for _ in row["pos"]]
            row["neg_scores"] = [rng.uniform(-8, 4) for _ in row["neg"]]
            last = row
    last["pos_scores"] = [200] * len(last["pos"])
    return rows


def batch_rows():
    """Eight rows with duplicates among positives and negatives; the first four are the longest."""
    rows = tangled_rows(2) + some_rows(1, 2, seed=5)
    for row in rows[:4]:
        row["neg"] = [" ".join([*WORDS, text]) for text in row["neg"]]
    return rows


SMALL = {
    "steps": 10,
    "batch": 4,
    "negatives": 2,
    "lr": 1e-2,
    "warmup": 2,
    "max_length": 48,
    "micro_tokens": 64,
    "lora_rank": 4,
    "dtype": "float32",
    "export_dtype": "float32",
    "compile": False,
    "held_out": 4,
    "save_every": 2,
    "eval_every": 5,
}


def settings(**changes):
    return train.Settings(**(SMALL | changes))


def dataset_of(rows, symmetric=False):
    return Dataset("set", "Find it", symmetric, rows, [])


def a_batch(model, rows, s, symmetric=False):
    dataset = dataset_of(rows, symmetric)
    drawn = [(dataset, row, np.random.default_rng(i)) for i, row in enumerate(rows)]
    return train.make_batch(model, drawn, s, known_positives([dataset]))


def trainable(base, s, dtype=torch.float32):
    """A model to train whose LoRA B is random, so that no gradient is zero."""
    model, _ = train.build(base, s, "cpu")
    with torch.no_grad():
        for layer in nvembed.lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    model.dtype = dtype
    return model.to(dtype).train()


def worst(one, other):
    """Largest relative error of a gradient, |difference| / |gradient|; none of them may be zero."""
    beside = {"loss", "forwards", "graphs"}
    names = one.keys() - beside
    assert names == other.keys() - beside
    assert all(one[name].norm() > 0 for name in names)
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in names)


# ---- the command


def write_recipe(folder, base):
    """A recipe of 40 rows for stages 1 and 2, with the settings above -> its path."""
    write_rows(folder / "rows.jsonl", some_rows(40))
    entry = {
        "name": "rows",
        "file": "rows.jsonl",
        "kind": "retrieval",
        "instruction": "Find it",
        "stages": [1, 2],
    }
    recipe = {
        "base": str(base),
        "seed": 0,
        "datasets": [entry],
        "stages": {"1": SMALL, "2": SMALL | {"in_batch": False}},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def command(recipe, *flags):
    """train.py in this process -> (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["train.py", "--recipe", str(recipe), *map(str, flags)])
        try:
            run_command(train.main)
        except SystemExit as error:
            code = error.code
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def told(result):
    """The one line of an error; a load may have printed what is fresh or dropped before it."""
    code, _, err = result
    lines = [line for line in err.splitlines() if "fresh:" not in line]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    return lines[0]


def stopped_run(recipe, run, step, *flags):
    """Trains until SIGTERM arrives during a step -> the run."""
    write = RunLog.write

    def signalled(self, record):
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", signalled)
        code, out, err = command(recipe, "--out", run, *flags)
    assert code == 130, err
    assert err.splitlines()[-1].startswith(f"stopped after step {step}; the same command goes on")
    assert checkpoint(run).name == f"step_{step:06d}"
    assert not (run / "config.json").exists()
    return run


def torchrun(ranks, *line, wait=True):
    """Starts a program on several ranks -> (its output, exit status), or the process."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += [f"--nproc-per-node={ranks}", *map(str, line)]
    process = subprocess.Popen(
        program,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if not wait:
        return process
    out, _ = process.communicate(timeout=300)
    return out, process.returncode


# ---- what a run leaves


def log(run):
    """The records of a run's steps."""
    _, *lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def log_head(run):
    return json.loads((run / "log.jsonl").read_text().splitlines()[0])


def learned(run):
    """What two equal runs share, bit for bit: weights, optimizer state, figures of every step."""
    tensors = {}
    for file in FILES[:2]:
        for name, tensor in load_file(checkpoint(run) / file).items():
            tensors[name] = tensor.numpy().tobytes()
    names = ("step", "loss", "accuracy", "lr", "grad_norm", "held_out_loss")
    return tensors, [[line.get(name) for name in names] for line in log(run)]
