"""How good it is: the local suite or any mteb benchmark, with mteb's own tasks, metrics and result files.

    python eval.py --task retrieval                                    # the last run, local retrieval sets
    python eval.py --model smollm2:mean:causal --model runs/stage1 --model runs/stage2 --model minilm --model bm25
    torchrun --nproc-per-node 8 eval.py --suite "MTEB(eng, v1)" --model nvidia/NV-Embed-v2  # the paper's 56 tasks
    python eval.py --grid pooling                                      # an ablation of the paper, three seeds
    python eval.py --search "how deep is the Baikal?" --corpus data/eval/wikipedia.jsonl.gz

A task whose result is there is not run again. A result belongs to the content of the model's files and of the
task's data, so a model that was trained again has none yet; after a change of the code use --overwrite.
"""

import argparse
import copy
import datetime
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mteb
import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from mteb.abstasks.task_metadata import TaskType
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.prepare import json_lines, read_recipe, resolve
from data.tasks import PERTURBED, folder_tasks, local_tasks
from nvembed import FAMILIES, POOLINGS, NVEmbed, attempt, expect, fast_dtype, local_folder, read_json, run

ROOT = Path(__file__).resolve().parent
INSTRUCTIONS = read_json(ROOT / "data" / "instructions.json")
PUBLISHED = read_json(ROOT / "data" / "published.json")
VARIANT = re.compile(r"(?<=CQADupstack)\w+|(Retrieval|HardNegatives|Decontaminated|\.v\d)+$")
SETTINGS = {pooling: ("pooling", pooling) for pooling in POOLINGS}
SETTINGS |= {"causal": ("causal", True), "bidirectional": ("causal", False)}
RESAMPLES = 1000
LOCKS = {}  # of what a grid is making


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


# ---- models


