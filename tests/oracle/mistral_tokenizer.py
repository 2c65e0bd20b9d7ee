"""Mistral-7B's tokenizer.json, from the sentencepiece model in mistral-common (Apache-2.0).

A BPE with byte fallback; merges are every split of a piece into two pieces, the best-scored piece
first. It is the conversion that transformers makes of a Llama tokenizer, without sentencepiece or
protobuf.
"""

import struct

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from data import base
from data.files import cache, renamed

VERSION = "1.13.1"
SHA256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # sentencepiece_model.proto, SentencePiece.Type


def varint(data, at):
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def fields(data):
    """A protobuf message -> (field number, value) pairs: ints, bytes or 32-bit floats."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            assert key & 7 == 5, f"wire type {key & 7} at byte {at}"
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        yield key >> 3, value


def read_pieces(path):
    """sentencepiece model -> [(piece, score, type)], in the order of their ids."""
    messages = [dict(fields(value)) for number, value in fields(path.read_bytes()) if number == 1]
    return [(m[1].decode(), m.get(2, 0.0), m.get(3, NORMAL)) for m in messages]


def convert(path):
    """sentencepiece BPE model -> Tokenizer with Mistral's normalizer and post-processor."""
    pieces = read_pieces(path)
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {}
    for piece, score, kind in pieces:
        if kind != NORMAL:
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        for pair in sorted(known, key=lambda ab: (vocab[ab[0]], vocab[ab[1]])):
            scores[pair] = score
    merges = sorted(scores, key=lambda ab: -scores[ab])
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)

    special = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in special]
    )
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return tokenizer


def mistral_tokenizer():
    """Path of Mistral-7B-v0.1's tokenizer.json in the cache; the package is fetched once."""
    path = cache() / f"mistral-{VERSION}-tokenizer.json"
    if not path.exists():
        base.PACKAGES["mistral-common"] = (VERSION, 7, SHA256)
        folder = base.fetch("mistral-common") / "mistral_common" / "data"
        with renamed(path) as temporary:
            convert(folder / "tokenizer.model.v1").save(str(temporary))
    return path
