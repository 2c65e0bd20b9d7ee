"""How good an embedder is: mteb's tasks, metrics and result files, and one table of several models.

    python eval.py --task retrieval      # the last run on the local retrieval sets
    python eval.py --model smollm2:mean:causal --model runs/stage2 --model minilm --model bm25
    torchrun --nproc-per-node 8 eval.py --suite "MTEB(eng, v1)" --model nvidia/NV-Embed-v2

The last command runs the paper's 56 tasks on 8 GPUs. Only tasks without a result are run. A result
belongs to the content of the model's files and of the task's data, so a model that was trained
again has none yet; after a change of the code use --overwrite.
"""

import data.threads  # before torch

import datetime
import functools
import os
from pathlib import Path

import mteb
import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.adapters import adapter_base, is_adapter
from data.base import resolve
from data.commands import Flags, InputError, one_line, run_command
from data.dialects import check_pooling, content_hash, is_sentence_transformer
from data.files import ROOT, read_json
from data.folders import local_folder
from data.machine import fast_dtype
from data.quantize import FORMS, check_quantize
from data.tasks import PERTURBED, find_tasks, instruction, score_task
from data.texts import check_dims, check_length
from nvembed import POOLINGS, NVEmbed, read_config

PUBLISHED = read_json(ROOT / "data/published.json")
SETTINGS = {  # what may follow a model's name: the setting that it changes
    **{word: ("pooling", word) for word in POOLINGS},
    "causal": ("causal", True),
    "bidirectional": ("causal", False),
    **{word: ("quantize", word) for word in FORMS},
}


# ---- models


class Encoder(AbsEncoder):
    """A model as mteb wants it, from PATH[:POOLING][:causal|:bidirectional][:int8|:int4|:fp8].

    A sentence-transformers folder is a peer: mteb loads it, prompts it and compares its vectors as
    the folder says. Weights are read at the first text, so never where every result is there.
    """

    def __init__(self, spec, max_length=512, dtype=None, limit=None, perturb=None, dims=None):
        self.options = (spec, max_length, dtype, limit, perturb, dims)
        self.max_length = max_length
        self.perturb = perturb
        self.dims = dims
        local_rank = os.environ.get("LOCAL_RANK", "0")
        self.device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"

        path, words = split_spec(spec)
        self.folder = Path(local_folder(resolve(path)))
        self.is_peer = is_sentence_transformer(self.folder)
        known = [] if self.is_peer else list(SETTINGS)
        if not set(words) <= set(known):
            expected = f"expected {path}, then none or some of {known}"
            raise InputError(f"--model {spec}: {expected}")
        self.settings = dict(SETTINGS[word] for word in words)
        if len(self.settings) < len(words):
            raise InputError(f"--model {spec}: expected one word for a setting, got two")
        if "pooling" not in self.settings:
            check_pooling(self.folder)
        if dtype:
            self.dtype = getattr(torch, dtype)
        elif self.settings.get("quantize") == "int4":
            self.dtype = torch.bfloat16  # int4 knows no other
        else:
            self.dtype = fast_dtype(self.device)
        if not self.is_peer:
            self.check()

        # what a result depends on beside the model's files: a part of where mteb stores it
        experiment = {"limit": limit, "perturb": perturb, "dims": dims}
        if not self.is_peer:
            dtype_name = str(self.dtype).removeprefix("torch.")
            experiment.update(self.settings, max_length=max_length, dtype=dtype_name)
        meta = {
            "name": f"nvembed/{self.folder.name}",
            "revision": content_hash(self.folder),
            "similarity_fn_name": None if self.is_peer else ScoringFunction.COSINE,
            "experiment_kwargs": {k: v for k, v in experiment.items() if v is not None},
        }
        self.mteb_model_meta = ModelMeta.create_empty(meta)

    def check(self):
        """Refuses at once what would otherwise fail when other models have run for hours."""
        if "quantize" in self.settings:
            check_quantize(self.settings["quantize"], self.dtype)
        base = adapter_base(self.folder) if is_adapter(self.folder) else self.folder
        config = read_config(base)
        check_dims(self.dims, config)
        check_length(self.max_length, config)

    @property
    @functools.lru_cache(maxsize=1)  # only the last encoder's model stays in memory
    def model(self):
        Encoder.model.fget.cache_clear()  # before the next one is loaded
        path = str(self.folder)
        if self.is_peer:
            peer = mteb.SentenceTransformerEncoderWrapper
            return peer(path, device=self.device, embed_dim=self.dims)
        return NVEmbed.from_pretrained(path, self.device, self.dtype, **self.settings)

    def encode(self, inputs, *, task_metadata, prompt_type=None, **kwargs):
        """What mteb calls, on rank 0: batches of texts -> embeddings (B, D)."""
        texts = [text for batch in inputs for text in batch["text"]]
        if self.perturb and prompt_type != "document":
            texts = [PERTURBED[self.perturb](text) for text in texts]
        if self.is_peer:
            inputs = DataLoader(Dataset.from_dict({"text": texts}), batch_size=256)
            kwargs.update(task_metadata=task_metadata, prompt_type=prompt_type)
            return self.model.encode(inputs, **kwargs)
        task = instruction(task_metadata, prompt_type)
        if not dist.is_initialized():
            return self.embed(texts, task, progress=True)
        dist.broadcast_object_list([(self.options, texts, task)])  # the other ranks `serve`
        return self.encode_share(texts, task)

    def embed(self, texts, task, progress):
        """What every rank computes -> embeddings (B, D), or (B, dims)."""
        return self.model.encode(texts, task, self.max_length, progress=progress, dims=self.dims)

    def encode_share(self, texts, task):
        """What every rank does: it encodes its share -> embeddings (B, D) on rank 0, else None."""
        rank = dist.get_rank()
        world_size = dist.get_world_size()
        by_length = np.argsort([len(text) for text in texts], kind="stable")
        indices = by_length[rank::world_size]  # as many short and long texts on every rank
        share = [texts[i] for i in indices]
        part = self.embed(share, task, progress=rank == 0)

        gathered = [None] * world_size if rank == 0 else None
        dist.gather_object((indices, part), gathered)
        if rank > 0:
            return None
        embeddings = np.empty((len(texts), part.shape[1]), part.dtype)
        for indices, part in gathered:
            embeddings[indices] = part
        return embeddings


