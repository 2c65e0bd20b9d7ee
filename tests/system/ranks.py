"""One rank of a test of several ranks: torchrun tests/system/ranks.py FOLDER.

It does what FOLDER/job.json says. For each job it builds a model, gives it the trained tensors of
FOLDER/start.safetensors, takes the gradient of one batch, and writes it whole to the file that the
job names, with the loss.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed as dist

import train
from data.ranks import all_reduce, init_ranks, rank, world_size
from data.runs import load_tensors, trained, whole
from data.sampling import Dataset, known_positives


def plain_gather(ctx, grad):
    """The control: as without an autograd function, gradients of other ranks are lost."""
    return grad.chunk(world_size())[rank()]


def first_columns(q_bD, d_BLD, batch, s, info_nce=train.info_nce):
    """The control: each rank's queries are aligned with the columns of the first rank's."""
    first = torch.arange(len(batch.own_rows))
    return info_nce(q_bD, d_BLD, replace(batch, own_rows=first), s)


def mean_of_own_rows(q_bD, d_BLD, batch, s, kd_loss=train.kd_loss):
    """The control: each rank's mean is over its own rows with scores, however many it has."""
    has = batch.scores.isfinite().any(dim=1)
    own = has[batch.own_rows].sum() * world_size()
    return kd_loss(q_bD, d_BLD, batch, s) * has.sum() / own


def embed_by_teacher(model, batch, job, s, key):
    teacher = train.load(job["teacher"], s, "cpu").requires_grad_(False)
    teacher = train.place(teacher, s, init_ranks())
    teacher.dtype = model.dtype
    with torch.no_grad():
        parts = train.micro_batches(teacher, batch.tokens, s.micro_tokens)
        return train.embed(teacher, batch.tokens, parts, key)


def write_gradients(folder, job):
    s = train.Settings(**job["settings"])
    model, _ = train.build(job["base"], s, init_ranks())
    model.dtype = getattr(torch, job.get("arithmetic", "float32"))
    load_tensors(trained(model), folder / "start.safetensors")
    dataset = Dataset("set", "Find it", False, job["rows"], [])
    rows = [(dataset, row, np.random.default_rng(i)) for i, row in enumerate(job["rows"])]
    batch = train.make_batch(model.train(), rows, s, known_positives([dataset]))
    if job.get("control") == "gather":
        train.AllGather.backward = staticmethod(plain_gather)
    if job.get("control") == "columns":
        train.info_nce = first_columns
    if job.get("control") == "kd":
        train.kd_loss = mean_of_own_rows
    if job.get("control") == "replay":
        train.reseed = lambda *key: None
    key = (s.seed, 0, rank())
    if s.distill:
        batch.teacher = embed_by_teacher(model, batch, job, s, key)

    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    loss, accuracy = train.backward(model, batch, s, key, job["cached"])
    tensors = {name: whole(p.grad) for name, p in trained(model).items()}
    sums = all_reduce([loss.item(), accuracy.item()])
    tensors["loss"] = torch.tensor(sums, dtype=torch.float64) / world_size()
    tensors["forwards"] = torch.tensor(len(calls))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] if s.compile else 0
    tensors["graphs"] = torch.tensor(compiled)
    if rank() == 0:
        save_file(tensors, folder / job["out"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for job in json.loads((folder / "job.json").read_text()):
        write_gradients(folder, job)
    if dist.is_initialized():
        dist.destroy_process_group()
    os.sync()
