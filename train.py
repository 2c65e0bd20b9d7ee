"""How NV-Embed learns: rows -> batch -> InfoNCE -> step (sections 3 and 5 of the paper).

    python train.py --stage 1                          # -> runs/stage1
    python train.py --stage 2 --mined runs/mined       # -> runs/stage2
    python train.py --data my.jsonl --init MODEL       # own rows -> runs/my
    torchrun --nproc-per-node 8 train.py --stage 1     # the same batches on 8 ranks, FSDP

A recipe (data/local.json) says what a stage does:

    stage   begins with      negatives of a query                        trained
    1       the base         all other documents of the batch            LoRA and pooling
    2       runs/stage1      its own hard negatives                      the same, further
    3       runs/pruned      its own; distilled from runs/stage2         all weights that are not 0

Repeating a command that was stopped goes on where it stopped. Who calls whom:

    main -> train -> timed_step -> make_batch
                                -> train_step -> backward -> embed, batch_loss -> info_nce
                  -> held_out      the loss of rows that are not trained on
                  -> save          a checkpoint
                  -> export        the finished model

Shapes, beside those of nvembed.py:

    B rows of a step        b of them on this rank      L = 1 + N documents of a row
    M = B L documents       N hard negatives of a row   P known positives of a query
"""

import data.threads  # before torch

import gc
import math
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import nvembed
from data.base import resolve
from data.columns import data_entry
from data.commands import Flags, InputError, check_ranges, run_command
from data.files import ROOT, read_json
from data.machine import choose_micro_tokens, describe_machine, fast_dtype, measure_peak, speed
from data.ranks import Stopped, all_gather, all_reduce, catch_signals, check_agreement, check_stop
from data.ranks import init_ranks, leave_ranks, make_mesh, print0, rank, world_size
from data.recipes import read_recipe, stage_settings
from data.rows import text_id
from data.runs import RunLog, check_loss, check_teacher, checkpoint, content, finish, is_finished
from data.runs import load_tensors, print_sizes, resume, run_folder, save_checkpoint, trained, whole
from data.sampling import check_batch, check_prompts, draw_documents, draw_rows
from data.sampling import known_positives, read_datasets, rows_of_step, shuffled_places
from nvembed import NVEmbed, check_dims, pack, shorten


@dataclass
class Settings:
    """One stage. Defaults are the paper's or, where it is silent, assumptions (RESULTS.md).

    A recipe's stage overrides the defaults; a command-line flag of the same name overrides both.
    """

    steps: int = 20000
    batch: int = 128  # B, over all ranks
    negatives: int = 7  # N; a row with fewer is padded by masked columns
    in_batch: bool = True  # other rows' documents are negatives too; recipes: False in stage 2
    batching: str = "blended"  # rows of all sets mixed (section 2.2), or "task": one set a batch
    lr: float = 2e-5
    warmup: int = 500  # steps
    weight_decay: float = 0.03
    clip: float = 1.0  # largest norm of the gradient
    temperature: float = 0.02
    false_negatives: float = 2.0  # drops negatives with cosine > positive's + this; 2: off
    dims: list = field(default_factory=list)  # Matryoshka: widths, each with a loss of its own
    max_length: int = 512  # tokens of a text
    micro_tokens: int = 0  # tokens of a micro-batch, which bounds memory; 0: as many as fit
    lora_rank: int = 16  # r, the paper's; 0: all weights are trained
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    pooling: str = "latent"
    causal: bool = False
    dtype: str = "auto"  # of the frozen base and the arithmetic; trained weights are fp32
    export_dtype: str = "bfloat16"
    recompute: bool = False  # activation checkpointing: a block keeps only its input
    compile: bool = True  # torch.compile of the blocks around attention
    shard_ranks: int = 0  # ranks that share one copy of the weights, say a node's; 0: all
    kd: float = 0.0  # weight of `kd_loss`, from pos_scores and neg_scores of rows that have them
    kd_temperature: float = 1.0  # of those scores; cosines, as mine.py writes, need a lower one
    distill: float = 0.0  # weight of the distillation from --teacher
    keep_zeros: bool = False  # zeros of a pruned decoder stay zero
    held_out: int = 64  # rows of each set that are kept for the held-out loss
    eval_every: int = 100
    save_every: int = 50
    keep: bool = False  # at each checkpoint also a loadable model, RUN/kept_STEP; one rank
    seed: int = 0


