"""A training run from outside: its ranks, checkpoints and log.jsonl, and the machine it runs on.

RUN/step_N/     trained.safetensors, optimizer.safetensors, state.json
RUN/latest      the name of the last whole checkpoint
RUN/log.jsonl   first what the run is, then a line a step
"""

import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from data.commands import InputError, optional_package
from data.files import ROOT
from data.folders import read_tensors

# ---- ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """Prints on rank 0."""
    if rank() == 0:
        print(*args, flush=True)


def all_reduce(values, device, op=dist.ReduceOp.SUM):
    """list of numbers -> the list reduced over the ranks, the same on all of them."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(values, op)
    return values.tolist()


def init_ranks():
    """Joins torchrun's ranks, if there are several -> the device of this one."""
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl"
        torch.cuda.set_device(device)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group(backend)
    return device


def catch_signals():
    """SIGTERM and Ctrl-C end the run after the step it is in -> a list that they fill."""
    received = []

    def receive(number, frame):
        received.append(number)

    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)
    return received


# ---- checkpoints


def trained(model):
    """Name -> parameter of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_tensors(tensors, path):
    """Copies a safetensors file into tensors of the same names and shapes, and nothing else."""
    state = read_tensors(path)
    for name in [*tensors, *state]:
        known = name in tensors and name in state
        if not known or tensors[name].shape != state[name].shape:
            message = "missing or of another shape; were the settings changed?"
            raise InputError(f"{path}: tensor '{name}': {message}")
    for name, tensor in tensors.items():
        value = state[name]
        if isinstance(tensor, DTensor):  # each rank takes its shard
            mesh, placements = tensor.device_mesh, tensor.placements
            value = value.to(tensor.device)
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        tensor.copy_(value)


def whole(tensor):
    """A sharded tensor's full value; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def checkpoint(run):
    """Folder of a run's last checkpoint."""
    return Path(run, Path(run, "latest").read_text().strip())


def last_checkpoint(run):
    """The same for a message: "none" where there is none."""
    return checkpoint(run) if Path(run, "latest").exists() else "none"


def optimizer_tensors(model, optimizer):
    """AdamW's state by parameter name; one that has not stepped yet gets its zeros."""
    tensors = {}
    for name, parameter in trained(model).items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key, tensor in state.items():
            tensors[f"{name}.{key}"] = tensor
    return tensors


def save_checkpoint(run, step, model, optimizer, state):
    """Rank 0 writes the trained weights, AdamW's state and `state` (JSON) to RUN/step_N."""
    parts = {"trained": trained(model), "optimizer": optimizer_tensors(model, optimizer)}
    for tensors in parts.values():
        for name, tensor in tensors.items():
            tensor = whole(tensor).detach()
            tensors[name] = tensor.cpu() if rank() == 0 else None
    if rank() == 0:
        write_checkpoint(run, step, parts, state)


def load_checkpoint(folder, model, optimizer):
    """Restores what `save_checkpoint` wrote."""
    load_tensors(trained(model), folder / "trained.safetensors")
    load_tensors(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")


def write_checkpoint(run, step, tensors, state):
    """Writes RUN/step_N. At every moment `latest` names a whole checkpoint.

    `tensors` is {file name: {name: tensor}}, `state` is JSON. The folder is written under a
    temporary name, flushed to disk and renamed; then `latest` is; then older ones are removed.
    """
    folder = run / f"step_{step:06d}"
    temporary = run / f".step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, found in tensors.items():
            save_file(found, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        flush(*temporary.iterdir(), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        (run / ".latest").write_text(folder.name + "\n")
        flush(run / ".latest")
        (run / ".latest").rename(run / "latest")
        flush(run)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        message = f"not saved: {error}; last good checkpoint: {last_checkpoint(run)}"
        raise InputError(f"{temporary}: {message}") from error
    for old in run.glob("step_*"):
        if old != folder:
            shutil.rmtree(old)


def flush(*paths):
    """Waits until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---- log


class RunLog:
    """A run's figures, a record a step: in log.jsonl, on the screen, in tensorboard if asked for.

    Ranks other than 0 write nothing.
    """

    def __init__(self, run, head, step, tensorboard=None):
        """`head` says what the run is, `step` how many steps are done, `tensorboard` is a folder.

        A resumed run drops the lines that its checkpoint does not have, and what a kill left half.
        """
        self.file = None
        self.board = None
        if rank() > 0:
            return
        path = run / "log.jsonl"
        lines = [json.dumps(head)]
        if step and path.exists():
            first, *rest = path.read_text().splitlines()
            done = tuple(f'{{"step": {n},' for n in range(step + 1))
            kept = [line for line in rest if line.startswith(done) and line.endswith("}")]
            lines = [first, *kept]
        path.write_text("\n".join(lines) + "\n")
        self.file = path.open("a", buffering=1)
        if tensorboard is not None:
            optional_package("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(tensorboard)

    def write(self, record):
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        print(format_record(record), flush=True)
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])


def format_record(record):
    """A step's figures as one printed line."""
    parts = []
    for name, value in record.items():
        parts.append(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}")
    return "  ".join(parts)


def print_sizes(model, batch, micro_tokens):
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained(model).values())
    print0(f"{total:,} parameters, {count:,} of them trained")
    ranks = "1 rank" if world_size() == 1 else f"{world_size()} ranks"
    rows = f"global batch {batch} = {ranks} x {batch // world_size()} rows"
    print0(f"{rows}, micro-batches of at most {micro_tokens} tokens")


# ---- machine


def describe_machine():
    """Versions, hardware and commit, for the head of a log."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    hardware = {"device": device, "threads": torch.get_num_threads(), "ranks": world_size()}
    return {"versions": versions, "hardware": hardware, "commit": commit or "unknown"}


def measure_peak(device, dtype):
    """FLOP/s of a large matrix product, the yardstick of share_of_peak."""
    speed = product_speed(256, device, dtype)
    if speed < 1e9:  # a CPU that emulates bf16: a large product would take minutes
        return speed
    return product_speed(2048, device, dtype)


def product_speed(width, device, dtype):
    """FLOP/s of the best of four products of square matrices."""
    x = torch.ones(width, width, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best


def speed(model, tokens_per_s, flops_a_token, peak):
    """Figures of a step over all ranks, from those of this one; `peak` is in FLOP/s a rank."""
    (rate,) = all_reduce([tokens_per_s], model.device)
    share = flops_a_token * rate / peak / world_size()
    return {"tokens_per_s": rate, "share_of_peak": share, "memory_gib": peak_memory_gib()}


def peak_memory_gib():
    """The most memory this process has held: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
