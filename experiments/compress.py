"""Compresses a trained model: weights of its decoder become zero, blocks are left out.

    python experiments/compress.py                                # runs/stage2 -> runs/pruned
    python experiments/compress.py --prune wanda --sparsity 2:4   # two of each four weights
    python experiments/compress.py --prune none --drop-blocks 2   # a shorter decoder
    python train.py --stage 3                                     # recovers runs/pruned

The three methods differ in what they take a weight W_ij to be worth, and only the last one changes
the weights that stay. X (S, in) are the inputs that a layer reads in texts of the training rows.

    magnitude   |W_ij|               Han et al. 2015, arXiv 1506.02626
    wanda       |W_ij| ||X_j||       Sun et al. 2023, arXiv 2306.11695
    sparsegpt   W_ij^2 / [H^-1]_jj   Frantar and Alistarh 2023, arXiv 2301.00774; H = X^T X

Zeros are stored and multiplied like other weights, so a pruned model is neither smaller nor faster
until kernels and files know about zeros. One with fewer blocks is both.

S tokens of a packed batch, D model width; a weight is (out, in).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from any folder

import data.threads  # before torch

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import nvembed
import train
from data.base import resolve
from data.card import copy_prompts
from data.commands import CHOICES, DTYPES, Flags, InputError, run_command
from data.files import write_json
from data.folders import local_folder, torch_dtype
from data.machine import fast_dtype
from data.recipes import read_recipe
from data.sampling import draw_rows, known_positives, read_datasets, schedule

DEFAULT_MODEL = "runs/stage2"
MARK = "compress.json"  # what this command wrote, and how
SOLVER_COLUMNS = 128  # of a block in SparseGPT's algorithm 1, where they are called B and B_s
DAMPING = 0.01  # added to the diagonal of H, in units of its mean, as in GPTQ (section 3.3)
BATCH_TOKENS = 16384


# ---- what becomes zero


class Sparsity(NamedTuple):
    """The `share` of weights that become zero: of each `group` of neighbours in a row.

    Without a group it is the share of each row, in SparseGPT of each block of columns.
    """

    share: float
    group: int | None = None


def read_sparsity(text):
    """Reads 0.5 (half of the weights) or 2:4 (two of each four neighbours, which GPUs can skip)."""
    if text == "2:4":
        return Sparsity(0.5, group=4)
    message = f"--sparsity: expected a share between 0 and 1, or 2:4, got {text}"
    try:
        share = float(text)
    except ValueError as error:
        raise InputError(message) from error
    if not 0 < share < 1:
        raise InputError(message)
    return Sparsity(share)


def keep_mask(scores, share, group):
    """bool mask of the scores' shape: False at the lowest `share` of each `group` of numbers."""
    groups = scores.reshape(-1, group)
    order = groups.argsort(dim=1, stable=True)
    lowest = order[:, : round(share * group)]
    mask = torch.ones_like(groups, dtype=torch.bool)
    mask.scatter_(1, lowest, False)
    return mask.view(scores.shape)


def magnitude(weight, gram, sparsity):
    """Zeroes the smallest |W_ij| of each row; the inputs are not looked at."""
    group = sparsity.group or weight.shape[1]
    return weight * keep_mask(weight.abs(), sparsity.share, group)


def wanda(weight, gram, sparsity):
    """Zeroes the smallest |W_ij| ||X_j|| of each row, ||X_j||^2 being the diagonal of X^T X."""
    group = sparsity.group or weight.shape[1]
    norms = gram.diagonal().sqrt()  # (in,)
    return weight * keep_mask(weight.abs() * norms, sparsity.share, group)


def sparsegpt(weight, gram, sparsity):
    """Zeroes columns from left to right; the weights right of a column make up for its zeros.

    For one row w of W, zeroing w_j changes the output X w least, by w_j^2 / [H^-1]_jj in squares,
    if each w_k right of it becomes w_k - w_j [H^-1]_jk / [H^-1]_jj. H is that of the columns from j
    on, since those on the left are done. All these inverses are in one Cholesky factor U of
    H^-1 = U^T U (GPTQ, arXiv 2210.17323, section 3.3): the numbers above are (w_j / U_jj)^2 and
    w_k - (w_j / U_jj) U_jk.

    Inside a block of columns each update touches the block alone. One matrix product then brings
    the columns right of the block up to date: the same sums as column by column, in less time.
    """
    weight = weight.clone()
    factor = inverse_factor(gram)
    width = weight.shape[1]
    for start in range(0, width, SOLVER_COLUMNS):
        end = min(start + SOLVER_COLUMNS, width)
        block = weight[:, start:end]  # a view: it is changed in place
        errors = prune_columns(block, factor[start:end, start:end], sparsity)  # (out, n)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def inverse_factor(gram):
    """The upper Cholesky factor U of H^-1 = U^T U, H = gram damped, in fp32."""
    hessian = gram.double()
    damping = DAMPING * hessian.diagonal().mean() + 1e-9  # also where no input was ever read
    hessian = hessian + damping * torch.eye(len(gram), dtype=hessian.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def prune_columns(weight, factor, sparsity):
    """Prunes weight (out, n), n columns of a layer, in place -> errors w_j / U_jj (out, n).

    `factor` (n, n) is their part of U. Which weights become zero is decided by their cost: at the
    first column for all n of them together, or for 2:4 at every fourth column for each row's four.
    """
    out, columns = weight.shape
    decided = sparsity.group or columns  # columns whose mask is decided at once
    compared = sparsity.group or out * columns  # numbers that are compared with each other
    diagonal = factor.diagonal()
    errors = torch.zeros_like(weight)
    for j in range(columns):
        if j % decided == 0:
            part = slice(j, j + decided)
            costs = (weight[:, part] / diagonal[part]) ** 2
            mask = keep_mask(costs, sparsity.share, compared)
        pruned = weight[:, j] * mask[:, j % decided]
        errors[:, j] = (weight[:, j] - pruned) / diagonal[j]
        weight[:, j] = pruned
        weight[:, j + 1 :] -= torch.outer(errors[:, j], factor[j, j + 1 :])
    return errors


METHODS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}


