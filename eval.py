"""How good it is: the local suite or any mteb benchmark, with mteb's own tasks, metrics and result files.

    python eval.py --task retrieval                                    # the last run, local retrieval sets
    python eval.py --model smollm2:mean:causal --model runs/stage1 --model runs/stage2 --model minilm
    python eval.py --suite "MTEB(eng, v1)" --model nvidia/NV-Embed-v2  # the paper's 56 tasks

A task whose result is there is not run again. A result belongs to the content of the model's files and of the
task's data, so a model that was trained again has none yet; after a change of the code use --overwrite.
"""

import argparse
import copy
import functools
import hashlib
import re
import typing
from pathlib import Path

import mteb
import numpy as np
import torch
from mteb.abstasks.task_metadata import TaskType
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from tqdm import tqdm

from data.prepare import resolve
from data.tasks import local_tasks
from nvembed import FAMILIES, POOLINGS, NVEmbed, expect, fast_dtype, local_folder, read_json, run

INSTRUCTIONS = read_json(Path(__file__).parent / "data" / "instructions.json")
VARIANT = re.compile(r"(?<=CQADupstack)\w+|(Retrieval|HardNegatives|Decontaminated|\.v\d)+$")
SETTINGS = {pooling: ("pooling", pooling) for pooling in POOLINGS}
SETTINGS |= {"causal": ("causal", True), "bidirectional": ("causal", False)}
RESAMPLES = 1000


def instruction(metadata, prompt_type=None):
    """The instruction for one side of an mteb task: the authors' evaluation string, else mteb's.

    Documents of retrieval and reranking are bare, but for Quora's; all other types are symmetric: both sides
    carry it.
    """
    name = VARIANT.sub("", metadata.name)
    asymmetric = "Retrieval" in metadata.type or "Reranking" in metadata.type
    if prompt_type == "document" and asymmetric and name not in INSTRUCTIONS["documents_instructed"]:
        return ""
    theirs = metadata.prompt["query"] if isinstance(metadata.prompt, dict) else metadata.prompt
    return INSTRUCTIONS["tasks"].get(name) or INSTRUCTIONS["types"].get(metadata.type) or theirs or ""


