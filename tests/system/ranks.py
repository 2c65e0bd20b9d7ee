"""One rank of a test of several ranks: torchrun tests/ranks.py FOLDER does what FOLDER/job.json says.

It builds a model, gives it the trained tensors of FOLDER/start.safetensors, takes the gradient of one batch
and writes it whole to the file that the job names, with the loss."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import train
from safetensors.torch import save_file
from torch import distributed as dist


def plain_gather(ctx, grad):
    """The control: as without an autograd function, gradients of other ranks are lost."""
    return grad.chunk(train.world())[train.rank()]


def gradients(folder, job):
    s = train.Settings(**job["settings"])
    model, _ = train.build(job["base"], s, train.join())
    model.dtype = getattr(torch, job.get("arithmetic", "float32"))
    train.load_tensors(train.trained(model), folder / "start.safetensors")
    data = train.Dataset("set", "Find it", False, job["rows"], [])
    rows = [(data, row, np.random.default_rng(i)) for i, row in enumerate(job["rows"])]
    batch = train.make_batch(model.train(), rows, s, train.known_positives([data]))
    if job.get("control") == "gather":
        train.Gather.backward = staticmethod(plain_gather)
    if job.get("control") == "replay":
        train.reseed = lambda *key: None
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    key = (s.seed, 0, train.rank())
    target = None
    if s.distill:
        teacher = train.place(train.load(job["teacher"], s, "cpu").requires_grad_(False), s, train.join())
        teacher.dtype = model.dtype
        parts = train.micro_batches(teacher, batch.tokens, s.micro_tokens)
        target = train.embed(teacher, batch.tokens, parts, key)
    calls.clear()
    out = train.backward(
        model,
        batch.tokens,
        lambda e: train.batch_loss(e, batch, s, target),
        s.micro_tokens,
        key,
        job["cached"],
    )
    found = {name: p.grad for name, p in train.trained(model).items()}
    found = {n: g.full_tensor() if isinstance(g, train.DTensor) else g for n, g in found.items()}
    loss, accuracy = train.reduced([out[0].item(), out[1].item()], model.device)
    found |= {"loss": torch.tensor([loss, accuracy], dtype=torch.float64) / train.world()}
    if train.rank() == 0:
        save_file(found | {"forwards": torch.tensor(len(calls))}, folder / job["out"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for job in json.loads((folder / "job.json").read_text()):
        gradients(folder, job)
    if dist.is_initialized():
        dist.destroy_process_group()
    os.sync()