class Encoder(AbsEncoder):
    """mteb's EncoderProtocol around PATH[:POOLING][:causal|:bidirectional], or around a sentence-transformers
    folder, which mteb loads and prompts. Loaded at the first encode: never, where every result is there
    already; one is in memory at a time."""

    loaded = (None, None)

    def __init__(self, spec, max_length=512, dtype=None, limit=None, perturb=None):
        self.options = (spec, max_length, dtype, limit, perturb)
        path, *words = re.split(r":(?!\d+(?::|$))", spec)  # smollm2:8 is one name
        self.folder = Path(local_folder(resolve(path)))
        family = read_json(self.folder / "config.json").get("model_type")
        self.peer = (self.folder / "modules.json").exists() and family not in FAMILIES
        known = [] if self.peer else [*SETTINGS]
        expect(set(words) <= set(known), f"--model {spec}: expected {path}, then none or some of {known}")
        self.device, self.perturb = "cuda" if torch.cuda.is_available() else "cpu", perturb
        self.settings = dict(SETTINGS[word] for word in words)
        self.max_length, self.dtype = max_length, getattr(torch, dtype) if dtype else fast_dtype(self.device)
        how = {name: value for name, value in (("limit", limit), ("perturb", perturb)) if value}
        if not self.peer:
            how |= self.settings | {"max_length": max_length, "dtype": str(self.dtype).removeprefix("torch.")}
        meta = {"name": f"nvembed/{self.folder.name}", "revision": content_hash(self.folder)}
        meta |= {"similarity_fn_name": ScoringFunction.COSINE, "experiment_kwargs": how}
        self.mteb_model_meta = ModelMeta.create_empty(meta)

    @property
    def model(self):
        if Encoder.loaded[0] is not self:
            make = SentenceTransformerEncoderWrapper if self.peer else NVEmbed.from_pretrained
            how = {"device": self.device} | ({} if self.peer else {"dtype": self.dtype} | self.settings)
            Encoder.loaded = (self, make(str(self.folder), **how))
        return Encoder.loaded[1]

    def encode(self, inputs, *, task_metadata, prompt_type=None, **kwargs):
        texts = [text for batch in inputs for text in batch["text"]]
        if self.perturb and prompt_type != "document":
            texts = [PERTURBED[self.perturb](text) for text in texts]
        if self.peer:  # by rank 0 alone
            inputs = DataLoader(Dataset.from_dict({"text": texts}), batch_size=256)
            return self.model.encode(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
        return self.embed(texts, instruction(task_metadata, prompt_type))

    def embed(self, texts, task):
        """Texts -> (B, D). With several ranks this is rank 0's call, and all encode."""
        expect(not self.peer, f"{self.options[0]}: expected a model that nvembed loads")
        if not dist.is_initialized():
            return self.model.encode(texts, task, self.max_length, progress=True)
        dist.broadcast_object_list([(self.options, texts, task)])
        return self.share(texts, task)

    def share(self, texts, task):
        """A rank encodes every W-th of the texts by length -> on rank 0 all of them in their order (B, D)."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        order, parts = np.argsort([len(text) for text in texts], kind="stable"), [None] * ranks
        own = [texts[i] for i in order[rank::ranks]]
        part = self.model.encode(own, task, self.max_length, progress=rank == 0)
        dist.gather_object(part, None if rank else parts)
        if rank == 0:
            return np.concatenate(parts)[np.concatenate([order[i::ranks] for i in range(ranks)]).argsort()]


def serve():
    """What the other ranks do: encode with rank 0 until it is done. The end of one is the end of all."""
    encoder, request = None, [None]
    while dist.broadcast_object_list(request) or request[0]:  # it returns None and fills in the request
        options, texts, task = request[0]
        encoder = encoder if encoder and encoder.options == options else Encoder(*options)
        encoder.share(texts, task)
    dist.destroy_process_group()


def content_hash(folder):
    """Hash of what makes the model: configs, tokenizer, weights; not a run's checkpoints and logs."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    found = [(path.name, hashlib.sha256(np.memmap(path, mode="r")).hexdigest()) for path in files]
    return hashlib.sha256(str(found).encode()).hexdigest()[:16]


def load(spec, args):
    """--model -> list of models: one, or the runs by seed of a cell's folder; "bm25" is mteb's."""
    if spec == "bm25":
        return [attempt("--model bm25: needs bm25s and PyStemmer", mteb.get_model, "mteb/baseline-bm25s")]
    seeds = sorted(str(path.parent) for path in Path(spec).glob("[0-9]*/config.json"))
    return [Encoder(s, args.max_length, args.dtype, args.limit, args.perturb) for s in seeds or [spec]]


# ---- tasks and scores


def find_tasks(suite, wanted, limit):
    """The tasks of a suite that "all", a type or a name means, in upper or lower case. All of mteb's types
    are known; that a suite has no task of one is not an error."""
    expect(suite == "local" or not limit, "--limit: expected the local suite, not a benchmark of fixed sets")
    tasks = local_tasks(limit=limit)
    if Path(suite).is_dir():
        tasks = folder_tasks(suite)
    elif suite != "local":
        tasks = list(attempt(f"--suite {suite}", mteb.get_benchmark, suite).tasks)
    known, wanted = ["all", *TaskType.__args__, *(task.metadata.name for task in tasks)], wanted.lower()
    expect(wanted in map(str.lower, known), f"--task {wanted}: expected one of {', '.join(known)}")
    found = [t for t in tasks if wanted in ("all", t.metadata.type.lower(), t.metadata.name.lower())]
    if not found:
        print(f"{wanted}: no set of it in the {suite} suite; see --suite, for instance 'MTEB(eng, v1)'")
    return found


def evaluate(model, tasks, args):
    """Runs what is missing -> (tasks, 1 + RESAMPLES): main scores x 100, nan where BM25 has none, beside them those
    of the bootstrap, nan if the task is not local."""
    meta, cache = model.mteb_model_meta, mteb.ResultCache(args.out)
    folder = cache.get_task_result_path("", meta).parent / "predictions"
    scores = np.full((len(tasks), 1 + RESAMPLES), np.nan)
    # every model starts from a task's first random state
    for i, task in enumerate(tqdm(copy.deepcopy(tasks), desc="tasks")):
        old, local = cache.load_task_result(task.metadata.name, meta), hasattr(task, "path")
        stale = old and old.dataset_revision != task.metadata.revision  # mteb would serve it all the same
        how = {"cache": cache, "overwrite_strategy": "always" if args.overwrite or stale else "only-missing"}
        how |= {"prediction_folder": folder if local else None, "co2_tracker": False}
        if isinstance(model, Encoder) or task.metadata.type == "Retrieval":
            result = mteb.evaluate(model, task, show_progress_bar=False, **how).task_results[0]
            scores[i, 0] = 100 * result.get_score()
            scores[i, 1:] = scores[i, 0] + 100 * bootstrap(task, result, folder) if local else np.nan
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


def averaged(tasks, results):
    """{model: what `evaluate` returns for each seed} -> {model: {row: (seeds, 1 + RESAMPLES)}}, a row for each
    task, the mean of each type, and of all."""
    kinds = np.array([task.metadata.type for task in tasks])
    rows = {task.metadata.name: [i] for i, task in enumerate(tasks)}
    rows |= {f"{kind} mean": np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds)}
    rows["mean"] = np.arange(len(tasks))
    found = {model: np.array(seeds) for model, seeds in results.items()}
    return {model: {row: x[:, i].mean(axis=1) for row, i in rows.items()} for model, x in found.items()}


