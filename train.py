"""How NV-Embed learns: rows, blended batches, InfoNCE, LoRA, cached gradients, checkpoints (paper, sections 3 and 5).

    torchrun train.py --stage 1                                    retrieval, in-batch negatives on -> runs/stage1
    torchrun train.py --stage 2                                    all tasks blended, in-batch off  -> runs/stage2
    torchrun train.py --data my.jsonl --init nvidia/NV-Embed-v2    own rows                         -> runs/my

Run the same command again to go on where it was stopped. Dimensions: B rows a step, N hard negatives a row, M = B (1 + N)
documents, P positives a query has, D width.
"""

import argparse
import ctypes
import dataclasses
import functools
import hashlib
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
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import nvembed
from data.prepare import read_recipe, read_rows, resolve
from nvembed import InputError, NVEmbed, expect, pack, read_json

ROOT = Path(__file__).resolve().parent


@dataclass
class Settings:
    """One stage. Defaults are the paper's or, where it is silent, the assumptions that the README lists; a recipe's
    stage overrides them, and each is a command-line flag, which overrides the recipe."""

    steps: int = 20000
    batch: int = 128  # rows a step, over all ranks
    negatives: int = 7  # hard negatives a row
    short: str = "pad"  # a row with fewer negatives: "pad" with masked columns, or "fail"
    in_batch: bool = True  # the other rows' documents are negatives too
    batching: str = "blended"  # rows of all sets mixed, or "task": one set a batch
    lr: float = 2e-5
    warmup: int = 500
    weight_decay: float = 0.03
    clip: float = 1.0  # largest norm of the gradient
    temperature: float = 0.02
    max_length: int = 512  # tokens of a text
    micro_tokens: int = 16384  # tokens of a micro-batch: what memory holds, no effect on the result
    lora_rank: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    pooling: str = "latent"
    causal: bool = False
    dtype: str = "auto"  # of the frozen base and the arithmetic; trained weights are always fp32
    export_dtype: str = "bfloat16"
    held_out: int = 64  # rows of each set kept from training for the held-out loss
    eval_every: int = 100
    save_every: int = 50
    seed: int = 0


# ---- rows


@dataclass
class Dataset:
    name: str
    instruction: str
    symmetric: bool  # the instruction goes on documents too (STS, clustering)
    rows: list
    held_out: list


def read_datasets(entries, stage, s, mined=None):
    """Recipe entries of a stage -> list of Dataset: capped at `samples` rows, `held_out` of them set apart, by seed."""
    expect(s.short in ("pad", "fail"), f"short: expected pad or fail, got {s.short!r}")
    expect(not mined or Path(mined).is_dir(), f"--mined {mined}: no such folder")
    datasets = []
    for entry in entries:
        if stage not in entry["stages"]:
            continue
        path = Path(entry["file"])
        if mined and Path(mined, path.name).exists():
            path = Path(mined, path.name)
        rows = read_rows(path)
        for line, row in enumerate(rows, 1):
            few = s.short == "fail" and len(row["neg"]) < s.negatives
            expect(
                not few, f"{path}:{line}: field 'neg': expected {s.negatives} texts, got {len(row['neg'])}"
            )
        order = np.random.default_rng(s.seed).permutation(len(rows))
        cut = min(s.held_out, len(rows) // 10)
        held_out, kept = order[:cut], order[cut:][: entry.get("samples")]
        kept, held_out = [rows[i] for i in kept], [rows[i] for i in held_out]
        datasets.append(
            Dataset(entry["name"], entry["instruction"], entry.get("symmetric", False), kept, held_out)
        )
        print(f"{entry['name']}: {len(kept)} rows of {path}, {cut} held out")
    rows = sum(len(dataset.rows) for dataset in datasets)
    fits = not datasets or 1 <= s.batch <= rows
    expect(fits, f"batch: expected at most {rows}, the rows there are, and at least 1, got {s.batch}")
    expect(datasets, f"recipe: expected a data set of stage {stage}, got none")
    return datasets


@functools.lru_cache(maxsize=4)
def epoch_order(sizes, batch, batching, seed, epoch):
    """Global row numbers in the order of an epoch. blended: one permutation of all rows. task: batches of one set each,
    shuffled; what does not fill a batch waits for another epoch's permutation."""
    rng, starts = np.random.default_rng([seed, epoch]), np.cumsum([0, *sizes])
    if batching == "blended":
        return rng.permutation(starts[-1])
    expect(batching == "task", f"batching: expected blended or task, got {batching!r}")
    expect(
        max(sizes) >= batch, f"batch: expected at most {max(sizes)}, the rows of the largest set, got {batch}"
    )
    shuffled = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=False)]
    batches = [rows[i : i + batch] for rows in shuffled for i in range(0, len(rows) - batch + 1, batch)]
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def schedule(sizes, s, step):
    """Rows of a step as (epoch, data set, row): a pure function of its arguments, so a resume needs no more than the
    step, and any number of ranks sees the same batches. Epochs follow each other without a gap."""
    rows, starts = [], np.cumsum([0, *sizes])
    total = len(epoch_order(tuple(sizes), s.batch, s.batching, s.seed, 0))
    for place in range(step * s.batch, (step + 1) * s.batch):
        epoch, place = divmod(place, total)
        i = epoch_order(tuple(sizes), s.batch, s.batching, s.seed, epoch)[place]
        d = int(np.searchsorted(starts, i, side="right")) - 1
        rows.append((epoch, d, int(i - starts[d])))
    return rows


