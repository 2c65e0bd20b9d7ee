"""A training run from outside: its folder, its checkpoints and its log.

RUN/step_N/     trained.safetensors, optimizer.safetensors, state.json
RUN/latest      the name of the last whole checkpoint
RUN/log.jsonl   first what the run is, then a line a step
RUN/README.md   the model card
RUN/finished    written last, when the folder is a model
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from data import card
from data.base import resolve
from data.commands import InputError, optional_package
from data.files import check_fields, locked, read_json, renamed, share
from data.folders import WEIGHTS, local_folder, read_tensors
from data.ranks import all_reduce, check_agreement, print0, rank, world_size
from data.sampling import schedule

# ---- folder

WRITTEN = re.compile(  # what a run writes, all that --restart removes
    r"finished|latest|log\.jsonl|adapter|README\.md|(step|kept)_\d{6,}"
    r"|(config|modules|tokenizer|tokenizer_config|special_tokens_map)\.json"
    r"|config_sentence_transformers\.json|" + WEIGHTS.pattern
)


@contextlib.contextmanager
def run_folder(run, models, restart):
    """Makes a run's folder and keeps it for this command alone; `models` are folders it reads.

    Only what a run wrote is ever removed or written over: a folder with other content is refused.
    """
    made = rank() == 0 and not run.exists()
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run))
            check_folder(run, models)
            if restart:
                remove_run(run)
        all_reduce([0])  # wait for rank 0: the folder is there
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):
                    run.rmdir()  # nothing came of it, if it is empty


def check_folder(run, models):
    """Refuses a folder that is not empty and no run, or that one of the models is in."""
    for model in filter(None, models):
        if Path(model).exists() and Path(model).resolve().is_relative_to(run.resolve()):
            raise InputError(f"--out {run}: expected another folder than that of model {model}")
    content = [path.name for path in run.iterdir() if not path.name.startswith(".")]
    if content and not is_run(run):
        found = sorted(content)[0]
        raise InputError(f"--out {run}: expected an empty folder or a run, found {found}")


def is_run(folder):
    """Whether a run has written its log there."""
    path = folder / "log.jsonl"
    if path.is_file():
        with path.open("rb") as file:
            return file.readline().startswith(b'{"versions"')
    return any(is_checkpoint(path) for path in folder.iterdir())


def remove_run(run):
    """Removes what a run wrote, so that a command that is killed on the way leaves no half run.

    First `finished` and `latest`: what is left is no model. Last the log, by which the rest is
    known as a run's.
    """
    written = [path for path in run.iterdir() if WRITTEN.fullmatch(path.name)]
    order = {"finished": 0, "latest": 0, "log.jsonl": 2}
    for path in sorted(written, key=lambda path: order.get(path.name, 1)):
        if path.name == "adapter":
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                Path(path, name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty: a user's file is in it
                path.rmdir()
        elif path.is_dir():
            if is_checkpoint(path) or path.name.startswith("kept_"):
                shutil.rmtree(path)
        elif path.name != "README.md" or card.is_ours(path):
            path.unlink()


def finish(run, step, datasets, template):
    """Writes the prompts and the card of a run whose model is saved, and then that it is whole."""
    card.write_prompts(run, datasets, template)
    card.write_card(run)
    (run / "finished").write_text(f"after step {step}\n")


def is_finished(run):
    """Whether a run has ended and its folder is a model; version 1 left no file `finished`."""
    return Path(run, "finished").exists()


# ---- what a run is

# settings that may be others when a run goes on
FREE = ("micro_tokens", "recompute", "compile", "save_every", "eval_every", "keep", "shard_ranks")


def fingerprint(folder):
    """What tells a model folder from another of the same name: its JSON files, samples of weights.

    A renamed folder keeps it. All of a 7B's weights would take half a minute to hash.
    """
    content = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".json":
            content.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            content.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for part in range(64):
                    file.seek(size * part // 64)
                    content.update(file.read(4096))
    return content.hexdigest()


def content(init, teacher, datasets):
    """What a run is made of, beside its settings: the same name may stand for another content."""
    found = {"data sets and their order": [data.name for data in datasets]}
    for data in datasets:
        found[f"rows of {data.name}"] = data.digest
        found[f"instruction of {data.name}"] = data.instruction
        found[f"symmetric of {data.name}"] = data.symmetric
        found[f"samples of {data.name}"] = len(data.rows)
    for part, name in (("init", init), ("teacher", teacher)):
        if name:
            found[part] = fingerprint(local_folder(resolve(name)))
    return found


def check_same_run(run, before, now):
    """Compares what a run was begun with and what it is asked to go on with, but for FREE.

    What an earlier version did not write down counts as the same.
    """
    for name, value in now.items():
        if name in FREE or before.get(name, value) == value:
            continue
        advice = "use the same, --restart or another --out"
        if name == "content":  # hashes say nothing to a reader
            old = value | before[name]
            changed = [key for key in old if old[key] != value.get(key)]
            if not changed:
                continue
            raise InputError(f"{run}: was begun with other content: {changed[0]}; {advice}")
        raise InputError(
            f"{run}: was begun with {name} = {before[name]!r}, now {value!r}; {advice}"
        )


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
    name = Path(run, "latest").read_text(errors="replace").strip()
    if not is_checkpoint(Path(run, name)):
        found = sorted(path.name for path in Path(run).iterdir() if is_checkpoint(path))
        expected = f"expected the name of a checkpoint, one of {found}"
        raise InputError(f"{run}/latest: {expected}, got {name!r}")
    return Path(run, name)


def is_checkpoint(folder):
    """Whether a folder is a checkpoint of ours."""
    name = re.fullmatch(r"step_\d{6,}", folder.name)
    return name is not None and (folder / "state.json").exists()


def last_checkpoint(run):
    """`checkpoint` for a message; "none" where there is none."""
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
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass alone leaves the root unsharded
    parts = {"trained": trained(model), "optimizer": optimizer_tensors(model, optimizer)}
    for tensors in parts.values():
        for name, tensor in tensors.items():
            tensor = whole(tensor).detach()
            tensors[name] = tensor.cpu() if rank() == 0 else None
    if rank() == 0:
        check_finite_weights(run, step, parts["trained"])
        write_checkpoint(run, step, parts, state)


def check_finite_weights(run, step, tensors):
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            message = f"not finite after step {step}; last good checkpoint: {last_checkpoint(run)}"
            raise InputError(f"{run}: weight '{name}': {message}")


def load_checkpoint(folder, model, optimizer):
    """Restores what `save_checkpoint` wrote."""
    load_tensors(trained(model), folder / "trained.safetensors")
    load_tensors(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")


def resume(run, settings, defaults, model, optimizer):
    """Restores a run's last checkpoint, if it has one -> its state: "step" and "record".

    The record is the last step's, which the caller logs again; None in a checkpoint of an earlier
    version. A setting that the checkpoint does not have counts as its default. All ranks must find
    the same checkpoint.
    """
    if not (run / "latest").exists():
        state = {"step": 0, "record": {"step": 0}}
        check_agreement(state)
        return state
    folder = checkpoint(run)
    state = {"record": None} | read_json(folder / "state.json")
    check_agreement(state)
    fields = {"step": int, "settings": dict, "base": str, "record": (dict, type(None))}
    check_fields(state, fields, {}, folder / "state.json")
    check_same_run(run, defaults | state["settings"], settings)
    load_checkpoint(folder, model, optimizer)
    return state


def write_checkpoint(run, step, tensors, state):
    """Writes RUN/step_N, unless it is there. At every moment `latest` names a whole checkpoint.

    `tensors` is {file name: {name: tensor}}, `state` is JSON. A step is saved twice when a signal
    comes in the one after it.
    """
    folder = run / f"step_{step:06d}"
    if not folder.exists() or last_checkpoint(run) != folder:
        write_new_checkpoint(run, folder, tensors, state)
    for old in run.iterdir():
        if is_checkpoint(old) and old != folder:
            shutil.rmtree(old)


def write_new_checkpoint(run, folder, tensors, state):
    """Writes a folder under a temporary name, flushes it to disk, renames it; then `latest`."""
    temporary = run / f".{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, found in tensors.items():
            save_file(found, temporary / f"{name}.safetensors")
            share(temporary / f"{name}.safetensors")
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


def flush(*paths):
    """Waits until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---- log