# ---- batch


@dataclass
class Batch:
    """A step's rows. Column 0 of a row is its positive, the others are its hard negatives."""

    tokens: list  # nvembed.Tokens of this rank's b queries, then of their documents, row by row
    own_rows: torch.Tensor  # (b,) which of the B rows are this rank's
    valid: torch.Tensor  # (B, L) bool, False pads a short list of negatives
    document_ids: torch.Tensor  # (B, L) text_ids
    positive_ids: torch.Tensor  # (B, P) text_ids of known positives and the query; padded by one
    scores: torch.Tensor  # (B, L) the rows' pos_scores and neg_scores; -inf: none, or padding
    teacher: torch.Tensor | None = None  # the teacher's embeddings of `tokens`


def make_batch(model, rows, s, positives):
    """All B rows of a step as (Dataset, row, generator) -> Batch.

    Every rank draws all rows, so that all know which columns are valid and which texts are
    positives; it tokenizes only its own.
    """
    b = len(rows) // world_size()
    own = range(rank() * b, (rank() + 1) * b)
    queries, documents = [], []  # (instruction, text) of own rows
    valid, document_ids, positive_ids, scores = [], [], [], []
    for i, (dataset, row, rng) in enumerate(rows):
        texts, text_scores = draw_documents(row, s.negatives, rng)
        padding = 1 + s.negatives - len(texts)
        valid.append([True] * len(texts) + [False] * padding)
        document_ids.append([text_id(text) for text in texts] + [0] * padding)
        positive_ids.append(sorted(positives[row["query"]]))
        scores.append(text_scores + [-math.inf] * padding)
        if i in own:
            instruction = row.get("prompt", dataset.instruction)
            queries.append((instruction, row["query"]))
            document_instruction = instruction if dataset.symmetric else ""
            documents.extend((document_instruction, text) for text in texts)
    longest = max(len(ids) for ids in positive_ids)
    positive_ids = [ids + ids[:1] * (longest - len(ids)) for ids in positive_ids]
    pairs = queries + documents
    texts = [text for _, text in pairs]
    instructions = [instruction for instruction, _ in pairs]
    return Batch(
        tokens=model.tokenize(texts, instructions, s.max_length),
        own_rows=torch.arange(own.start, own.stop),
        valid=torch.tensor(valid),
        document_ids=torch.tensor(document_ids),
        positive_ids=torch.tensor(positive_ids),
        scores=torch.tensor(scores),
    )


# ---- loss


def info_nce(q_bD, d_BLD, batch, s):
    """InfoNCE (section 3.3) of this rank's queries against all documents -> loss, accuracy.

    q_bD (b, D) and d_BLD (B, L, D) are unit vectors; loss and accuracy are scalars. A row's target
    is its column 0. Its negatives are all other columns of the batch or, without `in_batch`, its
    own hard negatives; never padding, nor its query's own text or a known positive of it, nor one
    that is above its target by more than `false_negatives` (Qwen3-Embedding, arXiv 2506.05176).
    The accuracy leaves such texts out too.
    """
    columns = d_BLD.shape[1]  # L
    cosines = q_bD @ d_BLD.flatten(0, 1).T  # (b, M)
    document_ids = batch.document_ids.flatten()[None, :, None]  # (1, M, 1)
    positive_ids = batch.positive_ids[batch.own_rows][:, None, :]  # (b, 1, P)
    is_positive = (document_ids == positive_ids).any(dim=-1)  # (b, M)
    use = batch.valid.flatten() & ~is_positive
    if not s.in_batch:
        row_of_column = torch.arange(len(batch.valid)).repeat_interleave(columns)  # (M,)
        use &= batch.own_rows[:, None] == row_of_column
    target = batch.own_rows * columns  # (b,) each row's column 0, counted over all M
    use[torch.arange(len(target)), target] = True  # the target is a known positive, but stays
    use, target = use.to(cosines.device), target.to(cosines.device)
    positive = cosines.gather(1, target[:, None])  # (b, 1)
    # Not "<=": a NaN has to stay in use, so that `check_loss` sees it.
    use &= ~(cosines > positive + s.false_negatives)
    scores = (cosines / s.temperature).masked_fill(~use, -torch.inf)
    accuracy = (scores.argmax(dim=1) == target).float().mean()
    return F.cross_entropy(scores, target), accuracy


