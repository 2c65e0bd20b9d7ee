"""How NV-Embed learns: rows, batches, InfoNCE, LoRA, cached gradients, FSDP2, checkpoints (sections 3 and 5).

    torchrun train.py --stage 1                                  retrieval, in-batch negatives -> runs/stage1
    torchrun train.py --stage 2                                  all tasks, in-batch off       -> runs/stage2
    torchrun train.py --stage 3                                  prune, then recover by distillation -> runs/stage3
    torchrun train.py --stage 3 --quantize int4 --init runs/stage3 --out runs/int4
    torchrun train.py --data my.jsonl --init nvidia/NV-Embed-v2  own rows                      -> runs/my
    torchrun --nproc-per-node 8 train.py --stage 1               the same steps on 8 ranks, weights sharded

Run the same command again to go on where it was stopped. Dimensions: B rows a step, b of them this rank's, N
hard negatives a row, M = B (1 + N) documents, P positives a query has, D width.
"""

import argparse
import functools
import hashlib
import importlib
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import nvembed
from data.prepare import read_recipe, read_rows, resolve
from nvembed import InputError, NVEmbed, expect, pack, read_json

ROOT = Path(__file__).resolve().parent


@dataclass
class Settings:
    """One stage. Defaults are the paper's or, where it is silent, the assumptions that the README lists; a
    recipe's stage overrides them, and each is a command-line flag, which overrides the recipe."""

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
    lora_rank: int = 16  # 0: full fine-tuning
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    pooling: str = "latent"
    causal: bool = False
    dtype: str = "auto"  # of the frozen base and the arithmetic; trained weights are always fp32
    export_dtype: str = "bfloat16"
    recompute: bool = False  # activation checkpointing: a block keeps its input only
    compile: bool = False  # torch.compile of the blocks around attention; eager where there is no compiler
    shard_ranks: int = 0  # ranks that share one copy of the weights, for instance a node's; 0: all
    prune: str = "none"  # what stage 3 begins with: "magnitude", "wanda" or "sparsegpt"
    sparsity: str = "0.5"  # share of the decoder's weights that become zero, or "2:4"
    drop_blocks: int = 0  # blocks that are left out, those which change the states least
    quantize: str = "none"  # one of nvembed.FORMATS: stage 3 prunes and trains nothing then
    calibration: int = 128  # rows whose texts are read for pruning and rounding; 0: quantised to nearest
    distill: float = 0.0  # weight of the distillation from the model as it was before pruning
    held_out: int = 64  # rows of each set kept from training for the held-out loss
    eval_every: int = 100
    save_every: int = 50
    keep: bool = False  # at every checkpoint also a loadable model, RUN/kept_STEP; one rank
    seed: int = 0


# ---- ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def tell(*args):
    if rank() == 0:
        print(*args, flush=True)


def reduced(values, device, op=dist.ReduceOp.SUM):
    """list of numbers -> the list reduced over the ranks; the same on all of them."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(values, op)
    return values.tolist()


class Gather(torch.autograd.Function):
    """x (b, ...) of every rank -> (ranks x b, ...) on all. The gradient of a rank's x is its part of the
    gradients of all ranks, summed: with parameter gradients averaged over ranks that is the whole batch's
    gradient."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world() * len(x), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.contiguous())
        return grad.chunk(world())[rank()]


def join():
    """Joins torchrun's ranks, if there are several -> device of this one."""
    cuda, ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


# ---- rows

# symmetric: the instruction goes on documents too (STS, clustering)
Dataset = namedtuple("Dataset", "name instruction symmetric rows held_out")