class Encoder(AbsEncoder):
    """mteb's EncoderProtocol around PATH[:POOLING][:causal|:bidirectional], or around a sentence-transformers
    folder, which mteb loads and prompts. Loaded at the first encode: never, where every result is there
    already."""

    def __init__(self, spec, max_length=512, dtype=None, limit=None):
        path, *words = spec.split(":")
        self.folder = Path(local_folder(resolve(path)))
        family = read_json(self.folder / "config.json").get("model_type")
        self.peer = (self.folder / "modules.json").exists() and family not in FAMILIES
        for word in words:
            known = [] if self.peer else list(SETTINGS)
            expect(word in known, f"--model {spec}: '{word}': expected one of {known}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings = dict(SETTINGS[word] for word in words)
        self.max_length, self.dtype = max_length, getattr(torch, dtype) if dtype else fast_dtype(self.device)
        how = {"limit": limit} if limit else {}
        if not self.peer:
            how |= self.settings | {"max_length": max_length, "dtype": str(self.dtype).removeprefix("torch.")}
        meta = {"name": f"nvembed/{Path(path).name}", "revision": content_hash(self.folder)}
        meta |= {"similarity_fn_name": ScoringFunction.COSINE, "experiment_kwargs": how}
        self.mteb_model_meta = ModelMeta.create_empty(meta)

    @functools.cached_property
    def model(self):
        if self.peer:
            return SentenceTransformerEncoderWrapper(str(self.folder), device=self.device)
        return NVEmbed.from_pretrained(self.folder, self.device, self.dtype, **self.settings)

    def encode(self, inputs, *, task_metadata, prompt_type=None, **kwargs):
        if self.peer:
            return self.model.encode(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
        texts = [text for batch in inputs for text in batch["text"]]
        task = instruction(task_metadata, prompt_type)
        return self.model.encode(texts, task, self.max_length, progress=True)


def content_hash(folder):
    """Hash of what makes the model: configs, tokenizer, weights; not a run's checkpoints and logs."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def find_tasks(suite, wanted, limit):
    """The tasks of a suite that "all", a type or a name means, in upper or lower case. All of mteb's types
    are known; that a suite has no task of one is not an error."""
    local, benchmarks = suite == "local", [benchmark.name for benchmark in mteb.get_benchmarks()]
    expect(local or suite in benchmarks, f"--suite {suite}: expected local or one of {', '.join(benchmarks)}")
    expect(local or not limit, "--limit: expected the local suite, not a benchmark of fixed sets")
    tasks = local_tasks(limit=limit) if local else list(mteb.get_benchmark(suite).tasks)
    known = [*typing.get_args(TaskType), *(task.metadata.name for task in tasks)]
    if wanted.lower() == "all":
        return tasks
    expect(wanted.lower() in map(str.lower, known), f"--task {wanted}: expected all, {', '.join(known)}")
    found = [t for t in tasks if wanted.lower() in (t.metadata.type.lower(), t.metadata.name.lower())]
    if not found:
        print(f"{wanted}: no set of it in the {suite} suite; see --suite, for instance 'MTEB(eng, v1)'")
    return found


def evaluate(model, tasks, cache, overwrite):
    """Runs what is missing -> of each task the main score x 100 and its bootstrap (None if not local)."""
    meta, scores = model.mteb_model_meta, []
    folder = cache.get_task_result_path("", meta).parent / "predictions"
    tasks = copy.deepcopy(tasks)  # every model starts from a task's first random state
    for task in tqdm(tasks, desc="tasks"):
        old, local = cache.load_task_result(task.metadata.name, meta), hasattr(task, "path")
        stale = old and old.dataset_revision != task.metadata.revision  # mteb would serve it all the same
        how = {"cache": cache, "overwrite_strategy": "always" if overwrite or stale else "only-missing"}
        how |= {"prediction_folder": folder if local else None, "co2_tracker": False}
        result = mteb.evaluate(model, task, show_progress_bar=False, **how).task_results[0]
        scores.append((100 * result.get_score(), 100 * bootstrap(task, result, folder) if local else None))
    return scores


def bootstrap(task, result, folder):
    """Deviations (RESAMPLES,) of a local task's main score when its test items and the experiments that mteb
    averages (training sets, k-means) are resampled: the same resamples for every model, so that differences
    are paired. Around their own mean, since repeated items raise a V-measure."""
    task.load_data()
    predicted = read_json(folder / task.prediction_file_name)["default"]["test"]
    score, *sizes = task.resampled_score(result.scores["test"][0], predicted)
    rng = np.random.default_rng([*task.metadata.name.encode()])  # another one for each task
    scores = [score(*(rng.integers(size, size=size) for size in sizes)) for _ in range(RESAMPLES)]
    return np.array(scores) - np.mean(scores)


def table(tasks, models):
    """{model: what `evaluate` returns} -> Markdown lines: tasks, means of types, mean of all; with two models
    or more also the last minus the first, with the bootstrap 95 % interval."""
    columns = list(models.values())
    scores = np.array([[score for score, _ in column] for column in columns])  # (models, tasks)
    kinds = np.array([task.metadata.type for task in tasks])
    entries = [(t.metadata.name, t.metadata.main_score, [i]) for i, t in enumerate(tasks)]
    entries += [(f"{kind} mean", "", np.flatnonzero(kinds == kind)) for kind in dict.fromkeys(kinds)]
    rows = [["task", "main score x 100", *models, "last - first [95 %]"]]
    for title, metric, members in [*entries, ("mean", "", range(len(tasks)))]:
        score = scores[:, members].mean(axis=1)
        change = [columns[-1][i][1] - columns[0][i][1] for i in members if columns[0][i][1] is not None]
        rows.append([title, metric, *(f"{x:.2f}" for x in score), f"{score[-1] - score[0]:+.2f}"])
        if len(change) == len(members):
            interval = np.percentile(np.mean(change, axis=0), [2.5, 97.5])
            rows[-1][-1] += " [{:+.2f}, {:+.2f}]".format(*(score[-1] - score[0] + interval))
    rows = [row if len(models) > 1 else row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = [path for path in ("runs/stage2", "runs/stage1") if Path(path, "config.json").exists()]
    flag = parser.add_argument
    flag("--task", default="all", help="all (default), a task type or the name of a task")
    flag("--suite", default="local", help="local (default) or the name of an mteb benchmark")
    flag(
        "--model",
        action="append",
        help="FOLDER_OR_ID[:POOLING][:causal|:bidirectional], smollm2 (untrained base) or minilm; repeat it "
        "to compare (default runs/stage2, else runs/stage1)",
    )
    flag("--out", default="runs", help="mteb's result files go to OUT/results (default runs)")
    flag("--max-length", type=int, default=512, help="tokens of a text (default 512)")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: the faster on this machine")
    flag("--limit", type=int, metavar="N", help="a quick look: at most N test items of a task, 11 N passages")
    flag("--overwrite", action="store_true", help="run tasks again whose results are there")
    args = parser.parse_args()
    tasks = find_tasks(args.suite, args.task, args.limit)
    if tasks:
        specs = dict.fromkeys(args.model or runs[:1])
        expect(specs, "--model: expected a folder or hub id, as there is no runs/stage2 or runs/stage1 yet")
        models = {s: Encoder(s, args.max_length, args.dtype, args.limit) for s in specs}
        cache = mteb.ResultCache(args.out)
        results = {spec: evaluate(model, tasks, cache, args.overwrite) for spec, model in models.items()}
        print("\n".join(table(tasks, results)))


if __name__ == "__main__":
    run(main)