def queries_and_documents(embeddings, batch):
    """Embeddings of batch.tokens, in their order -> this rank's q_bD, all ranks' d_BLD."""
    valid = batch.valid[batch.own_rows].to(embeddings.device)  # (b, L)
    d_bLD = embeddings.new_zeros(*valid.shape, embeddings.shape[1])
    d_bLD[valid] = embeddings[len(valid) :]  # row by row, as they are listed
    d_BLD = AllGather.apply(d_bLD) if world_size() > 1 else d_bLD
    return embeddings[: len(valid)], d_BLD


class AllGather(torch.autograd.Function):
    """x (b, ...) of every rank -> (B, ...) on all of them, with gradient.

    The batch's loss is (l_1 + ... + l_n) / n, a mean over n ranks, and a document x counts in each:
    backward returns dl_1/dx + ... + dl_n/dx to the rank that embedded x. From there it goes on into
    that rank's parameter gradients, which FSDP averages over the ranks: this is the 1 / n.
    """

    @staticmethod
    def forward(ctx, x):
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def kd_loss(q_bD, d_BLD, batch, s):
    """KL(teacher || student) of the softmax of the scores of a row's own documents -> scalar.

    The teacher's are the row's pos_scores and neg_scores over kd_temperature, the student's are the
    cosines over temperature. The mean is over the rows of all ranks that have scores.
    """
    scored = batch.scores[:, 0].isfinite()  # (B,) the others have no scores and teach nothing
    teacher = (batch.scores / s.kd_temperature).softmax(dim=1).where(scored[:, None], 0)
    rows = scored.sum().clamp(min=1)
    cosines = torch.einsum("bd,bld->bl", q_bD, d_BLD[batch.own_rows])  # (b, L)
    padding = ~batch.valid[batch.own_rows].to(cosines.device)
    # Not -inf, which times the teacher's 0 is NaN.
    student = (cosines / s.temperature).masked_fill(padding, -1e9).log_softmax(dim=1)
    teacher = teacher[batch.own_rows].to(student)
    return F.kl_div(student, teacher, reduction="sum") * world_size() / rows


def distillation(embeddings, batch, s):
    """How far this rank's embeddings are from the teacher's (the form is ours) -> scalar.

    The mean of (1 - cosine) / temperature over the batch's texts, and over its queries
    KL(teacher || student) of the softmax of the scores of all documents.
    """
    valid = batch.valid.flatten().to(embeddings.device)
    log_p = []
    for vectors in (embeddings, batch.teacher):
        q_bD, d_BLD = queries_and_documents(vectors, batch)
        scores = q_bD @ d_BLD.flatten(0, 1)[valid].T / s.temperature
        log_p.append(scores.log_softmax(dim=1))
    student, teacher = log_p
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    distances = 1 - (embeddings * batch.teacher).sum(dim=1)
    texts_a_rank = (len(batch.valid) + valid.sum()) / world_size()  # the mean over the ranks
    return s.distill * (distances.sum() / texts_a_rank / s.temperature + divergence)


def batch_loss(embeddings, batch, s):
    """Embeddings of batch.tokens -> loss and accuracy of this rank's rows.

    With `dims` (Matryoshka, Kusupati et al. 2022) there is a loss for each width, of the vectors'
    first numbers, and one of the whole vectors; the result is their mean. The accuracy, and what
    `distill` adds, are the whole's.
    """
    q_bD, d_BLD = queries_and_documents(embeddings, batch)
    widths = sorted({*s.dims, embeddings.shape[1]})  # the whole comes last
    loss = 0
    for dims in widths:
        q, d = shorten(q_bD, dims), shorten(d_BLD, dims)
        contrast, accuracy = info_nce(q, d, batch, s)
        loss = loss + contrast / len(widths)
        if s.kd:
            loss = loss + s.kd * kd_loss(q, d, batch, s) / len(widths)
    if batch.teacher is not None:
        loss = loss + distillation(embeddings, batch, s)
    return loss, accuracy


# ---- gradient