def shown(x, sign=""):
    """(seeds, 1 + RESAMPLES) -> mean score, deviation over seeds; of a difference, with sign, its 95 % interval."""
    mean, (low, high) = x[:, 0].mean(), np.percentile(x.mean(axis=0)[1:], [2.5, 97.5])
    spread = f" ± {x[:, 0].std(ddof=1):.2f}" if len(x) > 1 else ""
    spread = f" [{low:+.2f}, {high:+.2f}]" if sign and low == low else spread
    return "-" if np.isnan(mean) else f"{mean:{sign}.2f}{spread}"


def cost(encoder):
    """What a model needs, {column: figure}: its weights on disk and in memory, the speed with 256 descriptions of
    packages, the time of one alone (median of 16)."""
    model, lines = encoder.model, json_lines(ROOT / "data/eval/debian.jsonl.gz", query=str)
    texts = [row["query"] for _, row in itertools.islice(lines, 256)]
    batches = (texts[:16], texts, *([text] for text in texts[:16]))  # the first one warms up
    seconds = [timeit.timeit(lambda: model.encode(batch), number=1) for batch in batches]
    found = {"MB on disk": sum(p.stat().st_size for p in encoder.folder.glob("*.safetensors")) / 1e6}
    found["MB in memory"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6
    found["tokens/s"] = sum(len(t.ids) for t in model.tokenize(texts)) / seconds[1]
    return {n: f"{x:,.1f}" for n, x in (found | {"ms alone": 1000 * np.median(seconds[2:])}).items()}


def table(tasks, found, peers, short=False, costs={}):
    """What `averaged` returns, {peer: published scores by row} -> Markdown: a row for each task, type and all, a
    column for each model, the last minus the first one and minus the peers. `short`: a line for each model and
    peer, by name, with the means only and what `cost` found."""
    titles, (*_, last) = [*next(iter(found.values()))], found.values()
    bases = {"last - first [95 %]": next(iter(found.values()))}
    for peer, scores in peers.items():
        column = np.array([[[scores.get(title, np.nan), *[np.nan] * RESAMPLES]] for title in titles])
        found = found | {peer: dict(zip(titles, column))}
        bases[f"last - {peer}"] = found[peer]
    rows = [[name, *map(shown, column.values())] for name, column in found.items()]
    if short:
        rows = [[Path(name).name, *x[len(tasks) :], *costs.get(name, {}).values()] for name, *x in rows]
        rows = [["run", *titles[len(tasks) :], *next(iter(costs.values()), {})], *sorted(rows)]
    else:
        for title, base in bases.items():
            apart = [last[row].mean(axis=0, keepdims=True) - base[row].mean(axis=0) for row in titles]
            rows += [[title, *(shown(x, "+") for x in apart)]] if base is not last else []
        metrics = [task.metadata.main_score for task in tasks] + [""] * (len(titles) - len(tasks))
        rows = [*zip(["task", *titles], ["main score x 100", *metrics], *rows)]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


# ---- ablations


def train_cell(place, seed, declared):
    """Mines and trains a cell of data/ablations.json, and links PLACE/SEED to its run. The name of a run is the hash of
    all that determines it, so that cells share what they have in common."""
    cell, mined = declared["cells"][place.name], ()
    recipe = read_recipe(ROOT / "data" / "local.json", declared["preset"], cell.get("labels"))
    recipe["datasets"] = [data for data in recipe["datasets"] if data["name"] not in cell.get("without", [])]
    init = recipe["base"]
    if rule := cell.get("mine"):
        files = [data["file"] for data in recipe["datasets"] if data["kind"] == "retrieval"]
        mined = ("--mined", place.parent / "mined" / "".join(rule).strip("-"))
        done = mined[1] / (Path(files[-1]).name + ".json")
        execute(done, ["mine.py", *rule, "--out", mined[1], "--data", *files])
    for stage, settings in cell["stages"]:
        stages = {str(stage): recipe["stages"][str(stage)] | cell.get("settings", {}) | settings}
        sets = [data for data in recipe["datasets"] if min(stage, 2) in data["stages"]]
        own = json.dumps(recipe | {"seed": seed, "datasets": sets, "stages": stages}, indent=2)
        run = place.parent / "runs" / hashlib.sha256(f"{own} {init} {mined}".encode()).hexdigest()[:12]
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.json").write_text(own + "\n")
        command = ["train.py", "--stage", stage, "--recipe", run / "recipe.json", "--init", init, *mined]
        execute(run / "config.json", [*command, "--out", run])
        init = run
    place.mkdir(exist_ok=True)
    (place / str(seed)).unlink(missing_ok=True)
    (place / str(seed)).symlink_to(run)


def execute(done, command):
    """Runs a command with one thread, if the file that it ends with is not there; its output lies beside that."""
    log, line = done.with_suffix(".output"), [sys.executable, *map(str, command)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with LOCKS.setdefault(done, threading.Lock()), log.open("a") as out:  # another cell may be at it
        if not done.exists():
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(line, check=False, stdout=out, stderr=out, env=env, cwd=ROOT).returncode
            told = " ".join(log.read_text().split())[-300:]
            expect(code == 0 and done.exists(), f"{log}: exit status {code}: {told}")


def grid(args):
    """Runs a grid of data/ablations.json, or all, args.jobs commands at once; given again it goes on. Its
    cells are folders with a link to the run of every seed. Then compares them, with the other flags as given."""
    declared, folder = read_json(ROOT / "data" / "ablations.json"), Path(args.out).resolve() / "ablations"
    cells = [cell for key, names in declared["grids"].items() if args.grid in (key, "all") for cell in names]
    expect(cells, f"--grid {args.grid}: expected all or one of {list(declared['grids'])}")
    cells = [folder / cell for cell in dict.fromkeys(cells)]
    todo = [*itertools.product(cells, range(declared["seeds"]), [declared])]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train_cell, *zip(*todo)), total=len(todo), desc=f"grid {args.grid}"))
    work(flags([*declared["evaluation"], "--compare", *map(str, cells)], args))


