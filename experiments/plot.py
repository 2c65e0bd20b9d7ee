"""Pictures of runs: loss by step, mean scores, and the latents that the tokens of a text use.

    python experiments/plot.py runs/stage1 runs/stage2    # -> runs/plot.png
    python experiments/plot.py runs/stage2 --text "The Baikal is a deep lake." --limit 100
    python experiments/plot.py --growth runs/ablations/*-x* --limit 100 --max-length 40

The last one draws the grid growth of ablate.py -> runs/growth.png. The scores are those of eval.py,
whose flags are known here too: with the flags of an earlier evaluation its results are found. The
latents are the last run's.
--growth draws how scores grow with training: a line for each NAME of runs called NAME-xN, over N.
Needs matplotlib.
"""

import sys
from pathlib import Path

if not __package__:  # python experiments/plot.py
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import data.threads  # before torch

import math
import re
from collections import defaultdict

import numpy as np
import torch

from data.commands import InputError, optional_package, run_command
from data.files import json_lines
from eval import Encoder, flags
from experiments.ablate import compare, runs_by_seed, short_names

SHOWN = 48  # latents in the picture


def draw_losses(axes, folders):
    """A curve for each run of its training loss by step."""
    names = short_names(folders)
    for run, folder in folders.items():
        steps = []
        losses = []
        for _, record in json_lines(folder / "log.jsonl"):
            if "loss" in record:
                steps.append(record["step"])
                losses.append(record["loss"])
        axes.plot(steps, losses, label=names[run])
    axes.legend()


def draw_means(axes, results):
    """Bars of the mean scores, a group for each mean, with the deviation over seeds."""
    first = list(results.values())[0]
    rows = [row for row in first if row.endswith("mean")]
    width = 0.8 / len(results)
    for i, scores in enumerate(results.values()):
        seeds = np.array([scores[row] for row in rows])  # (means, seeds)
        deviations = seeds.std(axis=1, ddof=min(1, seeds.shape[1] - 1))
        places = np.arange(len(rows)) + i * width
        axes.bar(places, seeds.mean(axis=1), width, yerr=deviations)
    axes.set_xticks(range(len(rows)), rows, rotation=20)


def draw_growth(axes, results, row):
    """A line for each NAME of runs called NAME-xN: the score of a row over N."""
    lines = defaultdict(dict)
    for run, scores in results.items():
        name, times = run_and_times(run)
        lines[name][times] = np.mean(scores[row])
    for name, points in sorted(lines.items()):
        times = sorted(points)
        axes.plot(times, [points[n] for n in times], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_title(row)


def run_and_times(run):
    """runs/latent-x4 -> ("latent", 4)"""
    parts = re.fullmatch(r"(.+)-x(\d+)", Path(run).name)
    if parts is None:
        raise InputError(f"{run}: expected a run whose name ends in -x and a number")
    return parts[1], int(parts[2])


def draw_latents(axes, tokens, latents, weights):
    """The attention of tokens (T) to latents, weights (T, SHOWN)."""
    axes.imshow(weights, aspect="auto")
    axes.set_xticks(range(len(latents)), latents, rotation=90)
    axes.set_yticks(range(len(tokens)), tokens)


@torch.no_grad()
def latent_map(model, text):
    """Which latents the tokens of a text attend to, a mean over heads.

    -> tokens (T), the numbers of the SHOWN latents most used, weights (T, SHOWN)
    """
    ids = model.tokenize([text])[0].ids
    tokens = [model.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    lengths = (len(ids),)
    hidden = model.embedding_model(torch.tensor(ids, device=model.device), lengths, model.dtype)

    layer = model.latent_attention_model
    queries = layer.cross_attend_blocks[0].norm(hidden)  # (T, D)
    keys, _ = layer.fold_latents(hidden.dtype)  # (D, C R)
    scores = (queries @ keys).float().unflatten(-1, (model.config.num_cross_heads, -1))
    weights = scores.softmax(dim=-1).mean(dim=1).cpu().numpy()  # (T, R)

    most_used = np.sort(weights.sum(axis=0).argsort()[-SHOWN:])
    return tokens, most_used, weights[:, most_used]


def plot_growth(args):
    """Writes growth.png: a panel for each task and mean."""
    figure_module = optional_package("matplotlib.figure", "experiments/plot.py")
    for run in args.runs:
        run_and_times(run)  # evaluation takes minutes
    results = compare(args.runs, args)
    if not results:
        return
    rows = list(results[args.runs[0]])
    columns = math.ceil(len(rows) / 2)
    figure = figure_module.Figure(figsize=(4 * columns, 8), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False).flat
    for axes, row in zip(panels, rows):
        draw_growth(axes, results, row)
    panels[0].legend()
    figure.suptitle("main score x 100 by times the steps")
    figure.savefig(Path(args.out, "growth.png"))


def plot(args):
    figure_module = optional_package("matplotlib.figure", "experiments/plot.py")
    figure = figure_module.Figure(figsize=(20, 7), layout="constrained")
    curves, bars, latents = figure.subplots(1, 3)
    encoders = {}  # of each run, or of its first seed
    for run in dict.fromkeys(args.runs):
        name = runs_by_seed(run)[0]
        encoders[run] = Encoder(name, args.max_length, args.dtype, args.limit, args.perturb)

    # what can fail at once comes first; evaluation takes minutes
    draw_losses(curves, {run: encoder.folder for run, encoder in encoders.items()})
    model = encoders[args.runs[-1]].model
    if model.config.pooling != "latent":
        raise InputError(f"{args.runs[-1]}: no latents with pooling '{model.config.pooling}'")
    draw_latents(latents, *latent_map(model, args.text))
    results = compare(list(encoders), args)
    if not results:  # the suite has no task of the wanted type
        return
    draw_means(bars, results)

    figure.suptitle("loss by step, mean scores x 100, attention of tokens to latents")
    figure.savefig(Path(args.out, "plot.png"))


def main():
    parser = flags(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs, or folders of runs by seed")
    text = "The Baikal is a deep lake."
    parser.add_argument("--text", default=text, help="text of the latent map")
    parser.add_argument("--growth", action="store_true", help="scores of runs NAME-xN over N")
    args = parser.parse_args()
    if args.growth:
        plot_growth(args)
    else:
        plot(args)


if __name__ == "__main__":
    run_command(main)
