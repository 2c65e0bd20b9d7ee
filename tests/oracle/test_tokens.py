"""Template, truncation and pool mask = the released tokenisation, on real tokenizers."""

import base64
import json
import random
import subprocess
import sys

import pytest
import references as ref
from conftest import ROOT
import torch
from compare import TASK, error_of
from tokenizers import Tokenizer

import nvembed
from data import texts
from nvembed import Config, NVEmbed

FIRST = {
    "letter": "apple pie",
    "digit": "7 apples",
    "cjk": "苹果 is red",
    "emoji": "🍎 is red",
    "newline": "\nnext line",
    "space": " spaced",
    "parenthesis": "(a) b",
    "empty": "",
}
OWN_SPACE = {  # where the prefix's trailing space does not merge with what follows
    "mistral": {"digit", "cjk", "emoji", "newline", "space", "empty"},
    "smollm2": {"digit", "newline", "space", "empty"},
}


def text_model(path, **settings):
    """A model without weights: the tokenizer and what the config says of it."""
    tokenizer = Tokenizer.from_file(str(path))
    changes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 1} | settings
    with torch.device("meta"):
        return NVEmbed(Config(**(ref.TINY | changes)), tokenizer)


@pytest.fixture(scope="module", params=["mistral", "smollm2", "no bos"])
def tokens_of(request, real_tokenizers):
    """(tokenizer name, bos, eos, model, a second tokenizer as oracle)"""
    name = "smollm2" if request.param == "no bos" else request.param
    oracle = Tokenizer.from_file(str(real_tokenizers[name]))
    bos = {"mistral": "<s>", "smollm2": "<|im_start|>", "no bos": None}[request.param]
    eos = "</s>" if name == "mistral" else "<|im_end|>"
    bos_id = oracle.token_to_id(bos) if bos else None
    ids = {"bos_token_id": bos_id, "eos_token_id": oracle.token_to_id(eos)}
    return name, bos, eos, text_model(real_tokenizers[name], **ids), oracle


@pytest.mark.parametrize("task", [TASK, "找到 🍎: naïve\nor not"])
@pytest.mark.parametrize("first", FIRST)
def test_template_and_pool_mask(first, task, tokens_of):
    name, bos, eos, model, oracle = tokens_of
    text, prefix = FIRST[first], ref.prefix_of(task)
    (token,) = model.tokenize([text], task)
    ids, masked = ref.released_ids(oracle, text, task, bos=bos, eos=eos)
    assert token.ids == ids
    assert ids[-1] == oracle.token_to_id(eos)
    # without bos the released rule, applied from position 0, would take one token too many
    assert token.not_pooled == masked - (bos is None)
    offsets = oracle.encode(prefix + text, add_special_tokens=False).offsets
    starts = [-1] * bool(bos) + [start for start, _ in offsets]
    assert max(starts[: token.not_pooled]) < len(prefix) - 1
    pooled = starts[token.not_pooled :]
    assert not pooled or min(pooled) >= len(prefix) - 1
    one_space = oracle.encode(prefix, add_special_tokens=False).ids[-1]  # " " alone
    assert (token.ids[token.not_pooled] == one_space) == (first in OWN_SPACE[name])
    assert oracle.decode(token.ids[token.not_pooled : -1]).strip(" ") == text.strip(" ")
    (document,) = model.tokenize([text])
    assert document.not_pooled == 0
    assert document.ids == ref.released_ids(oracle, text, bos=bos, eos=eos)[0]