def reseed(*key):
    """Makes dropout a function of (seed, step, rank, micro-batch), so that it can be replayed."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))


def micro_batches(model, tokens, micro_tokens):
    """Splits texts into micro-batches -> lists of indices, equally many on every rank.

    Each forward pass gathers a block's weights from all ranks (FSDP), so all have to run as many.
    A rank with fewer micro-batches embeds its last text again, and ignores the result.
    """
    parts = pack(tokens, micro_tokens)
    (most,) = all_reduce([len(parts)], dist.ReduceOp.MAX)
    repeated = [parts[-1][-1:]]
    return parts + repeated * (int(most) - len(parts))


def embed(model, tokens, parts, key):
    """Embeddings (number of texts, D) of texts in their order, by micro-batches."""
    embeddings, order = [], []
    for i, part in enumerate(parts):
        check_stop()
        reseed(*key, i)
        embeddings.append(model([tokens[j] for j in part]))
        order.extend(part)
    # What `micro_batches` repeats comes last and is cut off.
    positions = torch.tensor(order[: len(tokens)], device=model.device).argsort()
    return torch.cat(embeddings)[: len(tokens)][positions]


def backward(model, batch, s, key=(0,), cached=True):
    """Forward and backward pass of a batch -> loss, accuracy of this rank's rows.

    Gradients are cached (GradCache, Gao et al. 2021): memory holds the graph of one micro-batch,
    however large the batch. With one micro-batch there is nothing to cache; with cached=False, for
    comparison, memory holds the graph of the whole batch.
    """
    parts = micro_batches(model, batch.tokens, s.micro_tokens)
    if len(parts) == 1 or not cached:
        embeddings = embed(model, batch.tokens, parts, key)
        loss, accuracy = batch_loss(embeddings, batch, s)
        loss.backward()
        return loss, accuracy

    # First all embeddings, without a graph.
    with torch.no_grad():
        embeddings = embed(model, batch.tokens, parts, key)

    # Then the loss of the whole batch over all ranks, and its gradient at the embeddings.
    embeddings.requires_grad_()
    loss, accuracy = batch_loss(embeddings, batch, s)
    loss.backward()

    # Then each micro-batch again, with a graph and the same dropout: that gradient goes on from
    # its embeddings into the weights.
    done = 0
    for i, part in enumerate(parts):
        check_stop()
        # LoRA: gradients of adapters and pooling are kept whole, and averaged over ranks only once.
        if isinstance(model, FSDPModule) and s.lora_rank:
            model.set_requires_gradient_sync(i + 1 == len(parts))
        gradient = embeddings.grad[part]
        if done >= len(batch.tokens):  # the repeated text of `micro_batches`
            gradient = torch.zeros_like(gradient)
        reseed(*key, i)
        model([batch.tokens[j] for j in part]).backward(gradient)
        done += len(part)
    return loss, accuracy


def learning_rate(s, step):
    """Linear warm-up, then linear decay to zero (assumption)."""
    rising = (step + 1) / max(s.warmup, 1)
    falling = (s.steps - step) / max(s.steps - s.warmup, 1)
    return s.lr * min(rising, falling)


def train_step(model, optimizer, batch, s, step, teacher=None):
    """One optimizer step -> its log record, without times."""
    key = (s.seed, step, rank())
    if teacher is not None:
        with torch.no_grad():
            parts = micro_batches(teacher, batch.tokens, s.micro_tokens)
            batch.teacher = embed(teacher, batch.tokens, parts, key)
    loss, accuracy = backward(model, batch, s, key)
    if s.keep_zeros:
        zero_pruned_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), s.clip)
    norm = whole(norm).item()
    sums = all_reduce([loss.item(), accuracy.item()])
    loss, accuracy = [value / world_size() for value in sums]
    rate = learning_rate(s, step)
    optimizer.param_groups[0]["lr"] = rate
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": step + 1, "loss": loss, "accuracy": accuracy, "lr": rate, "grad_norm": norm}


def zero_pruned_gradients(model):
    """A weight that is zero has no gradient, so AdamW leaves it zero."""
    for name, parameter in trained(model).items():
        if name.endswith("_proj.weight"):
            parameter.grad.mul_(parameter != 0)


# ---- model


def load(name, s, device, **settings):
    """A model in the dtype to compute in, mapped from its file and not yet on its device.

    `settings` (pooling, causal) override its Config.
    """
    dtype = fast_dtype(device) if s.dtype == "auto" else getattr(torch, s.dtype)
    model = NVEmbed.from_pretrained(resolve(name), None, dtype, **settings)
    if nvembed.lora_layers(model):
        raise InputError(f"{name}: expected plain weights, got an adapter")
    return model


def load_teacher(name, s, device, model):
    teacher = load(name, s, device)
    check_teacher(name, teacher, model)
    return place(teacher, s, device)


ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "pooling", "causal")


def build(init, s, device, sharded=True):
    """The model to train, from a base, a released model or a run -> (model, name of its base).

    Frozen weights are in the compute dtype, trained ones (LoRA or everything, and pooling) in fp32.
    If `init` is a run with the same ADAPTER_SETTINGS, its adapters and pooling are trained on, not
    merged; otherwise training begins with its merged model.
    """
    base, previous = str(init), None
    if Path(str(init), "latest").exists():
        state = read_json(checkpoint(init) / "state.json")
        before = state["settings"]
        if all(before[name] == getattr(s, name) for name in ADAPTER_SETTINGS):
            base, previous = state["base"], checkpoint(init)

    torch.manual_seed(s.seed)
    model = load(base, s, device, pooling=s.pooling, causal=s.causal)
    for dims in s.dims:
        check_dims(dims, model.config)
    if s.lora_rank:
        nvembed.add_lora(model, s.lora_rank, s.lora_alpha, s.lora_dropout)
    else:
        model.requires_grad_(True)
    pooling_layers(model).requires_grad_(True)
    for block in model.embedding_model.layers:
        block.recompute = s.recompute
    if s.compile:
        model.compile_blocks()
    place(model, s, torch.device(device), sharded)
    if previous is not None:
        load_tensors(trained(model), previous / "trained.safetensors")
    return model, base


def pooling_layers(model):
    """The latent layer as a list, empty with mean and eos pooling."""
    return nn.ModuleList(part for part in model.children() if part is not model.embedding_model)


def place(model, s, device, sharded=True):
    """Moves a model to its device and keeps this rank's shard of it (FSDP2), block by block."""
    mesh = make_mesh(device, s.shard_ranks) if sharded and world_size() > 1 else None
    for module in [*model.embedding_model.layers, *pooling_layers(model), model]:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                dtype = torch.float32 if parameter.requires_grad else model.dtype
                parameter.data = parameter.data.to(device, dtype)
        if mesh is not None:
            fully_shard(module, mesh=mesh)
    return model