def run_on_ranks(work, *args):
    """Calls work(*args) on rank 0, while the other ranks encode for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        work(*args)
        return
    # the others wait for as long as rank 0 computes scores
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if dist.get_rank() > 0:
        serve()
    else:
        work(*args)
        dist.broadcast_object_list([None])
    dist.destroy_process_group()


def serve():
    """Encodes with rank 0 until it broadcasts None. If a rank dies, torchrun stops the others."""
    encoder_of = functools.lru_cache(maxsize=1)(Encoder)  # a new one for another model only
    request = [None]
    dist.broadcast_object_list(request)
    while request[0] is not None:
        options, texts, task = request[0]
        encoder_of(*options).encode_share(texts, task)
        dist.broadcast_object_list(request)


def split_spec(spec):
    """smollm2:8:mean:causal -> ("smollm2:8", ["mean", "causal"]): a number is part of the name."""
    path, *words = spec.split(":")
    if words and words[0].isdecimal():
        path += ":" + words.pop(0)
    return path, words


def load(spec, args):
    """A model's name -> an Encoder, or mteb's own BM25."""
    if spec != "bm25":
        return Encoder(spec, args.max_length, args.dtype, args.limit, args.perturb, args.dims)
    if args.perturb:
        raise InputError("--model bm25: expected no --perturb: mteb hands it the queries")
    try:
        return mteb.get_model("mteb/baseline-bm25s")
    except ImportError as error:
        raise InputError(f"--model bm25: needs bm25s and PyStemmer: {one_line(error)}") from error


# ---- scores


def evaluate(model, tasks, args):
    """Scores a model, running the tasks that have no result yet -> {row of the table: scores}.

    Rows are tasks, the mean of each type and the mean of all; scores (1 + RESAMPLES,) are the main
    score x 100 and its bootstrap.
    """
    cache = mteb.ResultCache(args.out)
    scores = []
    for task in tqdm(tasks, desc="tasks"):
        scores.append(score_task(task, model, cache, args.overwrite))

    rows = {task.metadata.name: [i] for i, task in enumerate(tasks)}
    for i, task in enumerate(tasks):
        rows.setdefault(f"{task.metadata.type} mean", []).append(i)
    rows["mean"] = list(range(len(tasks)))
    scores = np.array(scores)  # (tasks, 1 + RESAMPLES)
    return {row: scores[numbers].mean(axis=0) for row, numbers in rows.items()}


# ---- the table


def number(score, sign=""):
    """A score as text; nan, no score, is "-"."""
    return "-" if np.isnan(score) else f"{score:{sign}.2f}"


def difference(scores, base):
    """How much better than `base` as text, with a 95 % interval if both have a bootstrap."""
    differences = scores - base
    low, high = np.percentile(differences[1:], [2.5, 97.5])
    interval = "" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    return number(differences[0], "+") + interval


def table(tasks, results, peers):
    """Markdown: a column for each model, each peer, the last model minus the first and the peers.

    results: {model: {row: scores}}; peers: {name: {row: published score}}
    """
    first = list(results.values())[0]
    last = list(results.values())[-1]
    rows = list(first)
    metrics = {task.metadata.name: task.metadata.main_score for task in tasks}
    columns = [["task", *rows]]
    columns.append(["main score x 100", *[metrics.get(row, "") for row in rows]])
    for name, scores in results.items():
        columns.append([name, *[number(scores[row][0]) for row in rows]])
    for name, scores in peers.items():
        columns.append([name, *[number(scores.get(row, np.nan)) for row in rows]])
    if len(results) > 1:
        cells = [difference(last[row], first[row]) for row in rows]
        columns.append(["last - first [95 %]", *cells])
    for name, scores in peers.items():
        cells = [number(last[row][0] - scores.get(row, np.nan), "+") for row in rows]
        columns.append([f"last - {name}", *cells])
    return markdown(list(zip(*columns)))


def markdown(rows):
    """Rows of text cells, the header first -> a table with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- the command