# ---- to look at


def drift(models, task):
    """Prints how far the first 64 queries of a retrieval task move from each model to the next."""
    task.load_data()
    texts, how = task.dataset["default"]["test"]["queries"]["text"][:64], instruction(task.metadata, "query")
    found = {spec: model.embed(texts, how) for spec, (model, *_) in models.items()}
    for (a, x), (b, y) in itertools.pairwise(found.items()):
        print(f"{a} -> {b}: mean cosine of {len(texts)} fixed texts {(x * y).sum(axis=1).mean():.4f}")


def latent_map(model, text):
    """Which latents the tokens of a text use -> tokens (T), latents (48,), weights (T, 48): mean over heads, the
    latents most used."""
    layer, ids = model.latent_attention_model, model.tokenize([text or "The Baikal is a deep lake."])[0].ids
    h = model.embedding_model(torch.tensor(ids, device=model.device), (len(ids),), model.dtype)
    scores = (layer.cross_attend_blocks[0].norm(h) @ layer.folded(h.dtype)[0]).detach().float().cpu()
    weights = scores.unflatten(-1, (layer.heads, -1)).softmax(dim=-1).mean(dim=1).numpy()  # (T, C, R), (T, R)
    most = np.sort(weights.sum(axis=0).argsort()[-48:])
    return [model.tokenizer.decode([i], False) for i in ids], most, weights[:, most]


def plot(models, found, args):
    """Loss curves of runs, bars of their means, latent map of a text under the last one -> OUT/plot.png."""
    library = attempt("--plot: expected the package matplotlib", __import__, "matplotlib.figure")
    figure = library.figure.Figure(figsize=(20, 7), layout="constrained")
    curves, bars, latents = figure.subplots(1, 3)
    for i, (name, column) in enumerate(found.items()):
        log = attempt("--plot", (models[name][0].folder / "log.jsonl").read_text)
        steps = [(s["step"], s["loss"]) for s in map(json.loads, log.splitlines()) if "loss" in s]
        curves.plot(*zip(*steps), label=Path(name).name)
        means = {row: x[:, 0] for row, x in column.items() if row.endswith("mean")}
        heights, errors = zip(*((x.mean(), x.std(ddof=len(x) > 1)) for x in means.values()))
        bars.bar(np.arange(len(means)) + 0.8 * i / len(found), heights, 0.8 / len(found), yerr=errors)
    bars.set_xticks(range(len(means)), means, rotation=20)
    tokens, most, weights = attempt("--plot: no latents", latent_map, models[name][0].model, args.search)
    latents.imshow(weights, aspect="auto")
    latents.set_xticks(range(len(most)), most, rotation=90)
    latents.set_yticks(range(len(tokens)), tokens)
    figure.suptitle("loss by step, mean scores x 100, attention of tokens to latents (mean of heads)")
    curves.legend()
    figure.savefig(Path(args.out, "plot.png"))