def read_datasets(entries, stage, s, mined=None):
    """Recipe entries of a stage -> list of Dataset: capped at `samples` rows, `held_out` of them set apart,
    by seed."""
    expect(s.short in ("pad", "fail"), f"short: expected pad or fail, got {s.short!r}")
    expect(not mined or Path(mined).is_dir(), f"--mined {mined}: no such folder")
    datasets = []
    for entry in (entry for entry in entries if stage in entry["stages"]):
        path = Path(entry["file"])
        if mined and Path(mined, path.name).exists():
            path = Path(mined, path.name)
        rows = read_rows(path)
        for line, found in enumerate((len(row["neg"]) for row in rows), 1):
            enough = s.short == "pad" or found >= s.negatives
            expect(enough, f"{path}:{line}: field 'neg': expected {s.negatives} texts, got {found}")
        order, cut = np.random.default_rng(s.seed).permutation(len(rows)), min(s.held_out, len(rows) // 10)
        parts = order[cut:][: entry.get("samples")], order[:cut]
        kept, held = ([rows[i] for i in part] for part in parts)
        what = entry["name"], entry["instruction"], entry.get("symmetric", False)
        datasets.append(Dataset(*what, kept, held))
        tell(f"{entry['name']}: {len(kept)} rows of {path}, {cut} held out")
    expect(datasets, f"recipe: expected a data set of stage {stage}, got none")
    rows = sum(len(dataset.rows) for dataset in datasets)
    expect(1 <= s.batch <= rows, f"batch: expected at most {rows}, the rows there are, got {s.batch}")
    expect(s.batch % world() == 0, f"batch: expected a multiple of the {world()} ranks, got {s.batch}")
    return datasets


@functools.lru_cache(maxsize=4)
def epoch_order(sizes, batch, batching, seed, epoch):
    """Global row numbers in the order of an epoch. blended: one permutation of all rows. task: batches of one
    set each, shuffled; what does not fill a batch waits for another epoch's permutation."""
    rng, starts = np.random.default_rng([seed, epoch]), np.cumsum([0, *sizes])
    if batching == "blended":
        return rng.permutation(starts[-1])
    expect(batching == "task", f"batching: expected blended or task, got {batching!r}")
    expect(max(sizes) >= batch, f"batch: expected at most {max(sizes)}, the largest set's rows, got {batch}")
    shuffled = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=False)]
    batches = [rows[i : i + batch] for rows in shuffled for i in range(0, len(rows) - batch + 1, batch)]
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def schedule(sizes, s, step):
    """Rows of a step as (epoch, data set, row): a pure function of its arguments, so a resume needs no more
    than the step, and any number of ranks sees the same batches. Epochs follow each other without a gap."""
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


def known_positives(datasets):
    """query -> set of text_ids of every positive that any row gives it: none of them is ever a negative."""
    positives = defaultdict(set)
    for row in (row for dataset in datasets for row in dataset.rows + dataset.held_out):
        positives[row["query"]] |= {text_id(text) for text in row["pos"]}
    return positives


# tokens: Tokens of this rank's b queries, then of their valid documents, in row order. Of all B rows: valid
# (B, 1 + N) bool, column 0 the positive, False pads a short list of negatives; document_ids (B, 1 + N) and
# positive_ids (B, P), all known positives of the query padded with the first, are `text_id`s.
Batch = namedtuple("Batch", "tokens valid document_ids positive_ids")


