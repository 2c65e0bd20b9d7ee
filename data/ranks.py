"""The ranks of a run: who is there, what they agree on, and how they stop together."""

import contextlib
import hashlib
import json
import os
import signal

import torch
import torch.distributed as dist

from data.commands import PARENT, InputError

CPU = torch.device("cpu")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """Prints on rank 0."""
    if rank() == 0:
        print(*args, flush=True)


def all_reduce(values, op=dist.ReduceOp.SUM):
    """list of numbers -> the list reduced over the ranks, the same on all of them.

    It goes over the CPUs, so it does not wait for a GPU's work.
    """
    values = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values, op)
    return values.tolist()


def all_gather(x):
    """x (b, ...) of every rank -> (B, ...) in the order of the ranks, without gradient."""
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(out, x.contiguous())
    else:  # torch 2.12 and before
        dist.all_gather_into_tensor(out, x.contiguous())
    return out


def init_ranks():
    """Joins torchrun's ranks, if there are several -> the device of this one."""
    device = CPU
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group(backend)
    return device


def make_mesh(device, shard_ranks):
    """All ranks share one copy of the weights, or each group of shard_ranks has its own."""
    group = shard_ranks or world_size()
    if world_size() % group != 0:
        ranks = f"the {world_size()} ranks"
        raise InputError(f"shard_ranks: expected a divisor of {ranks}, got {group}")
    if group == world_size():
        return dist.init_device_mesh(device.type, (group,), mesh_dim_names=("shard",))
    shape = (world_size() // group, group)
    return dist.init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard"))


def leave_ranks():
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def check_agreement(facts):
    """Refuses to train where a rank has other settings or rows than rank 0; `facts` is JSON."""
    content = json.dumps(facts, sort_keys=True).encode()
    digest = hashlib.blake2b(content, digest_size=6).digest()  # 48 bits are exact in fp64
    digests = [0] * world_size()
    digests[rank()] = int.from_bytes(digest, "little")
    digests = all_reduce(digests)
    for number, digest in enumerate(digests):
        if digest != digests[0]:
            expected = "the rows, settings, model and checkpoint of rank 0"
            raise InputError(f"rank {number}: expected {expected}, found others")


# ---- signals

received = []  # numbers of the signals that have come since `catch_signals`


class Stopped(KeyboardInterrupt):
    """A signal has reached one of the ranks: all of them end between two micro-batches."""


@contextlib.contextmanager
def catch_signals():
    """SIGTERM and Ctrl-C wait for the next `check_stop`; afterwards they end the process again."""

    def receive(number, frame):
        received.append(number)

    received.clear()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, receive) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def check_stop():
    """Raises Stopped on every rank if one of them received a signal, or lost its torchrun."""
    orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
    (stop,) = all_reduce([bool(received) or orphaned])
    if stop:
        raise Stopped
