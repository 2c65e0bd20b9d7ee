"""Time and memory of a training step; each measurement is one command, each size a process of its own.

    python tests/bench.py cache                        cached against plain step; peak memory against batch
    python tests/bench.py step                         one LoRA step at Mistral-7B shape on this GPU, random weights
    torchrun --nproc-per-node 8 tests/bench.py step    the same on 8 ranks

A step is one of train.py: tokens -> loss -> gradient -> AdamW, documents of equal length, weights random.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import train
from nvembed import Config, NVEmbed, Tokens
from tokenizers import Tokenizer, models

SHAPES = {  # layers, D, F, H, G, vocabulary, width of a cross-attention head
    "mistral-7b": (32, 4096, 14336, 32, 8, 32000, 4096),
    "smollm2": (30, 576, 1536, 9, 3, 49152, 576),
    "tiny": (4, 256, 768, 8, 4, 1000, 64),
}


def random_model(shape, dtype):
    layers, d, f, h, g, vocabulary, cross = SHAPES[shape]
    config = Config(vocabulary, d, f, layers, h, g, eos_token_id=2, cross_dim_head=cross)
    with torch.device("meta"):
        model = NVEmbed(config, Tokenizer(models.BPE()), dtype)
    for p in model.parameters():
        p.requires_grad_(False)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, p in model.to(dtype).named_parameters():
        p.fill_(1) if "norm" in name else p.normal_(std=0.02, generator=generator)
    return model


def memory(device):
    """Bytes: (now, peak since the last call)."""
    if device.type == "cuda":
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return tuple(int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def measure(args):
    """One size -> {"seconds": median of the rounds, "loaded", "peak": bytes, ...}."""
    device = train.join()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    s = train.Settings(
        batch=args.batch, negatives=args.negatives, max_length=args.length, micro_tokens=args.micro_tokens
    )
    s = train.replace(
        s, dtype=str(dtype).removeprefix("torch."), recompute=args.recompute, compile=args.compile
    )
    train.NVEmbed.from_pretrained = lambda *_, **__: random_model(args.shape, dtype)
    model, _ = train.build("random", s, device)
    optimizer = torch.optim.AdamW(train.trained(model).values(), lr=1e-5, fused=True)
    train.optimizer_tensors(model.train(), optimizer)  # its memory is part of what is loaded
    generator = torch.Generator().manual_seed(1 + train.rank())
    rows, columns = args.batch // train.world(), 1 + args.negatives
    ids = torch.randint(3, model.config.vocab_size, (rows * (1 + columns), args.length), generator=generator)
    valid = torch.ones(args.batch, columns, dtype=torch.bool)
    documents = torch.arange(valid.numel()).view(valid.shape)
    batch = train.Batch([Tokens(text, 0) for text in ids.tolist()], valid, documents, documents[:, :1])
    (loaded, _), seconds, true = memory(device), [], train.backward
    train.backward = lambda *a: true(*a, cached=not args.plain)
    for step in range(args.rounds + 1):
        start = time.perf_counter()
        record = train.train_step(model, optimizer, batch, s, step)
        seconds.append(time.perf_counter() - start)
    peak, tokens, used = train.measured_peak(device, dtype), ids.numel() * train.world(), memory(device)[1]
    found = {"shape": args.shape, "batch": args.batch, "tokens": tokens, "ranks": train.world()}
    found |= {"seconds": statistics.median(seconds[1:]), "range": [min(seconds[1:]), max(seconds[1:])]}
    weights = sum(p.numel() for p in model.parameters()) - model.embedding_model.embed_tokens.weight.numel()
    share = 6 * weights * tokens / found["seconds"] / peak / train.world()
    found |= {"loaded_gib": loaded / 2**30, "peak_gib": used / 2**30, "share_of_peak_at_6N": share}
    return found | {"loss": record["loss"], "plain": args.plain}


def own_process(*flags):
    line = [sys.executable, __file__, "one", *map(str, flags)]
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def cache(args):
    """Cached against plain step on the same micro-batches, and the memory above the loaded model from batch 128 to 1,024."""
    flags = ["--shape", args.shape, "--length", args.length, "--negatives", args.negatives]
    flags += ["--micro-tokens", args.micro_tokens, "--rounds", args.rounds]
    found = {
        kind: own_process("--batch", 128, *flags, *more)
        for kind, more in (("cached", []), ("plain", ["--plain"]))
    }
    ratio = found["cached"]["seconds"] / found["plain"]["seconds"]
    print(
        f"cached {found['cached']['seconds']:.2f} s, plain {found['plain']['seconds']:.2f} s: {ratio:.2f} x"
    )
    for batch in (128, 256, 512, 1024):
        one = own_process("--batch", batch, *flags, "--rounds", 1)
        above = one["peak_gib"] - one["loaded_gib"]
        print(
            f"batch {batch:5}: {one['seconds']:.1f} s, {above:.3f} GiB above the {one['loaded_gib']:.2f} loaded"
        )
    above = found["plain"]["peak_gib"] - found["plain"]["loaded_gib"]
    print(f"plain, batch 128: {above:.3f} GiB above")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("what", choices=("cache", "step", "one"))
    flag("--shape", choices=SHAPES)
    flag("--batch", type=int, default=128)
    flag("--negatives", type=int)
    flag("--length", type=int)
    flag("--micro-tokens", type=int)
    flag("--rounds", type=int, default=5)
    flag("--plain", action="store_true", help="one graph instead of cached gradients")
    flag("--recompute", action="store_true")
    flag("--compile", action="store_true")
    args = parser.parse_args()
    small = {"shape": "tiny", "negatives": 1, "length": 32, "micro_tokens": 2048}
    large = {"shape": "mistral-7b", "negatives": 7, "length": 512, "micro_tokens": 8192}
    for name, value in (large if args.what == "step" else small).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    if args.what == "cache":
        print(f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} threads")
        cache(args)
    else:
        found = measure(args)
        train.tell(json.dumps(found | {"torch": torch.__version__, "hardware": hardware}))


if __name__ == "__main__":
    main()