# ---- the loop


def flops_a_token(model, batch, s):
    """FLOPs that a step spends on a token; attention, embedding and pooling are not counted.

    For each weight: forward 2, backward to the inputs 2. Where they happen, 2 more each: the
    cache's first forward, a recomputed forward, backward to trained weights, a teacher's forward.
    """
    cached = len(pack(batch.tokens, s.micro_tokens)) > 1
    decoder = model.embedding_model
    weights = sum(p.numel() for p in decoder.parameters()) - decoder.embed_tokens.weight.numel()
    return weights * (4 + 2 * (cached + s.recompute + (s.lora_rank == 0) + (s.distill > 0)))


def train(run, init, datasets, s, device, teacher_name=None, tensorboard=None):
    """Trains, resumes or finishes one stage in the folder `run`, which ends up a loadable model."""
    settings = asdict(s) | {"content": content(init, teacher_name, datasets)}
    check_agreement(settings)
    model, base = build(init, s, device)
    check_prompts(datasets, model.tokenize, s.max_length)
    teacher = load_teacher(teacher_name, s, device, model) if s.distill else None
    s = replace(s, micro_tokens=choose_micro_tokens(model, s))  # of the memory that is left
    parameters = trained(model).values()
    optimizer = torch.optim.AdamW(parameters, s.lr, weight_decay=s.weight_decay, fused=True)
    state = resume(run, settings, asdict(Settings()), model, optimizer)
    done, record = state["step"], state["record"]
    if done == s.steps and is_finished(run):
        print0(f"{run}: finished already; --restart trains it anew")
        return

    print_sizes(init, model, s.batch, s.micro_tokens)
    positives = known_positives(datasets)
    peak = measure_peak(device, model.dtype)
    head = {"base": base, "settings": asdict(s), "datasets": [data.name for data in datasets]}
    logged = done - 1 if record else done  # `record` is logged again
    log = RunLog(run, describe_machine() | head, logged, tensorboard)
    model.train()
    began = time.perf_counter()
    try:
        with catch_signals():
            # `step` steps are done. `record` is the last one's, logged only now: held-out loss
            # joins it.
            for step in range(done, s.steps + 1):
                evaluate = step % s.eval_every == 0 or step == s.steps
                if evaluate and record and "held_out_loss" not in record:
                    record |= held_out(model, datasets, s, positives)
                log.write(record)
                if step > done and (step % s.save_every == 0 or step == s.steps):
                    save(run, step, record, model, optimizer, base, settings)
                if step == s.steps:
                    break
                record = timed_step(model, optimizer, datasets, s, step, positives, teacher, peak)
                check_loss(record, run, datasets, s)
                seconds_a_step = (time.perf_counter() - began) / (step + 1 - done)
                record["seconds_left"] = round((s.steps - step - 1) * seconds_a_step)
    except Stopped:
        save(run, step, record, model, optimizer, base, settings)
        leave_ranks()
        raise Stopped(f"stopped after step {step}; the same command goes on from here") from None
    del model, parameters, optimizer, teacher
    gc.collect()  # compiled blocks refer to themselves
    if rank() == 0:
        export(run, s, datasets, device)
    leave_ranks()