def test_mistral_tokenizer_is_mistrals(real_tokenizers):
    """What Mistral-7B-v0.1's tokenizer is known to give; 32,000 tokens, 58,980 merges."""
    raw = json.loads(real_tokenizers["mistral"].read_text())["model"]
    assert len(raw["vocab"]) == 32000
    assert len(raw["merges"]) == 58980
    tokenizer = Tokenizer.from_file(str(real_tokenizers["mistral"]))
    assert tokenizer.encode("Hello world").ids == [1, 22557, 1526]
    apple = ["<s>", "▁", "<0x0A>", "<0xF0>", "<0x9F>", "<0x8D>", "<0x8E>"]
    assert tokenizer.encode("\n🍎").tokens == apple
    for text in FIRST.values():
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_mask_can_be_switched_off(real_tokenizers):
    on = text_model(real_tokenizers["mistral"], mask_instruction=True)
    off = text_model(real_tokenizers["mistral"], mask_instruction=False)
    (a,), (b,) = on.tokenize(["apple"], TASK), off.tokenize(["apple"], TASK)
    assert a.ids == b.ids
    assert a.not_pooled > 10
    assert b.not_pooled == 0


def test_special_tokens_in_a_text_are_text(tokens_of):
    _, bos, eos, model, oracle = tokens_of
    text = f"one {eos} two {bos or eos} three"
    (token,) = model.tokenize([text])
    eos_id, bos_id = model.config.eos_token_id, model.config.bos_token_id
    assert token.ids.count(eos_id) == 1
    assert token.ids[-1] == eos_id
    assert token.ids.count(bos_id) == (bos is not None)
    parsed = oracle.encode(text, add_special_tokens=False).ids
    assert parsed.count(eos_id) >= 1  # control: what was escaped
    assert oracle.decode(token.ids, skip_special_tokens=True).strip() == text


def test_truncation(tokens_of, monkeypatch):
    _, bos, eos, model, oracle = tokens_of
    text = "The sun rises in the east. " * 20

    def cut(length):
        return model.tokenize([text], max_length=length)[0].ids

    full, _ = ref.released_ids(oracle, text, max_length=10**6, bos=bos, eos=eos)
    for length in (len(full) + 1, len(full), len(full) - 1, 17, 1):
        assert cut(length) == full[:length]  # as released: the eos is cut off first
    assert cut(len(full) - 1)[-1] != full[-1]
    query = model.tokenize([text], TASK, max_length=40)[0]
    released = ref.released_ids(oracle, text, TASK, 40, bos, eos)
    assert (query.ids, query.not_pooled + (bos is None)) == released
    monkeypatch.setattr(model.config, "keep_eos", True)
    for length in (len(full) + 1, len(full), len(full) - 1, 17, 2):
        assert cut(length) == [*full[:-1][: length - 1], full[-1]]


def mixed(seed):
    """6,000 characters of many scripts in random order: letters, digits, spaces, emoji, accents."""
    rng = random.Random(seed)
    alphabet = "aeinst ABC 0123456789 \n\t.,;-_=+/<>(){} éüñ ß 苹果是红色的 ไทยเป็นภาษา"
    alphabet += "🍎🇩🇪👩‍👩‍👧 e\u0301 هذا 안녕"
    return "".join(rng.choice(alphabet) for _ in range(6000))