def text_id(text):
    """64 bits that stand for a text where equality is all that matters."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


# B rows: Tokens of the B queries, then of the documents that are valid, in row order; valid (B, 1 + N) bool, column 0 the
# positive, False pads a short list of negatives; document_ids (B, 1 + N) and positive_ids (B, P), all known positives of
# the query padded with the first, are `text_id`s.
Batch = namedtuple("Batch", "tokens valid document_ids positive_ids")


def make_batch(model, rows, s, positives):
    """rows: list of (Dataset, row, rng) -> Batch. A row's positive, and its negatives beyond N, are drawn with its rng."""
    queries, documents, valid, ids, known = [], [], [], [], []
    for dataset, row, rng in rows:
        positive = row["pos"][rng.integers(len(row["pos"]))]
        order = range(len(row["neg"])) if len(row["neg"]) <= s.negatives else rng.permutation(len(row["neg"]))
        texts = [positive] + [row["neg"][i] for i in order[: s.negatives]]
        instruction = row.get("prompt", dataset.instruction)
        queries.append((instruction, row["query"]))
        documents += [(instruction if dataset.symmetric else "", text) for text in texts]
        padding = 1 + s.negatives - len(texts)
        valid.append([True] * len(texts) + [False] * padding)
        ids.append([text_id(text) for text in texts] + [0] * padding)
        known.append(sorted(positives[row["query"]]))
    width = max(map(len, known))
    known = [row + row[:1] * (width - len(row)) for row in known]
    tokens = tokenize(model, queries + documents, s.max_length)
    return Batch(tokens, torch.tensor(valid), torch.tensor(ids), torch.tensor(known))


def tokenize(model, texts, max_length):
    """list of (instruction, text) -> list of Tokens, in order."""
    groups = defaultdict(list)
    for i, (instruction, _) in enumerate(texts):
        groups[instruction].append(i)
    tokens = [None] * len(texts)
    for instruction, members in groups.items():
        found = model.tokenize([texts[i][1] for i in members], instruction, max_length)
        for i, one in zip(members, found, strict=True):
            tokens[i] = one
    return tokens


def known_positives(datasets):
    """query -> set of text_ids of every positive that any row gives it: none of them is ever a negative."""
    positives = defaultdict(set)
    for dataset in datasets:
        for row in dataset.rows + dataset.held_out:
            positives[row["query"]] |= {text_id(text) for text in row["pos"]}
    return positives


# ---- loss