def flags(description=None):
    """A parser with the flags of an evaluation, but for its models."""
    parser = Flags(description)
    flag = parser.add_argument
    flag("--task", default="all", help="all (default), a task type or the name of a task")
    flag("--suite", default="local", help="local (default), an mteb benchmark, AIR-Bench's folder")
    flag("--out", default="runs", help="mteb's result files go to OUT/results (default runs)")
    flag("--max-length", type=int, default=512, help="tokens of a text (default 512); not of peers")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: the faster on this machine")
    flag("--dims", type=int, metavar="N", help="only the first N numbers of each vector")
    flag("--limit", type=int, metavar="N", help="a quick look: N test items, 3 N passages at most")
    flag("--perturb", choices=PERTURBED, help="misspelt, capital or half queries, symmetric texts")
    flag("--overwrite", action="store_true", help="run tasks again whose results are there")
    return parser


def print_table(args):
    tasks = find_tasks(args.suite, args.task, args.limit)
    if not tasks:
        return
    runs = [run for run in ("runs/stage2", "runs/stage1") if Path(run, "config.json").exists()]
    specs = args.model or runs[:1]
    if not specs:
        expected = "expected a folder or hub id; there is no runs/stage1 or stage2 yet"
        raise InputError(f"--model: {expected}")
    models = {spec: load(spec, args) for spec in specs}  # all of them: a typo costs no hours
    results = {spec: evaluate(model, tasks, args) for spec, model in models.items()}
    peers = PUBLISHED["suites"].get(args.suite, {}) if args.task == "all" else {}
    print(table(tasks, results, peers))


def main():
    parser = flags(__doc__)
    spec = "FOLDER_OR_ID[:POOLING][:causal|:bidirectional][:int8|:int4|:fp8], minilm, bm25"
    parser.add_argument("--model", action="append", help=spec)
    run_on_ranks(print_table, parser.parse_args())


if __name__ == "__main__":
    run_command(main)