def save(run, step, record, model, optimizer, base, settings):
    state = {"step": step, "record": record, "base": base, "settings": settings}
    save_checkpoint(run, step, model, optimizer, state)
    if settings["keep"]:
        model.save_pretrained(run / f"kept_{step:06d}")


def timed_step(model, optimizer, datasets, s, step, positives, teacher, peak):
    """A training step on its rows -> its log record, with speed."""
    start = time.perf_counter()
    batch = make_batch(model, rows_of_step(datasets, s, step), s, positives)
    record = train_step(model, optimizer, batch, s, step, teacher)
    tokens = sum(len(text.ids) for text in batch.tokens)
    seconds = time.perf_counter() - start
    return record | speed(tokens / seconds, flops_a_token(model, batch, s), peak)


@torch.no_grad()
def held_out(model, datasets, s, positives):
    """Held-out loss and accuracy, dropout off, in batches of the training size.

    If there are fewer rows than that, in one batch of all. A remainder is left out.
    """
    held = [dataset.held_out for dataset in datasets]
    places = shuffled_places(held, s.seed)
    size = min(s.batch, len(places) - len(places) % world_size())
    if size == 0:
        return {}
    model.eval()
    results = []
    for start in range(0, len(places) - size + 1, size):
        rows = draw_rows(held, datasets, places[start : start + size], s)
        batch = make_batch(model, rows, s, positives)
        parts = micro_batches(model, batch.tokens, s.micro_tokens)
        embeddings = embed(model, batch.tokens, parts, (s.seed,))
        loss, accuracy = batch_loss(embeddings, batch, s)
        results.append([loss.item(), accuracy.item()])
    model.train()
    means = np.mean(results, axis=0) / world_size()
    loss, accuracy = all_reduce(means.tolist())
    return {"held_out_loss": loss, "held_out_accuracy": accuracy}


def export(run, s, datasets, device):
    """Writes the finished run as a model folder and, of LoRA, a PEFT adapter.

    Prints the cosine of embeddings by the merged weights against those by the adapters.
    """
    model, base = build(run, replace(s, compile=False), device, sharded=False)
    model.eval()
    export_dtype = model.dtype if s.export_dtype == "auto" else getattr(torch, s.export_dtype)
    model.dtype = torch.float32  # in fp32 only the rounding of the merged weights is left
    texts = []
    for dataset in datasets:
        rows = dataset.held_out if len(dataset.held_out) else dataset.rows
        texts.extend(rows[i]["pos"][0] for i in range(min(16, len(rows))))
    limits = {"max_length": s.max_length, "batch_tokens": s.micro_tokens}
    adapted = model.encode(texts, **limits)
    if not np.isfinite(adapted).all():
        raise InputError(f"{run}: trained, not exported: its embeddings are not finite")
    if s.lora_rank:
        nvembed.save_adapter(model, run / "adapter", resolve(base))
    model.save_pretrained(run, export_dtype)
    del model  # a GPU may have no room for both
    merged = NVEmbed.from_pretrained(run, device, export_dtype)
    merged.dtype = torch.float32
    cosine = (adapted * merged.encode(texts, **limits)).sum(axis=1).min()
    finish(run, s.steps, datasets, merged.config.query_template)
    saved = f"{run}: saved in {str(export_dtype).removeprefix('torch.')}"
    print(f"{saved}; cosine of merged against adapted: lowest {cosine:.6f}")