def info_nce(q_BD, d_BND, batch, temperature, in_batch):
    """InfoNCE (section 3.1) of B queries against M = B (1 + N) documents, unit vectors; -> (loss, accuracy), scalars.

    Row b's target is its column 0. With in_batch its negatives are all other columns of the batch, else its own hard
    negatives. A column whose text is a known positive of the query is never a negative, nor is padding.
    """
    b, n = batch.valid.shape
    scores = q_BD @ d_BND.flatten(0, 1).T / temperature  # (B, M)
    row = torch.arange(b, device=q_BD.device)
    target = row * n
    known = (batch.document_ids.flatten()[None, :, None] == batch.positive_ids[:, None, :]).any(-1)  # (B, M)
    use = batch.valid.flatten()[None] & ~known.to(scores.device)
    if not in_batch:
        use = use & (row[:, None] == row.repeat_interleave(n)[None])
    use[row, target] = True
    scores = scores.masked_fill(~use, -torch.inf)
    return F.cross_entropy(scores, target), (scores.argmax(dim=1) == target).float().mean()


def batch_loss(embeddings, batch, s):
    """embeddings (number of tokens lists, D) in the order of batch.tokens -> (loss, accuracy)."""
    b, n = batch.valid.shape
    d_BND = embeddings.new_zeros(b, n, embeddings.shape[1])
    d_BND[batch.valid.to(embeddings.device)] = embeddings[b:]
    return info_nce(embeddings[:b], d_BND, batch, s.temperature, s.in_batch)


def backward(model, tokens, loss_of, micro_tokens, cached=True):
    """Accumulates the gradient of loss_of(embeddings (B, D)) -> (loss, ...) and returns what loss_of returned.

    Cached gradients (GradCache, Gao et al. 2021): embed all micro-batches without graph, take the loss's gradient at the
    embeddings, then run each micro-batch again with graph. The random state is replayed, so dropout is the same in both
    runs. Peak memory is one micro-batch's; a batch that is a single micro-batch needs no cache.
    """
    parts = pack(tokens, micro_tokens)
    order = torch.tensor([i for part in parts for i in part], device=model.device)
    if len(parts) == 1 or not cached:
        embeddings = torch.cat([model([tokens[i] for i in part]) for part in parts])
        out = loss_of(embeddings[order.argsort()])
        out[0].backward()
        return out
    states, embeddings = [], []
    with torch.no_grad():
        for part in parts:
            states.append(random_state())
            embeddings.append(model([tokens[i] for i in part]))
    embeddings = torch.cat(embeddings)[order.argsort()].requires_grad_()
    out = loss_of(embeddings)
    out[0].backward()
    for part, state in zip(parts, states, strict=True):
        set_random_state(state)
        model([tokens[i] for i in part]).backward(embeddings.grad[part])
    return out


def random_state():
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


# ---- model and optimizer


def build(init, s, device):
    """Model to train from a base, a released model or a run of ours -> (model, name of its base).

    The base is frozen in the compute dtype; LoRA and pooling are trained in fp32. A run goes on with its own adapters and
    pooling, unmerged.
    """
    latest = Path(str(init), "latest")
    base = read_json(checkpoint(init) / "state.json")["base"] if latest.exists() else str(init)
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    dtypes["auto"] = nvembed.fast_dtype(device)
    for name in ("dtype", "export_dtype"):
        value = getattr(s, name)
        expect(value in dtypes, f"{name}: expected one of {list(dtypes)}, got {value!r}")
    expect(s.lora_rank > 0, f"lora_rank: expected at least 1, got {s.lora_rank}")
    room = f"micro_tokens: expected at least max_length, {s.max_length}, got {s.micro_tokens}"
    expect(s.micro_tokens >= s.max_length, room)
    torch.manual_seed(s.seed)
    model = NVEmbed.from_pretrained(
        resolve(base), device, dtypes[s.dtype], causal=s.causal, pooling=s.pooling
    )
    nvembed.add_lora(model.requires_grad_(False), s.lora_rank, s.lora_alpha, s.lora_dropout)
    if s.pooling in ("latent", "self"):
        model.latent_attention_model.float().requires_grad_(True)
    for layer in nvembed.lora_layers(model).values():
        layer.requires_grad_(False)
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    if latest.exists():
        load_tensors(trained(model), checkpoint(init) / "trained.safetensors")
    return model, base


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(s, step):
    """Linear warm-up, then linear decay to zero (assumption)."""
    return s.lr * min((step + 1) / max(s.warmup, 1), (s.steps - step) / max(s.steps - s.warmup, 1))


