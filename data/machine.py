"""The machine a run is on: what it is, how fast, and how much memory the run takes."""

import math
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from data.files import ROOT
from data.ranks import all_reduce, world_size


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


def speed(tokens_per_s, flops_a_token, peak):
    """Figures of a step over all ranks, from those of this one; `peak` is in FLOP/s a rank."""
    (rate,) = all_reduce([tokens_per_s])
    share = flops_a_token * rate / peak / world_size()
    return {"tokens_per_s": rate, "share_of_peak": share, "memory_gib": peak_memory_gib()}


def peak_memory_gib():
    """The most memory this process has held: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