# ---- the command

RESERVED = ("stage1", "stage2", "stage3", "mined", "pruned")  # folders of runs/
BEFORE = {  # stage: what it begins with, and what makes that
    2: ("runs/stage1", "--stage 1"),
    3: ("runs/pruned", "experiments/compress.py"),
}


def read_settings(recipe, args):
    """Settings: the defaults, overridden by the recipe's stage, overridden by the flags."""
    types = {field.name: field.type for field in fields(Settings)}
    values = {"seed": recipe["seed"]}
    values.update(stage_settings(recipe, args.recipe, args.stage, types))
    for name, value in vars(args).items():
        if name in types and value is not None:
            values[name] = value
    s = Settings(**values)
    check_ranges(asdict(s))
    if s.keep_zeros and s.lora_rank > 0:
        raise InputError(f"keep_zeros: expected lora_rank 0, got {s.lora_rank}: LoRA fills zeros")
    if 0 < s.micro_tokens < s.max_length:
        expected = f"expected at least a text's {s.max_length} tokens"
        raise InputError(f"micro_tokens: {expected}, got {s.micro_tokens}")
    return s


def parse_flags():
    parser = Flags(__doc__)
    flag = parser.add_argument
    flag("--stage", type=int, choices=(1, 2, 3), default=1)
    flag("--recipe", default=str(ROOT / "data" / "local.json"))
    flag("--data", help="own rows instead of the recipe's: a file, or a data set of the hub")
    flag("--columns", help="of --data, by their names: query=a,pos=b,neg=c; default: known names")
    flag("--init", help="model to begin with; default: the base, or what the stage before left")
    flag("--teacher", help="model to distill from; default of stage 3: runs/stage2")
    flag("--out", help="folder of the run; default: runs/stageN or runs/NAME-OF-DATA")
    flag("--mined", help="folder of mine.py's output, used where it has a data set's file")
    flag("--restart", action="store_true", help="begin anew, removing an earlier run in --out")
    flag("--tensorboard", metavar="DIR", help="also write log.jsonl's figures for tensorboard")
    parser.add_settings(Settings)
    return parser.parse_args()


def initial_model(args, recipe):
    """--init, or the recipe's base, or what the stage before left -> name or absolute path."""
    if args.init:
        folder, command = args.init, "the command that made it"
    elif args.data or args.stage == 1:
        return absolute(recipe["base"])
    else:
        folder, command = BEFORE[args.stage]
    expect_finished = not args.init or Path(folder, "latest").exists()
    if expect_finished and not Path(folder, "config.json").exists():
        raise InputError(f"{folder}: no finished run; run {command} first")
    return absolute(folder)


def absolute(model):
    """A folder's absolute path, so that a run goes on from anywhere; other names as they are."""
    return str(Path(model).resolve()) if model and Path(model).is_dir() else model


def main():
    args = parse_flags()
    recipe = read_recipe(args.recipe)
    s = read_settings(recipe, args)
    data_stage = min(args.stage, 2)  # stage 3 recovers on the rows of stage 2
    entries, name = recipe["datasets"], f"stage{args.stage}"
    entry = data_entry(args.data, args.columns)
    if entry:
        entries, name = [entry | {"stages": [data_stage]}], entry["name"]
        if not args.out and name in RESERVED:
            raise InputError(f"--data {args.data}: expected --out: runs/{name} is a stage's")
    run = Path(args.out or Path("runs", name))
    init = initial_model(args, recipe)
    if args.teacher and not s.distill:
        raise InputError("--teacher: expected --distill above 0 with it")
    teacher = absolute(args.teacher or ("runs/stage2" if s.distill else None))
    device = init_ranks()
    if s.keep and world_size() > 1:
        raise InputError(f"keep: expected one rank, got {world_size()}")
    datasets = read_datasets(entries, data_stage, s, args.mined)
    check_batch(datasets, s, world_size())
    for dataset in datasets:
        print0(dataset.summary())
    with run_folder(run, (init, teacher), args.restart):
        train(run, init, datasets, s, device, teacher, args.tensorboard)


if __name__ == "__main__":
    run_command(main)