def make_batch(model, rows, s, positives):
    """rows: all B as (Dataset, row, rng) -> Batch. A row's positive, and its negatives beyond N, are drawn by
    its rng."""
    queries, documents, valid, ids, known = [], [], [], [], []
    for dataset, row, rng in rows:
        positive = row["pos"][rng.integers(len(row["pos"]))]
        order = range(len(row["neg"])) if len(row["neg"]) <= s.negatives else rng.permutation(len(row["neg"]))
        texts = [positive] + [row["neg"][i] for i in order[: s.negatives]]
        instruction, padding = row.get("prompt", dataset.instruction), 1 + s.negatives - len(texts)
        queries.append((instruction, row["query"]))
        documents.append([(instruction if dataset.symmetric else "", text) for text in texts])
        valid.append([True] * len(texts) + [False] * padding)
        ids.append([text_id(text) for text in texts] + [0] * padding)
        known.append(sorted(positives[row["query"]]))
    width = max(map(len, known))
    known = [row + row[:1] * (width - len(row)) for row in known]
    own = slice(rank() * len(rows) // world(), (rank() + 1) * len(rows) // world())
    tasks, texts = zip(*queries[own], *(pair for pairs in documents[own] for pair in pairs), strict=True)
    return Batch(model.tokenize(texts, tasks, s.max_length), *map(torch.tensor, (valid, ids, known)))


# ---- loss


def info_nce(q_BD, d_BND, batch, temperature, in_batch):
    """InfoNCE (section 3.1) of this rank's b queries against all M = B (1 + N) documents, unit vectors
    -> (loss, accuracy), scalars.

    A row's target is its column 0. With in_batch its negatives are all other columns of the batch, else its
    own hard negatives. A column whose text is a known positive of the query is never a negative, nor is
    padding.
    """
    b, n = len(q_BD), d_BND.shape[1]
    scores = q_BD @ d_BND.flatten(0, 1).T / temperature  # (b, M)
    row = torch.arange(rank() * b, (rank() + 1) * b)  # of the batch
    ids, positive_ids = batch.document_ids.flatten()[None, :, None], batch.positive_ids[row, None, :]
    use = batch.valid.flatten()[None] & ~(ids == positive_ids).any(-1)  # (b, M)
    if not in_batch:
        use &= row[:, None] == torch.arange(len(batch.valid)).repeat_interleave(n)[None]
    use[row - rank() * b, row * n] = True
    scores, target = scores.masked_fill(~use.to(scores.device), -torch.inf), (row * n).to(scores.device)
    return F.cross_entropy(scores, target), (scores.argmax(dim=1) == target).float().mean()


def queries_documents(embeddings, batch):
    """embeddings of batch.tokens, in their order (number of texts, D) -> this rank's q_bD, all ranks' d_BND."""
    valid = batch.valid.chunk(world())[rank()].to(embeddings.device)
    d_bND = embeddings.new_zeros(*valid.shape, embeddings.shape[1])
    d_bND[valid] = embeddings[len(valid) :]
    return embeddings[: len(valid)], Gather.apply(d_bND) if world() > 1 else d_bND


def distillation(embeddings, target, batch, s):
    """How far this rank's embeddings are from the teacher's, `target`, both (number of texts, D) -> scalar: the mean
    of (1 - cosine) / temperature over the batch's texts, and over its queries KL(teacher || student) of the softmax
    of the scores of all valid documents of the batch; both losses are ours."""
    valid = batch.valid.flatten().to(embeddings.device)
    pairs = (queries_documents(x, batch) for x in (embeddings, target))
    log_p = [(q @ d.flatten(0, 1)[valid].T / s.temperature).log_softmax(dim=1) for q, d in pairs]  # (b, M)
    apart = (1 - (embeddings * target).sum(dim=1)).sum() * world() / (len(batch.valid) + valid.sum())
    return s.distill * (apart / s.temperature + F.kl_div(*log_p, reduction="batchmean", log_target=True))


def batch_loss(embeddings, batch, s, target=None):
    """embeddings of batch.tokens and, if there is a teacher, its own -> (loss, accuracy) of this rank's rows."""
    q_bD, d_BND = queries_documents(embeddings, batch)
    loss, accuracy = info_nce(q_bD, d_BND, batch, s.temperature, s.in_batch)
    return loss if target is None else loss + distillation(embeddings, target, batch, s), accuracy


def reseed(*key):
    """Dropout is a function of (seed, step, rank, micro-batch): the cache replays it, a resume needs no state
    of it."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def micro_batches(model, tokens, micro_tokens):
    """Indices into tokens, a list a micro-batch; as many on every rank, since shards are gathered in step: a
    rank that has fewer embeds its last text again, to no effect."""
    parts = pack(tokens, micro_tokens)
    (most,) = reduced([len(parts)], model.device, dist.ReduceOp.MAX)
    return parts + [parts[-1][-1:]] * (int(most) - len(parts))


def embed(model, tokens, parts, key):
    """The texts' embeddings (number of texts, D) in order, by micro-batches."""
    found = []
    for i, part in enumerate(parts):
        reseed(*key, i)
        found.append(model([tokens[j] for j in part]))
    order = torch.tensor([i for part in parts for i in part][: len(tokens)], device=model.device)
    return torch.cat(found)[: len(tokens)][order.argsort()]


def backward(model, tokens, loss_of, micro_tokens, key=(0,), cached=True):
    """Accumulates the gradient of loss_of(embeddings (number of texts, D)) -> (loss, ...); returns what
    loss_of did.

    Cached gradients (GradCache, Gao et al. 2021): embed all micro-batches without graph, take the loss's
    gradient at the embeddings, then run each micro-batch again with graph and the same dropout. Peak memory
    is one micro-batch's; a batch that is a single micro-batch needs no cache.
    """
    parts, done = micro_batches(model, tokens, micro_tokens), 0
    cached = cached and len(parts) > 1
    with torch.set_grad_enabled(not cached):
        embeddings = embed(model, tokens, parts, key)
    out = loss_of(embeddings.requires_grad_() if cached else embeddings)
    out[0].backward()
    for i, part in enumerate(parts if cached else ()):
        if isinstance(model, FSDPModule):  # the ranks reduce the gradient once, after the last micro-batch
            model.set_requires_gradient_sync(i + 1 == len(parts))
        reseed(*key, i)
        model([tokens[j] for j in part]).backward(embeddings.grad[part] * (done < len(tokens)))
        done += len(part)
    return out


# ---- model and optimizer


def make_mesh(device, s):
    """All ranks share one copy of the weights, or each group of shard_ranks has one (hybrid sharding)."""
    group = s.shard_ranks or world()
    expect(world() % group == 0, f"shard_ranks: expected a divisor of the {world()} ranks, got {group}")
    shape, names, whole = (world() // group, group), ("copy", "shard"), group == world()
    return dist.init_device_mesh(device.type, shape[whole:], mesh_dim_names=names[whole:])


def load(init, s, device):
    """A model in the dtype to compute in, not yet on its device, read as the settings say."""
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    dtypes["auto"] = nvembed.fast_dtype(device)
    for name, value in (("dtype", s.dtype), ("export_dtype", s.export_dtype)):
        expect(value in dtypes, f"{name}: expected one of {list(dtypes)}, got {value!r}")
    model = NVEmbed.from_pretrained(resolve(init), None, dtypes[s.dtype], causal=s.causal, pooling=s.pooling)
    expect(not (model.config.quantize or nvembed.lora_layers(model)), f"{init}: expected plain weights")
    return model


def place(model, s, device, sharded=True):
    """Moves a model to its device, a block at a time, and keeps this rank's shard -> model."""
    mesh = make_mesh(device, s) if sharded and world() > 1 else None
    for module in [*model.embedding_model.layers, *[*model.children()][1:], model]:
        for p in module.parameters():
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else model.dtype)
        if mesh:
            fully_shard(module, mesh=mesh)
    return model


def build(init, s, device, sharded=True):
    """Model to train from a base, a released model or a run of ours -> (model, name of its base).

    Frozen weights are in the compute dtype, trained ones (LoRA or everything, and pooling) in fp32. A run
    goes on with its own adapters and pooling, unmerged; with another lora_rank, from its merged model. The
    base's file is mapped, not read: a rank moves a block at a time to its device and keeps its shard.
    """
    state = Path(str(init), "latest").exists() and read_json(checkpoint(init) / "state.json")
    goes_on = state and state["settings"]["lora_rank"] == s.lora_rank
    base = state["base"] if goes_on else str(init)
    expect(s.lora_rank >= 0, f"lora_rank: expected 0 or more, got {s.lora_rank}")
    expect(s.micro_tokens >= s.max_length, f"micro_tokens: expected at least a text's {s.max_length} tokens")
    torch.manual_seed(s.seed)
    model = load(base, s, device).requires_grad_(not s.lora_rank)
    expect(not (model.config.pruned and s.lora_rank and s.lora_dropout), "lora_dropout: expected 0 (pruned)")
    if s.lora_rank:
        nvembed.add_lora(model, s.lora_rank, s.lora_alpha, s.lora_dropout)
    for part, name in nvembed.projections(model):
        part[name].masked = model.config.pruned
    for block in model.embedding_model.layers:
        block.recompute = s.recompute
    if s.compile:
        model.compile_blocks()
    torch.nn.ModuleList([*model.children()][1:]).requires_grad_(True)  # the pooling
    place(model, s, torch.device(device), sharded)
    if goes_on:
        load_tensors(trained(model), checkpoint(init) / "trained.safetensors")
    return model, base


def compress(run, init, datasets, s, device):
    """What stage 3 begins with: prunes a model into run/pruned, or quantises it into `run`, by calibration on the
    first rows of a schedule; a run that has begun is not pruned again -> folder of the compressed model. All ranks
    do it, on rows of their own, and rank 0's is written: the same on any number of ranks."""
    rounds, rows, tokens = s.quantize != "none", [d.rows for d in datasets], []
    folder = run / "pruned" if s.steps and not rounds else run
    if (run / "latest").exists():
        expect(folder != run, f"{run}: is a training run; expected another --out where nothing is trained")
        return folder
    model, nearest = load(init, s, device).to(device), rounds and not s.drop_blocks
    if count := world() * max(0, min(s.calibration, sum(map(len, rows)) // world())):
        places = schedule([*map(len, rows)], replace(s, batch=count, batching="blended"), 0)
        tokens = make_batch(model, drawn(rows, datasets, places, s), s, known_positives(datasets)).tokens
    expect(tokens or nearest, f"calibration: expected at least 1 row to prune by, got {s.calibration}")
    if s.drop_blocks:
        nvembed.drop_blocks(model, tokens, s.drop_blocks)
    if rounds:
        model.config = replace(model.config, quantize=s.quantize)
        nvembed.compress(model, tokens, lambda *layer: nvembed.quantize(*layer, s.quantize))
    elif s.prune != "none":
        model.config.pruned = True
        nvembed.compress(model, tokens, lambda *layer: nvembed.prune(*layer, s.prune, s.sparsity))
    if rank() == 0:
        model.save_pretrained(folder, getattr(torch, s.export_dtype, None))
    reduced([0], device)  # the folder is there
    return folder


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


@torch.no_grad()
def load_tensors(tensors, path):
    """Copies a safetensors file into tensors of the same names and shapes; anything else is an InputError."""
    state = nvembed.read_tensors(path)
    for name in tensors.keys() | state.keys():
        fits = name in state and name in tensors and state[name].shape == tensors[name].shape
        expect(fits, f"{path}: tensor '{name}': missing or of another shape; were the settings changed?")
        p, value = tensors[name], state[name]
        if isinstance(p, DTensor):  # each rank takes its shard
            value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(value)


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
    """Rank 0 writes run/step_N under a temporary name, fsyncs, renames; then `latest`; then removes the older
    ones. At every moment `latest` names a whole checkpoint. Nothing is pickled."""
    parts = {"trained": trained(model), "optimizer": optimizer_tensors(model, optimizer)}
    for tensors in parts.values():
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            tensors[name] = tensor.detach().cpu() if rank() == 0 else None
    if rank() > 0:
        return
    folder, temporary = run / f"step_{step:06d}", run / f".step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, tensors in parts.items():
            save_file(tensors, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        sync(*temporary.iterdir(), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        (run / ".latest").write_text(folder.name + "\n")
        sync(run / ".latest")
        (run / ".latest").rename(run / "latest")
        sync(run)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{temporary}: not saved: {error}; last good checkpoint: {last_good(run)}") from None
    for old in set(run.glob("step_*")) - {folder}:
        shutil.rmtree(old)


def sync(*paths):
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def resume(run, settings, model, optimizer):
    """Restores the last checkpoint, if there is one -> the number of steps done."""
    if not (run / "latest").exists():
        return 0
    state = read_json((folder := checkpoint(run)) / "state.json")
    for name, value in settings.items():
        was, advice = state["settings"].get(name), "; use the same, --restart or another --out"
        expect(was == value, f"{run}: was begun with {name} = {was!r}, now {value!r}{advice}")
    load_tensors(trained(model), folder / "trained.safetensors")
    load_tensors(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    return state["step"]


# ---- the loop


def open_log(run, head, step):
    """Rank 0's log.jsonl: first what the run is, then a line a step; a resumed run drops what is after its
    checkpoint."""
    if rank() > 0:
        return open(os.devnull, "w")
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() and step else [json.dumps(head)]
    marks = tuple(f'{{"step": {n},' for n in range(step + 1))  # a killed run may leave half a line
    lines = lines[:1] + [line for line in lines[1:] if line.endswith("}") and line.startswith(marks)]
    path.write_text("\n".join(lines) + "\n")
    return path.open("a", buffering=1)


def write_log(log, record):
    """One line of log.jsonl, the same on the screen and, if asked for, in tensorboard's file."""
    file, board = log
    file.write(json.dumps(record) + "\n")
    tell(line(record))
    for name in record if board else ():
        board.add_scalar(name, record[name], record["step"])


def line(record):
    """One printed line a step."""
    return "  ".join(f"{k} {v if isinstance(v, int) else format(v, '.4g')}" for k, v in record.items())


def describe(s, base, datasets):
    """What a run is: versions, hardware, commit, settings, data."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    hardware = {"device": device or platform.machine(), "threads": torch.get_num_threads(), "ranks": world()}
    head = {"versions": versions, "hardware": hardware, "commit": commit or "unknown", "base": base}
    return head | {"settings": asdict(s), "datasets": [dataset.name for dataset in datasets]}


def measured_peak(device, dtype):
    """FLOP/s of a large matrix product, the yardstick of `share of peak`."""
    x, best = torch.ones(2048, 2048, device=device, dtype=dtype), math.inf
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
    places = [(0, d, i) for d, dataset in enumerate(datasets) for i in range(len(dataset.held_out))]
    places = [places[i] for i in np.random.default_rng(s.seed).permutation(len(places))]
    size, results = min(s.batch, len(places) - len(places) % world()), []
    model.eval()
    for start in range(0, len(places) - size + 1, size) if size else ():
        rows = drawn([d.held_out for d in datasets], datasets, places[start : start + size], s)
        batch = make_batch(model, rows, s, positives)
        embeddings = embed(model, batch.tokens, micro_batches(model, batch.tokens, s.micro_tokens), (s.seed,))
        results.append(torch.stack(batch_loss(embeddings, batch, s)).tolist())
    model.train()
    means = reduced((np.mean(results, axis=0) / world()).tolist(), model.device) if results else ()
    return dict(zip(("held_out_loss", "held_out_accuracy"), means, strict=False))


def drawn(rows, datasets, places, s):
    """Places as `schedule` gives them -> list of (Dataset, row, its own random generator)."""
    return [(datasets[d], rows[d][i], np.random.default_rng([s.seed, e, d, i])) for e, d, i in places]


def train_step(model, optimizer, batch, s, step, teacher=None):
    """One optimizer step -> its log record, without times."""
    optimizer.param_groups[0]["lr"] = rate = learning_rate(s, step)
    key, tokens = (s.seed, step, rank()), batch.tokens
    target = teacher and embed(teacher, tokens, micro_batches(teacher, tokens, s.micro_tokens), key)
    out = backward(model, tokens, lambda e: batch_loss(e, batch, s, target), s.micro_tokens, key)
    norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), s.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    loss, accuracy = (value / world() for value in reduced([out[0].item(), out[1].item()], model.device))
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": step + 1, "loss": loss, "accuracy": accuracy, "lr": rate, "grad_norm": norm}


def speed(model, batch, s, seconds, peak):
    """Figures of a step over all ranks. FLOPs a weight and token: forward 2, backward to the inputs 2, the
    cache's forward 2, backward to the weights 2 if they are trained, a teacher's forward 2; attention and embedding
    are not counted."""
    (rate,) = reduced([sum(len(t.ids) for t in batch.tokens) / seconds], model.device)
    weights = sum(p.numel() for p in model.parameters()) - model.embedding_model.embed_tokens.weight.numel()
    flops = 4 + 2 * ((len(pack(batch.tokens, s.micro_tokens)) > 1) + (s.lora_rank == 0) + (s.distill > 0))
    share = flops * weights * rate / peak / world()
    return {"tokens_per_s": rate, "share_of_peak": share, "memory_gib": peak_memory_gib()}


def train(run, init, datasets, s, device, board=None):
    """Trains, resumes or finishes one stage in the folder `run`, which ends up as a loadable model."""
    settings, stop = asdict(s) | {"init": str(init)}, []
    compressed = s.prune != "none" or s.drop_blocks or s.quantize != "none"
    start = nvembed.attempt(str(run), compress, run, init, datasets, s, device) if compressed else init
    if start == run:
        return tell(f"{run}: compressed, not trained")
    model, base = build(start, s, device)
    teacher = place(load(init, s, device).requires_grad_(False), s, device) if s.distill else None
    optimizer = torch.optim.AdamW(trained(model).values(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
    done = resume(run, settings, model, optimizer)
    if done == s.steps and (run / "config.json").exists():
        return tell(f"{run}: finished already; --restart trains it anew")
    counts = [sum(p.numel() for p in part) for part in (model.parameters(), trained(model).values())]
    tell("{:,} parameters, {:,} of them trained".format(*counts))
    ranks = f"global batch {s.batch} = {world()} rank{'s'[: world() - 1]} x {s.batch // world()} rows"
    tell(f"{ranks}, micro-batches of at most {s.micro_tokens} tokens")
    positives, sizes = known_positives(datasets), [len(d.rows) for d in datasets]
    log, peak = (open_log(run, describe(s, base, datasets), done), board), measured_peak(device, model.dtype)
    for number in (signal.SIGTERM, signal.SIGINT):  # finish the step, save, exit 0
        signal.signal(number, lambda *_: stop.append(True))
    if not done:
        write_log(log, {"step": 0} | held_out(model, datasets, s, positives))
    model.train()
    began = time.perf_counter()
    for step in range(done, s.steps):
        start, places, last = time.perf_counter(), schedule(sizes, s, step), step + 1 == s.steps
        batch = make_batch(model, drawn([d.rows for d in datasets], datasets, places, s), s, positives)
        record = train_step(model, optimizer, batch, s, step, teacher)
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            names = ", ".join(f"{datasets[d].name}[{i}]" for _, d, i in places)
            raise InputError(f"{line(record)}: not finite; rows {names}; last checkpoint: {last_good(run)}")
        now = time.perf_counter()
        record |= speed(model, batch, s, now - start, peak)
        record["seconds_left"] = round((s.steps - step - 1) * (now - began) / (step + 1 - done))
        if last or (step + 1) % s.eval_every == 0:
            record |= held_out(model, datasets, s, positives)
        write_log(log, record)
        (stopping,) = reduced([len(stop)], device)
        if last or stopping or (step + 1) % s.save_every == 0:
            state = {"step": step + 1, "base": base, "settings": settings}
            save_checkpoint(run, step + 1, model, optimizer, state)
            if s.keep:
                expect(world() == 1, f"keep: expected one rank, got {world()}")
                model.save_pretrained(run / f"kept_{step + 1:06d}", model.dtype)
        if stopping and not last:
            return tell(f"stopped after step {step + 1}; the same command goes on from here")
    del model, optimizer, teacher
    if rank() == 0:
        nvembed.attempt(f"{run}: trained, not exported", export, run, s, datasets, device)


def export(run, s, datasets, device):
    """Writes the finished run as a model folder and a PEFT adapter; prints the cosine of merged against
    adapted."""
    model, base = build(run, replace(s, compile=False), device, sharded=False)
    texts = [row["pos"][0] for dataset in datasets for row in (dataset.held_out or dataset.rows)[:16]]
    if s.lora_rank and not model.config.pruned:  # PEFT would fill the zeros
        nvembed.save_adapter(model.eval(), run / "adapter", base)
    model.save_pretrained(run, getattr(torch, s.export_dtype, None))
    model.dtype = torch.float32  # both in fp32 arithmetic: what is left is the rounding of the merged weights
    merged = NVEmbed.from_pretrained(run, device, torch.float32)
    cosine = (model.encode(texts) * merged.encode(texts)).sum(axis=1)
    print(f"{run}: saved in {s.export_dtype}; cosine of merged against adapted: lowest {cosine.min():.6f}")


def read_settings(recipe, path, stage, flags):
    """Settings of a stage: the defaults, what the recipe says, what the flags say."""
    kinds, given = {f.name: f.type for f in fields(Settings)}, recipe["stages"].get(str(stage), {})
    for name, value in given.items():
        expect(name in kinds, f"{path}: stages.{stage}: unknown setting '{name}'")
        fits = type(value) in ((int, float) if kinds[name] is float else (kinds[name],))
        expect(fits, f"{path}: stages.{stage}.{name}: expected {kinds[name].__name__}, got {value!r}")
    flags = {name: value for name, value in flags.items() if name in kinds and value is not None}
    return Settings(**({"seed": recipe["seed"]} | given | flags))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--stage", type=int, choices=(1, 2, 3), default=1)
    flag("--recipe", default=str(ROOT / "data" / "local.json"))
    flag("--data", help="own rows (.jsonl or .jsonl.gz) instead of the recipe's")
    flag("--init", help="model to begin with: folder, hub id or run; default: the base or the stage before")
    flag("--out", help="folder of the run; default: runs/stageN or runs/NAME-OF-DATA")
    flag("--mined", help="folder of mine.py's output, used where it has a data set's file")
    flag("--restart", action="store_true", help="begin anew, removing an earlier run in --out")
    flag("--tensorboard", metavar="DIR", help="also write what log.jsonl says for tensorboard")
    for field in fields(Settings):
        kind = {"type": field.type} if field.type is not bool else {"action": argparse.BooleanOptionalAction}
        flag("--" + field.name.replace("_", "-"), default=None, **kind)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    s = read_settings(recipe, args.recipe, args.stage, vars(args))
    entries, name, stage = recipe["datasets"], f"stage{args.stage}", min(args.stage, 2)  # 3: rows of stage 2
    if args.data:
        name = Path(args.data).name.removesuffix(".gz").removesuffix(".jsonl")
        entries = [{"name": name, "file": args.data, "stages": [stage], "instruction": ""}]
    run = Path(args.out or Path("runs", name))
    before = f"runs/stage{args.stage - 1}"
    init = args.init or (before if args.stage > 1 and not args.data else recipe["base"])
    ready = init != before or Path(init, "config.json").exists()
    expect(ready, f"{init}: no finished run; run --stage {args.stage - 1} first")
    device, board = join(), None
    if args.tensorboard and rank() == 0:
        what = "--tensorboard: expected the package tensorboard"
        tensorboard = nvembed.attempt(what, importlib.import_module, "torch.utils.tensorboard")
        board = tensorboard.SummaryWriter(args.tensorboard)
    datasets = read_datasets(entries, stage, s, args.mined)
    if rank() == 0:
        if args.restart and (run / "log.jsonl").exists():
            shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
    reduced([0], device)  # the folder is there
    train(run, init, datasets, s, device, board)
    if world() > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    nvembed.run(main)