LONG = {
    "words": "The sun rises in the east. " * 400,
    "one letter": "a" * 9000,
    "digits": "7 " * 4000,
    "number": "1234567890" * 900,
    "mixed": "苹果 🍎 " * 1500,
    "spaces": " " * 9000 + "end",
    "two spaces": "x  y" * 2000,
    "chinese": "太阳从东方升起,照亮了整个城市。河水穿过山谷流向大海" * 350,
    "thai": "พระอาทิตย์ขึ้นทางทิศตะวันออกและส่องสว่างไปทั่วเมือง" * 180,
    "base64": base64.b64encode(random.Random(0).randbytes(7000)).decode(),
    "emoji": "🍎🇩🇪👩‍👩‍👧😀" * 1200,
    "dashes": "-=" * 5000,
    "lines": "\n" * 9000 + "end",
    **{f"random {seed}": mixed(seed) for seed in range(6)},
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_are_cut_before_they_are_tokenised(name, tokens_of, monkeypatch):
    """The first max_length ids are those of the whole text."""
    model, text = tokens_of[3], LONG[name]
    settings = [("", 7), ("", 50), ("", 500), ("Find it", 50), ("Find it", 500)]
    fast = [model.tokenize([text, "short"], *setting) for setting in settings]

    def whole(encode, texts, count):
        return encode(texts, add_special_tokens=False)

    monkeypatch.setattr(nvembed, "encode_beginnings", whole)
    assert fast == [model.tokenize([text, "short"], *setting) for setting in settings]


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_not_read_to_its_end(name, tokens_of):
    """Control of the test above, and the most that is read: what the ids need, four times over."""
    model, text = tokens_of[3], LONG[name] * 10
    read = []

    def recorded(texts, **kind):
        read.extend(texts)
        return model.tokenizer.encode_batch(texts, **kind)

    (encoding,) = texts.encode_beginnings(recorded, [text], 50)
    assert len(encoding.ids) >= 50 + texts.MARGIN or len(read[-1]) >= len(text)
    assert len(read[0]) == 8 * (50 + 64)
    needed = encoding.offsets[50 + texts.MARGIN - 1][1]
    assert len(read[-1]) <= max(8 * 114, 4 * needed)
    assert all(text.startswith(part) for part in read)


def test_a_cut_changes_tokens_near_it(tokens_of):
    """Control: without a margin the ids would be others."""
    text, encode = LONG["words"], tokens_of[4].encode
    true = encode(text, add_special_tokens=False).ids
    cuts = [encode(text[:n], add_special_tokens=False).ids for n in range(100, 130)]
    assert any(ids != true[: len(ids)] for ids in cuts)
    margin = 8  # far less than ours will do for such words
    assert all(ids[:-margin] == true[: len(ids) - margin] for ids in cuts)


def test_parts_are_bounded_by_texts_and_characters():
    long, short = "x" * 1000, "x"
    assert texts.parts([], 10, (3, 100)) == []
    assert texts.parts([short] * 7, 10, (3, 100)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert texts.parts([long] * 3, 60, (3, 100)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert texts.parts([long] * 3, 50, (3, 100)) == [
        slice(0, 2),
        slice(2, 3),
    ]  # 50 of each are read
    assert texts.parts([long, short, short], 999, (9, 100)) == [slice(0, 1), slice(1, 3)]


MEMORY = """
import resource, sys
sys.path[:0] = {path!r}
import base64, random
from test_tokens import text_model
from data.base import base
model = text_model(base() / "tokenizer.json")
rng = random.Random(0)
texts = [base64.b64encode(rng.randbytes(15000)).decode() for _ in range(500)]
texts = [text * int(sys.argv[1]) for text in texts]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert {{len(token.ids) for token in model.tokenize(texts)}} == {{512}}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_of_long_texts_is_bounded(real_tokenizers):
    """500 texts of 20 KB without a space took 855 MiB; ten times as long they take no more."""
    code = MEMORY.format(path=[str(ROOT), str(ROOT / "tests/oracle"), str(ROOT / "tests")])
    peaks = []
    for times in ("1", "10"):
        line = [sys.executable, "-c", code, times]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)  # MiB
    assert max(peaks) < 200, peaks
    assert peaks[1] < peaks[0] + 60, peaks


def test_who_keeps_the_eos():
    assert Config(**ref.TINY, pooling="eos").keep_eos
    assert not Config(**ref.TINY, pooling="latent").keep_eos
    assert not Config(**ref.TINY, pooling="mean").keep_eos
    assert Config(**ref.TINY, pooling="latent", keep_eos=True).keep_eos


def test_instruction_errors(tokens_of):
    *_, model, oracle = tokens_of
    assert "Instruct:" in error_of(model.tokenize, ["a"], "Instruct: " + TASK)
    filled = len(oracle.encode(ref.prefix_of(TASK), add_special_tokens=False).ids)
    for length in (1, filled - 2):
        message = error_of(model.tokenize, ["a"], TASK, max_length=length)
        assert "max_length" in message
        assert str(length) in message
    (token,) = model.tokenize(["a"], TASK, max_length=filled + 3)
    assert token.not_pooled < len(token.ids)
