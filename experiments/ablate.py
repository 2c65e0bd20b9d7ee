"""Ablations: grids of small models, and a compact table of any models.

    python experiments/ablate.py --grid pooling --jobs 2            # an ablation of the paper
    python experiments/ablate.py --grid matryoshka --dims 64        # its vectors' first 64 numbers
    python experiments/ablate.py --compare runs/stage1 runs/stage2  # the means of runs

Grids are declared in ablations.json as lists of cells. A cell trains a small model, once for every
seed: the local recipe with the file's preset, changed by the cell's "settings" (of every stage),
"labels" and data sets "without". It may "mine" its own negatives (flags of mine.py). Its "steps"
are commands, each of which begins with what the one before wrote:

    {"stage": 1, ...}      trains; further keys are settings of the stage
    {"compress": [flags]}  prunes, see experiments/compress.py

A grid may also name a cell's models as eval.py loads them, for instance quantised: CELL:int8.

A run is a folder named by the hash of all that determines it, but for the code. So cells share the
runs that they have in common, a finished one is not run again, and one that was killed goes on.
After a change of the code use another --out.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # python experiments/ablate.py
    sys.path.append(str(ROOT))

import data.threads  # before torch
from data.commands import InputError, optional_package, run_command
from data.files import digest, read_json, write_json
from data.quantize import FORMS
from data.recipes import apply_preset, read_recipe
from data.tasks import find_tasks
from eval import PUBLISHED, evaluate, flags, load, markdown, number, run_on_ranks, split_spec

ABLATIONS = ROOT / "experiments/ablations.json"
LOCKS = {}  # result of a command: held while the command runs
DONE = set()  # commands that this process has run


# ---- grids


def run_grid(name, declared, folder, jobs):
    """Runs what a grid, or "all", lacks, `jobs` commands at once -> its models, for eval.py."""
    grids = declared["grids"]
    if name != "all" and name not in grids:
        raise InputError(f"--grid {name}: expected all or one of {list(grids)}")
    names = list(grids) if name == "all" else [name]
    models = [model for name in names for model in grids[name]]
    models = list(dict.fromkeys(models))  # grids share cells

    for model in models:  # refuses what would fail after hours of training
        cell, words = split_spec(model)
        cell_recipe(cell, declared)
        if set(FORMS) & set(words):
            optional_package("torchao.quantization", model)
    cells = dict.fromkeys(split_spec(model)[0] for model in models)
    todo = [(folder / cell, seed, declared) for cell in cells for seed in range(declared["seeds"])]
    with ThreadPoolExecutor(jobs) as pool:
        # after an error nothing more is started
        done = pool.map(lambda cell: run_cell(*cell), todo)
        for _ in tqdm(done, total=len(todo), desc=f"grid {name}"):
            pass
    return [str(folder / model) for model in models]


def run_cell(folder, seed, declared):
    """Runs the steps of a cell and links FOLDER/SEED to the model that the last one wrote."""
    recipe = cell_recipe(folder.name, declared)
    recipe["seed"] = seed
    cell = declared["cells"][folder.name]
    settings = cell.get("settings", {})
    mined = ()
    if "mine" in cell:
        mined = ("--mined", mine(cell["mine"], recipe, folder.parent / "mined"))

    runs = folder.parent / "runs"
    model = recipe["base"]  # what the next step begins with
    trained = None  # the last run that was trained
    for step in cell["steps"]:
        if "compress" in step:
            model = compress(runs, recipe, settings, model, step["compress"])
            continue
        changes = {name: value for name, value in step.items() if name != "stage"}
        more = mined
        if step["stage"] == 3:  # recovery: distilled from the model as it was before pruning
            more = (*mined, "--teacher", trained)
        model = train(runs, recipe, step["stage"], settings | changes, model, more)
        trained = model

    folder.mkdir(parents=True, exist_ok=True)
    link = folder / str(seed)
    link.unlink(missing_ok=True)
    link.symlink_to(model)


def cell_recipe(name, declared):
    """The recipe of a cell, by its "labels" and "without"."""
    cells = declared["cells"]
    if name not in cells:
        raise InputError(f"{ABLATIONS}: grids: expected cells of {list(cells)}, got {name!r}")
    cell = cells[name]
    recipe = read_recipe(ROOT / "data/local.json", declared["preset"], cell.get("labels"))
    changes = {"without": cell.get("without", [])}
    apply_preset(recipe, changes, f"{ABLATIONS}: cells: {name}")
    return recipe


def mine(rule, recipe, folder):
    """Mines the recipe's retrieval sets by mine.py's flags `rule` -> folder of the mined rows."""
    out = folder / "".join(rule).strip("-")
    files = [data["file"] for data in recipe["datasets"] if data["kind"] == "retrieval"]
    execute(["mine.py", *rule, "--out", out, "--data", *files], out)  # skips what is mined
    return out


def train(runs, recipe, stage, changes, model, more):
    """Trains one stage, with `changes` of its settings and further flags `more` -> the run."""
    run, recipe = name_run(runs, stage_recipe(recipe, stage, changes), model, more)
    if not (run / "finished").exists():
        command = ["train.py", "--stage", stage, "--recipe", recipe, "--init", model]
        execute([*command, *more, "--out", run], run)
    return run


def compress(runs, recipe, changes, model, how):
    """Compresses a model by compress.py's flags `how` -> folder of the smaller model."""
    run, recipe = name_run(runs, stage_recipe(recipe, 3, changes), model, how)
    if not (run / "config.json").exists():
        command = ["experiments/compress.py", "--model", model, "--recipe", recipe]
        execute([*command, *how, "--out", run], run)
    return run