def search(model, question, path):
    """Prints the ten best documents of a file for a question, with cosine x 100."""
    texts = [row["text"] for _, row in json_lines(path, text=str)]
    scores = model.embed(texts, "") @ model.embed([question], INSTRUCTIONS["tasks"]["NQ"])[0]
    for i in scores.argsort()[::-1][:10]:
        print(f"{100 * scores[i]:6.2f}  {' '.join(texts[i].split())[:150]}")


# ---- the command


def flags(line=None, given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--task", default="all", help="all (default), a task type or the name of a task")
    flag("--suite", default="local", help="local (default), a benchmark of mteb, a folder as AIR-Bench's")
    flag("--model", action="append", help="FOLDER_OR_ID[:POOLING][:causal|:bidirectional], minilm, bm25")
    flag("--out", default="runs", help="mteb's result files go to OUT/results (default runs)")
    flag("--max-length", type=int, default=512, help="tokens of a text (default 512)")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: the faster on this machine")
    flag("--limit", type=int, metavar="N", help="a quick look: at most N test items of a task, 3 N passages")
    flag("--perturb", choices=PERTURBED, help="queries and symmetric texts misspelt, in capitals or halved")
    flag("--overwrite", action="store_true", help="run tasks again whose results are there")
    flag("--compare", nargs="+", metavar="RUN", help="means of runs, or of folders of runs by seed")
    flag("--cost", action="store_true", help="with --compare also size, memory, speed, time of a query")
    flag("--drift", action="store_true", help="also how far embeddings move from each model to the next")
    flag("--grid", help="an ablation of data/ablations.json, or all: run what is missing, compare")
    flag("--jobs", type=int, default=1, help="commands of a grid at once, one thread each")
    flag("--plot", nargs="+", metavar="RUN", help="loss, means and latent map of runs to OUT/plot.png")
    flag("--search", metavar="TEXT", help="the best documents of --corpus; with --plot the text of the map")
    flag("--corpus", metavar="FILE", help='.jsonl or .jsonl.gz, each line with a "text"')
    return parser.parse_args(line, given)


def work(args):
    runs = [path for path in ("runs/stage2", "runs/stage1") if Path(path, "config.json").exists()]
    cells, tasks = args.compare or args.plot, find_tasks(args.suite, args.task, args.limit)
    specs = [*dict.fromkeys(cells or args.model or runs[:1])]
    expect(specs or not tasks, "--model: expected a folder or hub id; there is no runs/stage1 or stage2 yet")
    expect(args.corpus or args.plot or not args.search, "--search: expected --corpus FILE")
    models = {spec: load(spec, args) for spec in specs}
    if args.corpus:
        search(models[specs[0]][0], args.search, args.corpus)
    elif tasks:
        found = {spec: [evaluate(model, tasks, args) for model in seeds] for spec, seeds in models.items()}
        found, paper = averaged(tasks, found), PUBLISHED["ablations"] if cells else {}
        peers = {f"{spec}, paper": paper[Path(spec).name] for spec in specs if Path(spec).name in paper}
        peers |= PUBLISHED["suites"].get(args.suite, {}) if args.task == "all" else {}
        costs = {s: cost(m) for s, (m, *_) in models.items() if args.cost and not getattr(m, "peer", True)}
        print(table(tasks, found, {} if args.cost else peers, bool(cells or args.cost), costs))
        if args.drift:
            drift(models, next(task for task in tasks if task.metadata.type == "Retrieval"))
        if args.plot:
            plot(models, found, args)


def main():
    args, ranks = flags(), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        if dist.get_rank():
            return serve()
    (grid if args.grid else work)(args)
    if ranks > 1:
        dist.broadcast_object_list([None])
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