def prune(weight, gram, method, sparsity):
    """weight (out, in) and gram (in, in), X^T X of its inputs -> the pruned weight, same dtype."""
    return METHODS[method](weight.float(), gram, sparsity).to(weight.dtype)


# ---- through the decoder, block by block


class Packed(NamedTuple):
    """A packed batch on its way through the decoder, the arguments of a block."""

    hidden: torch.Tensor  # (S, D)
    rope: tuple
    lengths: tuple


def embed(model, tokens):
    """What enters the first block, for a list of Tokens -> list of Packed."""
    batches = []
    longest = max(len(text.ids) for text in tokens)
    for indices in nvembed.pack(tokens, max(longest, BATCH_TOKENS)):
        ids = [tokens[i].ids for i in indices]
        lengths = tuple(len(text) for text in ids)
        packed = torch.from_numpy(np.concatenate(ids)).to(model.device)  # (S,)
        hidden = model.embedding_model.embed_tokens(packed).to(model.dtype)
        rope = nvembed.rope_tables(model.config, lengths, model.device, model.dtype)
        batches.append(Packed(hidden, rope, lengths))
    return batches


def run_block(block, batches):
    """The same batches behind the block."""
    return [batch._replace(hidden=block(*batch)) for batch in batches]


def projections(block):
    """Name -> Linear of a block's seven projections, or of the whole decoder's."""
    parts = block.named_modules()
    return {name: part for name, part in parts if isinstance(part, nvembed.Linear)}


def input_grams(block, batches):
    """X^T X (in, in) of the inputs X of each projection, over all batches -> {name: gram}, fp32."""
    grams = {}
    hooks = []
    for name, layer in projections(block).items():
        width = layer.in_features
        grams[name] = torch.zeros(width, width, device=layer.weight.device)
        hook = functools.partial(add_gram, grams[name])
        hooks.append(layer.register_forward_pre_hook(hook))
    run_block(block, batches)
    for hook in hooks:
        hook.remove()
    return grams


def add_gram(gram, layer, inputs):
    """gram += X^T X; a hook that PyTorch calls before the layer."""
    x = inputs[0].float()  # (S, in)
    gram += x.mT @ x


@torch.no_grad()
def prune_decoder(model, tokens, method, sparsity):
    """Prunes all projections of the decoder, in place. A block reads what pruned blocks write.

    Memory: the model, the hidden states of all tokens, and the grams of one block.
    """
    batches = embed(model, tokens)
    blocks = tqdm(model.embedding_model.layers, desc="prune", unit="block")
    for i, block in enumerate(blocks):
        grams = input_grams(block, batches)
        for name, layer in projections(block).items():
            if not grams[name].isfinite().all():
                where = f"--model: layers.{i}.{name}"
                raise InputError(f"{where}: its inputs are not finite in {model.dtype}")
            layer.weight.data = prune(layer.weight, grams[name], method, sparsity)
        batches = run_block(block, batches)


@torch.no_grad()
def drop_blocks(model, tokens, count):
    """Removes the `count` blocks that change the hidden states least, in place.

    A block's change is 1 - cosine(what enters, what leaves) over all tokens: the block influence of
    ShortGPT (Men et al. 2024, arXiv 2403.03853). It is measured once, in the whole decoder.
    """
    blocks = model.embedding_model.layers
    if count >= len(blocks):
        raise InputError(f"--drop-blocks: expected less than the {len(blocks)} blocks, got {count}")
    batches = embed(model, tokens)
    changes = []
    for block in tqdm(blocks, desc="measure", unit="block"):
        after = run_block(block, batches)
        changes.append(change(batches, after))
        batches = after
    least = np.argsort(changes, kind="stable")[:count]
    kept = [block for i, block in enumerate(blocks) if i not in least]
    model.embedding_model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def change(before, after):
    """1 - cosine of the hidden states, summed over the tokens of all batches."""
    total = 0.0
    for old, new in zip(before, after, strict=True):
        cosines = F.cosine_similarity(old.hidden.float(), new.hidden.float(), dim=-1)  # (S,)
        total += (1 - cosines).sum().item()
    return total