# ---- checkpoints


def checkpoint(run):
    """Folder of the last good checkpoint of a run."""
    return Path(run, Path(run, "latest").read_text().strip())


def last_good(run):
    return checkpoint(run) if Path(run, "latest").exists() else "none"


def load_tensors(tensors, path):
    """Copies a safetensors file into tensors of the same names and shapes; anything else is an InputError."""
    state = nvembed.read_tensors(path)
    for name in tensors.keys() | state.keys():
        fits = name in state and name in tensors and state[name].shape == tensors[name].shape
        expect(
            fits, f"{path}: tensor '{name}': missing, unknown or of another shape; were the settings changed?"
        )
        tensors[name].data.copy_(state[name])


def optimizer_tensors(model, optimizer):
    """AdamW's state by parameter name; an optimizer that has not stepped yet gets its zeros."""
    out = {}
    for name, p in trained(model).items():
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        out |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return out


def save_checkpoint(run, step, model, optimizer, state):
    """Writes run/step_N under a temporary name, fsyncs, renames; then `latest`; then removes the older ones. At every
    moment `latest` names a whole checkpoint. Nothing is pickled."""
    folder, temporary = run / f"step_{step:06d}", run / f".step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_file({n: p.detach().cpu() for n, p in trained(model).items()}, temporary / "trained.safetensors")
        tensors = {name: tensor.cpu() for name, tensor in optimizer_tensors(model, optimizer).items()}
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(random_state(), temporary / "random.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        (run / ".latest").write_text(folder.name + "\n")
        sync(run / ".latest")
        (run / ".latest").rename(run / "latest")
        sync(run)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{temporary}: not saved: {error}; last good checkpoint: {last_good(run)}") from None
    for old in run.glob("step_*"):
        if old != folder:
            shutil.rmtree(old)


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def resume(run, s, model, optimizer, init):
    """Restores the last checkpoint, if there is one -> the number of steps done."""
    if not (run / "latest").exists():
        return 0
    folder = checkpoint(run)
    state = read_json(folder / "state.json")
    for name, value in (dataclasses.asdict(s) | {"init": str(init)}).items():
        was = state["settings"].get(name)
        advice = "; use the same, --restart or another --out"
        expect(was == value, f"{run}: was begun with {name} = {was!r}, now {value!r}{advice}")
    load_tensors(trained(model), folder / "trained.safetensors")
    load_tensors(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    set_random_state(nvembed.read_tensors(folder / "random.safetensors"))
    return state["step"]


# ---- the loop


def open_log(run, head, step):
    """log.jsonl: first what the run is, then a line a step; a resumed run drops the lines after its checkpoint."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() and step else [json.dumps(head)]
    marks = tuple(f'{{"step": {n},' for n in range(step + 1))  # a killed run may leave half a line
    lines = lines[:1] + [line for line in lines[1:] if line.endswith("}") and line.startswith(marks)]
    path.write_text("\n".join(lines) + "\n")
    return path.open("a", buffering=1)


def write_log(log, record):
    """One line of log.jsonl, and the same on the screen."""
    log.write(json.dumps(record) + "\n")
    print(line(record), flush=True)


def describe(s, base, entries):
    """What a run is: versions, hardware, commit, settings, data."""
    git = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    hardware = {"device": device or platform.machine(), "threads": torch.get_num_threads()}
    head = {
        "versions": versions,
        "hardware": hardware,
        "commit": git.stdout.strip() or "unknown",
        "base": base,
    }
    return head | {"settings": dataclasses.asdict(s), "datasets": [entry["name"] for entry in entries]}


def measured_peak(device, dtype):
    """FLOP/s of a large matrix product, the yardstick of `share of peak`."""
    x = torch.ones(2048, 2048, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def peak_memory_gib():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@torch.no_grad()
def held_out(model, datasets, s, positives):
    """Loss and accuracy on the held-out rows of all sets, in batches of the training size, dropout off."""
    rows = [
        (d, row, np.random.default_rng([s.seed, i])) for d in datasets for i, row in enumerate(d.held_out)
    ]
    rows = [rows[i] for i in np.random.default_rng(s.seed).permutation(len(rows))]
    results = []
    model.eval()
    for start in range(0, len(rows) - len(rows) % s.batch or len(rows), s.batch):
        batch = make_batch(model, rows[start : start + s.batch], s, positives)
        parts = pack(batch.tokens, s.micro_tokens)
        order = torch.tensor([i for part in parts for i in part]).argsort()
        embeddings = torch.cat([model([batch.tokens[i] for i in part]) for part in parts])[order]
        results.append(torch.stack(batch_loss(embeddings, batch, s)))
    model.train()
    loss, accuracy = torch.stack(results).mean(dim=0).tolist() if results else (math.nan, math.nan)
    return {"held_out_loss": loss, "held_out_accuracy": accuracy}


def train_step(model, optimizer, batch, s, step):
    """One optimizer step -> its log record, without times."""
    optimizer.param_groups[0]["lr"] = learning_rate(s, step)
    loss, accuracy = backward(model, batch.tokens, lambda e: batch_loss(e, batch, s), s.micro_tokens)
    norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), s.clip)
    record = {
        "step": step + 1,
        "loss": loss.item(),
        "accuracy": accuracy.item(),
        "lr": learning_rate(s, step),
    }
    if math.isfinite(record["loss"]) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record | {"grad_norm": norm.item()}


def train(run, init, entries, stage, s, mined=None):
    """Trains, resumes or finishes one stage in the folder `run`, which ends up as a loadable model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (
        device == "cpu" and sys.platform == "linux"
    ):  # else glibc gives memory back each step, and faults cost a third
        for parameter, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    datasets = read_datasets(entries, stage, s, mined)
    positives, sizes = known_positives(datasets), [len(d.rows) for d in datasets]
    model, base = build(init, s, device)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
    done = resume(run, s, model, optimizer, init)
    if done == s.steps and (run / "config.json").exists():
        print(f"{run}: finished already; --restart trains it anew")
        return
    log, stop = open_log(run, describe(s, base, entries), done), []
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {sum(p.numel() for p in trained(model).values()):,} of them trained")
    print(
        f"global batch {s.batch} = 1 rank x {s.batch} rows, micro-batches of at most {s.micro_tokens} tokens"
    )
    matrices = count - model.embedding_model.embed_tokens.weight.numel()
    peak = measured_peak(device, model.dtype)
    for number in (signal.SIGTERM, signal.SIGINT):  # finish the step, save, exit 0
        signal.signal(number, lambda *_: stop.append(True))
    if not done:
        write_log(log, {"step": 0} | held_out(model, datasets, s, positives))
    model.train()
    began = time.perf_counter()
    for step in range(done, s.steps):
        start, where = time.perf_counter(), schedule(sizes, s, step)
        rows = [
            (datasets[d], datasets[d].rows[i], np.random.default_rng([s.seed, e, d, i])) for e, d, i in where
        ]
        batch = make_batch(model, rows, s, positives)
        record = train_step(model, optimizer, batch, s, step)
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            names = ", ".join(f"{datasets[d].name}[{i}]" for _, d, i in where)
            raise InputError(f"{line(record)}: not finite; rows {names}; last checkpoint: {last_good(run)}")
        seconds, tokens = time.perf_counter() - start, sum(len(t.ids) for t in batch.tokens)
        passes = (
            4 if len(pack(batch.tokens, s.micro_tokens)) == 1 else 6
        )  # FLOPs a weight and token: forward 2,
        share = passes * matrices * tokens / seconds / peak  # backward to the inputs 2, the cache's forward 2
        left = (time.perf_counter() - began) / (step + 1 - done) * (s.steps - step - 1)
        record |= {"tokens_per_s": tokens / seconds, "share_of_peak": share, "memory_gib": peak_memory_gib()}
        record |= {"seconds_left": left}
        last = step + 1 == s.steps
        if last or (step + 1) % s.eval_every == 0:
            record |= held_out(model, datasets, s, positives)
        write_log(log, record)
        if last or stop or (step + 1) % s.save_every == 0:
            state = {"step": step + 1, "base": base, "settings": dataclasses.asdict(s) | {"init": str(init)}}
            save_checkpoint(run, step + 1, model, optimizer, state)
        if stop and not last:
            print(f"stopped after step {step + 1}; the same command goes on from here")
            return
    nvembed.attempt(f"{run}: trained, not exported", export, model, run, base, s, datasets)


def line(record):
    """One printed line a step."""
    shown = {name: value if isinstance(value, int) else f"{value:.4g}" for name, value in record.items()}
    if "seconds_left" in shown:
        shown["seconds_left"] = f"{record['seconds_left']:.0f}"
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def export(model, run, base, s, datasets):
    """Writes the finished run as a model folder and a PEFT adapter; prints the cosine of merged against adapted."""
    texts = [row["pos"][0] for dataset in datasets for row in (dataset.held_out or dataset.rows)[:16]]
    nvembed.save_adapter(model.eval(), run / "adapter", base)
    model.save_pretrained(run, model.dtype if s.export_dtype == "auto" else getattr(torch, s.export_dtype))
    model.dtype = torch.float32  # both in fp32 arithmetic: what is left is the rounding of the merged weights
    merged = NVEmbed.from_pretrained(run, model.device, torch.float32)
    cosine = (model.encode(texts) * merged.encode(texts)).sum(axis=1)
    print(f"{run}: saved in {s.export_dtype}; cosine of merged against adapted: lowest {cosine.min():.6f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--stage", type=int, choices=(1, 2), default=1)
    flag("--recipe", default=str(ROOT / "data" / "local.json"))
    flag("--data", help="own rows (.jsonl or .jsonl.gz) instead of the recipe's")
    flag("--init", help="model to begin with: folder, hub id or run; default: the base, then runs/stage1")
    flag("--out", help="folder of the run; default: runs/stage1, runs/stage2 or runs/NAME-OF-DATA")
    flag("--mined", help="folder of mine.py's output, used where it has a data set's file")
    flag("--restart", action="store_true", help="begin anew, removing an earlier run in --out")
    for field in dataclasses.fields(Settings):
        kind = {"type": field.type} if field.type is not bool else {"action": argparse.BooleanOptionalAction}
        flag("--" + field.name.replace("_", "-"), default=None, **kind)
    args = parser.parse_args()
    expect(int(os.environ.get("WORLD_SIZE", 1)) == 1, "torchrun: expected one process (--nproc-per-node 1)")
    recipe = read_recipe(args.recipe)
    kinds = {field.name: field.type for field in dataclasses.fields(Settings)}
    given = recipe["stages"].get(str(args.stage), {})
    for name, value in given.items():
        expect(name in kinds, f"{args.recipe}: stages.{args.stage}: unknown setting '{name}'")
        fits = type(value) in ((int, float) if kinds[name] is float else (kinds[name],))
        expect(
            fits, f"{args.recipe}: stages.{args.stage}.{name}: expected {kinds[name].__name__}, got {value!r}"
        )
    flags = {name: value for name, value in vars(args).items() if name in kinds and value is not None}
    s = Settings(**({"seed": recipe["seed"]} | given | flags))
    entries, name = recipe["datasets"], f"stage{args.stage}"
    if args.data:
        name = Path(args.data).name.removesuffix(".gz").removesuffix(".jsonl")
        entries = [{"name": name, "file": args.data, "stages": [args.stage], "instruction": ""}]
    run = Path(args.out or Path("runs", name))
    init = args.init or ("runs/stage1" if args.stage == 2 and not args.data else recipe["base"])
    ready = init != "runs/stage1" or Path(init, "config.json").exists()
    expect(ready, f"{init}: no finished run; run --stage 1 first")
    if args.restart and (run / "log.jsonl").exists():
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    train(run, init, entries, args.stage, s, args.mined)


if __name__ == "__main__":
    nvembed.run(main)
