"""Merges models of one architecture into one: no training, and none of its cost at run time.

    python experiments/merge.py runs/a runs/b --out runs/ab                    the mean
    python experiments/merge.py runs/a runs/b --out runs/ab --weights 1 3      a quarter, three
    python experiments/merge.py runs/a runs/b --out runs/ab --method slerp     of two models

The seeds of a cell of ablate.py, and its means over single runs beside those of their mean:

    python experiments/merge.py runs/ablations/CELL/{0,1,2} --out runs/ablations/CELL-merged
    python experiments/ablate.py --compare runs/ablations/CELL runs/ablations/CELL-merged

mean    w_1 a + w_2 b + ..., the weights adding up to 1: a "soup" (Wortsman et al. 2022, arXiv
        2203.05482); the recipes of many embedders end with one of their checkpoints
slerp   sin((1 - t) u) / sin(u) a + sin(t u) / sin(u) b, where t is the second weight and u the
        angle between a and b: on the arc between them in place of its chord (Shoemake 1985)

Both are taken tensor by tensor, in fp32; slerp reads each tensor as one long vector. Models that
began as one, such as the seeds of a cell or the checkpoints that --keep keeps, are near each other.
The mean of others embeds nothing.

Inputs are mapped from their files: memory holds the merged model, and one tensor of each.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from any folder

import data.threads  # before torch

import math
from dataclasses import asdict

import torch
from tqdm import tqdm

import nvembed
from data.base import resolve
from data.card import copy_prompts
from data.commands import DTYPES, Flags, InputError, run_command
from data.dialects import content_hash
from data.files import locked, write_json
from data.folders import local_folder, read_weights

FREE = ("max_position_embeddings", "max_seq_length")  # may differ; the first model's are kept
PARALLEL = 1e-3  # the sine of an angle below which slerp and the mean are the same in fp32


# ---- tensors


def mean(tensors, weights):
    """The mean of tensors of one shape by weights, in fp32.

    From one tensor to the next it moves by that one's share of the weights so far. So the mean of
    equal tensors is that tensor, to the last bit.
    """
    merged, total = tensors[0].float(), weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight
        if weight > 0:
            merged = torch.lerp(merged, tensor.float(), weight / total)
    return merged


def slerp(tensors, weights):
    """Two tensors of one shape -> what is between them on the arc, in fp32; see above.

    Where they are parallel or opposite, or one is zero, there is no one arc: then their mean.
    """
    a, b = (tensor.float() for tensor in tensors)
    t = weights[1] / sum(weights)
    lengths = [torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for tensor in (a, b)]
    if 0 in lengths:
        return mean(tensors, weights)
    cosine = (a * b).sum(dtype=torch.float64).item() / math.prod(lengths)
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < PARALLEL:
        return mean(tensors, weights)
    of_a = math.sin((1 - t) * angle) / math.sin(angle)
    of_b = math.sin(t * angle) / math.sin(angle)
    return of_a * a + of_b * b


METHODS = {"mean": mean, "slerp": slerp}


# ---- models


def load(name):
    """A model, mapped from its files. A base, whose pooling layer is untrained, is refused."""
    folder = local_folder(resolve(name))
    model = nvembed.NVEmbed.from_pretrained(folder, device=None)
    if nvembed.lora_layers(model):
        message = "expected plain weights, got an adapter: merge it by save_pretrained first"
        raise InputError(f"{name}: {message}")
    layers = [tensor for tensor in model.state_dict() if tensor.startswith("latent_attention")]
    if layers and layers[0] not in read_weights(folder, None, None):
        raise InputError(f"{name}: expected a trained pooling layer, got a base without one")
    return model


def check_same(names, models):
    """Refuses models whose configs or tokenizers differ: their weights mean different things."""
    first = asdict(models[0].config)
    for name, model in zip(names, models, strict=True):
        for field, value in asdict(model.config).items():
            if value != first[field] and field not in FREE:
                differ = f"{first[field]!r} in {names[0]}, {value!r} in {name}"
                raise InputError(f"{name}: expected models of one config, got {field} = {differ}")
        if model.tokenizer.to_str() != models[0].tokenizer.to_str():
            raise InputError(f"{name}: expected the tokenizer of {names[0]}")


@torch.no_grad()
def merge(models, method, weights, dtype):
    """Models -> the first of them, its weights those of the merged model, in `dtype`."""
    states = [model.state_dict() for model in models]
    merged = {}
    for name in tqdm(states[0], desc="merge", unit="tensor"):
        tensors = [state[name] for state in states]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise InputError(f"tensor '{name}': expected one shape, got {sorted(shapes)}")
        merged[name] = METHODS[method](tensors, weights).to(dtype)
    models[0].load_state_dict(merged, assign=True)
    return models[0]


def write(out, model, dtype, first, made_of):
    """Writes a merged model with the prompts of the folder `first`, and what it is made of."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        model.save_pretrained(out, dtype)
        copy_prompts(first, out)
        write_json(out / "merge.json", made_of)


# ---- the command


def check_arguments(args):
    """What would go wrong late is refused before a model is read."""
    count = len(args.models)
    if count < 2:
        raise InputError("expected two models or more, got one")
    if args.method == "slerp" and count != 2:
        raise InputError(f"--method slerp: expected two models, got {count}")
    args.weights = args.weights or [1.0] * count
    if len(args.weights) != count:
        raise InputError(f"--weights: expected {count}, one a model, got {len(args.weights)}")
    if not all(0 <= weight < float("inf") for weight in args.weights) or sum(args.weights) == 0:
        raise InputError(f"--weights: expected numbers in [0, inf), not all 0, got {args.weights}")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: expected a folder, got a file")
    content = sorted(path.name for path in out.glob("[!.]*"))
    if content:
        raise InputError(f"--out {out}: expected a new or empty folder, found {content[0]}")


def main():
    parser = Flags(__doc__)
    flag = parser.add_argument
    flag("models", nargs="+", help="folders or hub ids")
    flag("--out", required=True, help="folder of the merged model: new, or empty")
    flag("--method", choices=METHODS, default="mean")
    flag("--weights", type=float, nargs="+", help="one a model, divided by their sum; default 1")
    flag("--export-dtype", choices=DTYPES, help="of the saved weights; default: the first model's")
    args = parser.parse_args()
    check_arguments(args)
    loaded = [load(name) for name in args.models]
    check_same(args.models, loaded)
    dtype = loaded[0].embedding_model.embed_tokens.weight.dtype
    if args.export_dtype:
        dtype = getattr(torch, args.export_dtype)
    folders = [local_folder(resolve(name)) for name in args.models]
    hashes = [content_hash(folder) for folder in folders]
    models = list(zip(args.models, hashes, strict=True))
    made_of = {"models": models, "method": args.method, "weights": args.weights}
    merged = merge(loaded, args.method, args.weights, dtype)
    write(Path(args.out), merged, dtype, folders[0], made_of)
    print(f"{args.out}: {args.method} of {', '.join(args.models)} by {args.weights}")


if __name__ == "__main__":
    run_command(main)