def check_loss(record, run, datasets, s):
    """Ends the run at a loss or gradient that is not finite, and names the rows of its step."""
    if math.isfinite(record["loss"] + record["grad_norm"]):
        return
    lines = defaultdict(list)
    places = schedule([len(dataset.rows) for dataset in datasets], s, record["step"] - 1)
    for _, dataset, i in places:
        file, _, line = datasets[dataset].rows.where(i).rpartition(":")
        lines[file].append(line)
    rows = "; ".join(f"{file} lines {', '.join(numbers)}" for file, numbers in lines.items())
    message = f"not finite; rows: {rows}; last checkpoint: {last_checkpoint(run)}"
    raise InputError(f"{format_record(record)}: {message}")


class RunLog:
    """A run's figures, a record a step: in log.jsonl, on the screen, in tensorboard if asked for.

    Ranks other than 0 write nothing.
    """

    def __init__(self, run, head, step, tensorboard=None):
        """`head` says what the run is, `tensorboard` is a folder.

        A resumed run keeps its lines up to `step`; not what came later, nor what a kill left half.
        """
        self.file = None
        self.board = None
        if rank() > 0:
            return
        if tensorboard is not None:
            optional_package("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(tensorboard)
        path = run / "log.jsonl"
        lines = [json.dumps(head)]
        if step >= 0 and path.exists():
            first, *rest = path.read_text().splitlines()
            whole = [line for line in rest if line.startswith("{") and line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            lines = [first, *kept]
        with renamed(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
        self.file = path.open("a", buffering=1)

    def write(self, record):
        if self.file is None or record is None:
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


def check_teacher(name, teacher, model):
    """Refuses a teacher whose tokens or vectors the student's cannot be compared with."""
    width, wanted = teacher.config.hidden_size, model.config.hidden_size
    if width != wanted:
        raise InputError(f"--teacher {name}: expected vectors of {wanted} numbers, got {width}")
    if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise InputError(f"--teacher {name}: expected the student's vocabulary, got another")


def print_sizes(init, model, batch, micro_tokens):
    print0(f"begins with {init}")
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained(model).values())
    print0(f"{total:,} parameters, {count:,} of them trained")
    ranks = "1 rank" if world_size() == 1 else f"{world_size()} ranks"
    rows = f"global batch {batch} = {ranks} x {batch // world_size()} rows"
    print0(f"{rows}, micro-batches of at most {micro_tokens} tokens")
