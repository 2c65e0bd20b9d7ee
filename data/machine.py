"""The machine a run is on: what it is, how fast, and how much memory the run takes."""

import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from data.commands import InputError
from data.files import ROOT
from data.ranks import all_reduce, world_size


def describe_machine():
    """Versions, hardware and commit, for the head of a log."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = ""
    if shutil.which("git"):
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


def fast_dtype(device="cpu"):
    """bf16 where its products are faster (GPUs since Ampere; AMX, AVX-512 bf16), else fp32.

    An older GPU, such as a T4, only emulates bf16.
    """
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


WIDTHS = {"cuda": (512, 2048, 8192), "cpu": (256, 512, 1024, 2048)}  # of the products below
SLOW_PRODUCT = 1.0  # seconds


def measure_peak(device, dtype):
    """FLOP/s of matrix products that are large enough for the device, the yardstick of speed.

    A GPU reaches its peak at a width of 8,192, half of it at 2,048. A CPU that emulates bf16 would
    take minutes for a large one: a width whose product would take over SLOW_PRODUCT is left out.
    """
    rate = 0.0
    for width in WIDTHS["cuda" if device.type == "cuda" else "cpu"]:
        if rate and 2 * width**3 / rate > SLOW_PRODUCT:
            break
        rate = max(rate, product_speed(width, device, dtype))
    return rate


def product_speed(width, device, dtype):
    """FLOP/s of products of square matrices: the best of four rounds.

    The numbers are random: GPUs multiply equal ones over 10 % faster. A GPU works ahead of the
    program, so it is waited for before and after a round of ten products, not after each.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(width, width, generator=generator, device=device).to(dtype)
    out = torch.empty_like(x)
    products = 10 if device.type == "cuda" else 1
    best = math.inf
    for _ in range(4):  # the first warms up
        start = finished_at(device)
        for _ in range(products):
            torch.mm(x, x, out=out)
        best = min(best, finished_at(device) - start)
    return products * 2 * width**3 / best


def finished_at(device):
    """The time, in seconds, when the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


# ---- memory of a micro-batch

CPU_TOKENS = 8192  # of a micro-batch on a CPU, at most
CPU_SHARE = 0.6  # of a machine's memory, for a run; the rest is other programs'
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
ROUND = 256  # a GPU's tokens are a multiple of it
RESERVE = 0.06  # share of a GPU's memory that is left to kernels and to fragmentation


def choose_micro_tokens(model, s):
    """How many tokens a micro-batch may have -> s.micro_tokens or, where it is 0, what fits."""
    if s.micro_tokens:
        return s.micro_tokens
    if model.device.type == "cpu":
        total = CPU_SHARE * cpu_memory()
        free = total - sum(local_bytes(parameter) for parameter in model.parameters())
        tokens = min(room_in_tokens(model, s, free, total), CPU_TOKENS)
        tokens = max(tokens, s.max_length)  # a machine that is too small can still swap
    else:
        free, total = torch.cuda.mem_get_info(model.device)
        tokens = fitting_tokens(model, s, free, total)
        # a resumed run, with a little more or less memory, has the same micro-batches
        tokens = max(tokens // ROUND * ROUND, s.max_length)
    (tokens,) = all_reduce([tokens], dist.ReduceOp.MIN)
    return int(tokens)


def cpu_memory():
    """Bytes of memory of the machine, or of the container, for each rank on it.

    Not those that are free at the moment: a resumed run has the same micro-batches.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CONTAINER_LIMIT.exists():
        limit = CONTAINER_LIMIT.read_text().strip()
        total = min(total, int(limit)) if limit.isdigit() else total
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fitting_tokens(model, s, free, total):
    """The tokens whose graph fits beside the model -> int; InputError if not even one text's do.

    `free` bytes of `total` are left with the model's weights on the device.
    """
    tokens = room_in_tokens(model, s, free, total)
    if tokens < s.max_length:
        advice = "shorter texts (--max-length) or more ranks"
        if not s.recompute:
            advice = f"--recompute, {advice}"
        got = f"there is memory for {max(tokens, 0)}; what helps: {advice}"
        raise InputError(f"micro_tokens: expected a text's {s.max_length} tokens to fit, {got}")
    return tokens


def room_in_tokens(model, s, free, total):
    """The tokens whose graph fits beside the model, below 0 where the model does not fit itself."""
    size = model.dtype.itemsize
    blocks = model.embedding_model.layers
    trained = [p for p in model.parameters() if p.requires_grad]
    # A gradient and AdamW's two moments of each trained weight, and its whole copy in the dtype of
    # the arithmetic, which the graph keeps.
    weights = 3 * sum(local_bytes(p) for p in trained) + size * sum(p.numel() for p in trained)
    if world_size() > 1:  # FSDP holds one part whole: its weights, gradients and buffers
        others = [part for part in model.children() if part is not model.embedding_model]
        weights += 4 * max(whole_bytes(part) for part in (blocks[0], *others))
    room = free - weights - RESERVE * total
    scores = model.config.num_attention_heads * s.max_length if keeps_scores(model) else 0
    return int(room / bytes_a_token(model.config, size, s.recompute, scores))


def keeps_scores(model):
    """Whether the graph keeps attention's scores: on a GPU whose kernel is not for packed texts."""
    if model.device.type != "cuda":
        return False
    old = torch.cuda.get_device_capability(model.device) < (8, 0)
    return old or model.dtype == torch.float32


def whole_bytes(module):
    """Bytes of a module's parameters, over all ranks."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def local_bytes(parameter):
    """Bytes of this rank's shard of a parameter."""
    shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return shard.numel() * shard.element_size()


def bytes_a_token(c, size, recompute, scores=0):
    """What the backward pass keeps of a token, in bytes; `size` is that of a number.

    A block keeps its residuals, norms, projections, what they and their adapters read, and masks
    of dropout: about 9 D + 4.5 F numbers, and `scores` of attention. The latent layer keeps 20 D,
    and its scores.
    """
    block = 9 * c.hidden_size + 4.5 * c.intermediate_size + scores
    numbers = c.num_hidden_layers * block
    if recompute:
        numbers = c.num_hidden_layers * c.hidden_size + block
    if c.pooling in ("latent", "self"):
        numbers += 20 * c.hidden_size + 3 * c.num_cross_heads * c.num_latents
    return size * numbers