# ---- the texts that it is calibrated on


def calibration_tokens(model, recipe, count, s):
    """The texts that a first training step of `count` rows would see -> list of Tokens."""
    plain = replace(s, in_batch=True, kd=0.0)  # rows without negatives or scores will do
    datasets = read_datasets(recipe["datasets"], 2, plain)  # recovery, too, is on those of stage 2
    rows = [dataset.rows for dataset in datasets]
    sizes = [len(part) for part in rows]
    first_step = replace(s, batch=min(count, sum(sizes)), batching="blended")
    places = schedule(sizes, first_step, 0)
    drawn = draw_rows(rows, datasets, places, s)
    return train.make_batch(model, drawn, s, known_positives(datasets)).tokens


# ---- the command


def parse_arguments():
    parser = Flags(__doc__)
    flag = parser.add_argument
    flag("--model", default=DEFAULT_MODEL, help="folder, hub id or run")
    flag("--prune", choices=(*METHODS, "none"), default="sparsegpt")
    flag("--sparsity", default="0.5", help="share of the weights that become zero, or 2:4")
    flag("--drop-blocks", type=int, default=0, metavar="N", help="blocks to leave out")
    flag("--calibration", type=int, default=128, metavar="ROWS", help="training rows to read")
    flag("--recipe", default=str(ROOT / "data" / "local.json"), help="its rows of stage 2 are read")
    flag("--out", default="runs/pruned", help="folder of the compressed model")
    recipe = "default: as in the recipe's stage 3"
    flag("--max-length", type=int, help=f"tokens of a text; {recipe}")
    flag("--dtype", choices=CHOICES["dtype"], help=f"of the arithmetic; {recipe}")
    flag("--export-dtype", choices=DTYPES, help=f"of the saved weights; {recipe}")
    flag("--seed", type=int, help=f"of the rows that are drawn; {recipe}")
    parser.set_defaults(stage=3)
    return parser.parse_args()


def check_arguments(args):
    """What would go wrong late is refused before the model is read."""
    if args.model == DEFAULT_MODEL and not Path(args.model, "config.json").exists():
        raise InputError(f"{args.model}: no finished run; run train.py --stage 2 first")
    out = Path(args.out)
    if out.exists() and Path(args.model).exists() and out.samefile(args.model):
        raise InputError(f"--out {out}: would overwrite the model; use another")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: expected a folder, got a file")
    content = sorted(path.name for path in out.glob("[!.]*"))
    if content and MARK not in content:
        expected = "expected a new folder, an empty one or one of this command"
        raise InputError(f"--out {out}: {expected}, found {content[0]}")
    if args.prune == "none" and args.drop_blocks == 0:
        raise InputError("--prune none: expected --drop-blocks, or nothing is compressed")


def load(name, dtype):
    """The model to compress, on the GPU if there is one. dtype: a name, or "auto"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fast_dtype(device) if dtype == "auto" else torch_dtype(dtype)
    model = nvembed.NVEmbed.from_pretrained(resolve(name), device, dtype)
    if nvembed.lora_layers(model):
        message = "expected plain weights, got an adapter: merge it by save_pretrained first"
        raise InputError(f"{name}: {message}")
    return model


def zero_share(model):
    """Share of the weights of the decoder's projections that are zero."""
    zeros, total = 0, 0
    for layer in projections(model.embedding_model).values():
        zeros += (layer.weight == 0).sum().item()
        total += layer.weight.numel()
    return zeros / total


def main():
    args = parse_arguments()
    check_arguments(args)
    sparsity = read_sparsity(args.sparsity)
    recipe = read_recipe(args.recipe)
    s = train.read_settings(recipe, args)
    model = load(args.model, s.dtype)
    export_dtype = model.dtype if s.export_dtype == "auto" else torch_dtype(s.export_dtype)
    tokens = calibration_tokens(model, recipe, args.calibration, s)
    if args.drop_blocks:
        drop_blocks(model, tokens, args.drop_blocks)
    if args.prune != "none":
        prune_decoder(model, tokens, args.prune, sparsity)
    write_json(Path(args.out, MARK), vars(args))  # first: what follows may be written over
    model.save_pretrained(args.out, export_dtype)
    copy_prompts(local_folder(resolve(args.model)), Path(args.out))
    blocks = model.config.num_hidden_layers
    print(f"{args.out}: {blocks} blocks, {zero_share(model):.1%} of their weights are zero")


if __name__ == "__main__":
    run_command(main)