def stage_recipe(recipe, stage, changes):
    """A recipe of one stage only: its data sets, its settings with `changes`."""
    settings = recipe["stages"][str(stage)] | changes
    rows_of = min(stage, 2)  # stage 3 reads the rows of stage 2
    datasets = [data for data in recipe["datasets"] if rows_of in data["stages"]]
    return recipe | {"datasets": datasets, "stages": {str(stage): settings}}


def name_run(runs, recipe, model, more):
    """The folder for what a recipe, its rows, a model to begin with and further flags determine.

    -> (the folder, the recipe's file beside it)
    """
    files = [Path(data["file"]) for data in recipe["datasets"]]
    if "--mined" in more:
        mined = more[more.index("--mined") + 1]
        files += [Path(mined, file.name) for file in files]
    rows = [digest(file) for file in files if file.exists()]  # not every set is mined
    identity = f"{json.dumps(recipe, indent=2)} {model} {more} {rows}"
    folder = runs / hashlib.sha256(identity.encode()).hexdigest()[:12]
    file = folder.with_suffix(".json")
    write_json(file, recipe)
    return folder, file


def execute(command, folder):
    """Runs a command of the project, with one thread, that writes into a folder.

    What it prints is appended to FOLDER.output.
    """
    log = folder.with_suffix(".output")
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, *[str(argument) for argument in command]]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with LOCKS.setdefault(folder, threading.Lock()):  # another cell may need the same
        if tuple(line) in DONE:
            return
        with log.open("a") as out:
            done = subprocess.run(line, check=False, stdout=out, stderr=out, env=env, cwd=ROOT)
        if done.returncode != 0:
            end = " ".join(log.read_text().split())[-300:]
            raise InputError(f"{log}: exit status {done.returncode}: {end}")
        DONE.add(tuple(line))


# ---- the compact table


def compare(specs, args, seeds=None):
    """Evaluates models, prints their compact table -> {spec: {row: main scores, one a seed}}.

    `seeds` is how many runs of a folder are compared, by default all.
    """
    tasks = find_tasks(args.suite, args.task, args.limit)
    models = {spec: [load(run, args) for run in runs_by_seed(spec)[:seeds]] for spec in specs}
    if not tasks:
        return {}
    results = {}
    for spec, runs in models.items():
        found = [evaluate(run, tasks, args) for run in runs]
        results[spec] = {row: [scores[row][0] for scores in found] for row in found[0]}

    peers = {}
    for spec in specs:
        name = Path(spec).name
        if name in PUBLISHED["ablations"]:
            peers[f"{name}, paper"] = PUBLISHED["ablations"][name]
    if args.task == "all":
        peers.update(PUBLISHED["suites"].get(args.suite, {}))
    rows = list(results[specs[0]])
    print(compact_table(rows[len(tasks) :], results, peers))
    return results


def runs_by_seed(spec):
    """A model's name -> names of models: itself, or the runs of a folder with one for each seed."""
    path, words = split_spec(spec)
    runs = [config.parent for config in Path(path).glob("*/config.json")]
    runs = sorted((run for run in runs if run.name.isdecimal()), key=lambda run: int(run.name))
    return [":".join([str(run), *words]) for run in runs or [path]]


def compact_table(rows, results, peers):
    """Markdown: a line for each model and peer, sorted by name; a column for each row of scores."""
    lines = []
    names = short_names(results)
    for spec, scores in results.items():
        lines.append([names[spec], *[over_seeds(scores[row]) for row in rows]])
    for name, scores in peers.items():
        lines.append([name, *[number(scores.get(row, np.nan)) for row in rows]])
    return markdown([["run", *rows], *sorted(lines)])


def short_names(specs):
    """{spec: the last part of its path, or all of it where two end alike}"""
    counts = Counter(Path(spec).name for spec in specs)
    return {spec: Path(spec).name if counts[Path(spec).name] == 1 else spec for spec in specs}


def over_seeds(scores):
    """The mean of scores as text, with their standard deviation if there are several."""
    mean = number(np.mean(scores))
    if len(scores) == 1 or mean == "-":
        return mean
    return f"{mean} ± {np.std(scores, ddof=1):.2f}"


# ---- the command


def work(args):
    if args.compare:
        compare(list(dict.fromkeys(args.compare)), args, args.seeds)
        return
    declared = read_json(ABLATIONS)
    if not find_tasks(args.suite, args.task, args.limit):  # before hours of training
        return
    declared["seeds"] = args.seeds or declared["seeds"]
    folder = Path(args.out).resolve() / "ablations"
    models = run_grid(args.grid, declared, folder, args.jobs)
    compare(models, args, declared["seeds"])


def main():
    parser = flags(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grid", help="of ablations.json, with its evaluation; or all")
    what.add_argument(
        "--compare", nargs="+", metavar="RUN", help="runs, or folders of runs by seed"
    )
    parser.add_argument("--jobs", type=int, default=1, help="commands of a grid run at once")
    parser.add_argument("--seeds", type=int, help="runs of a cell; default: the grid's, or all")
    args = parser.parse_args()
    if args.grid:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--grid: expected one process; --jobs runs several commands at once")
        # the flags that were given override those of the file
        args = parser.parse_args([*read_json(ABLATIONS)["evaluation"], *sys.argv[1:]])
    run_on_ranks(work, args)


if __name__ == "__main__":
    run_command(main)
