"""What `encode` does around the method: its arguments, long texts, chunks, the model's mode."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from data.commands import InputError

CHUNK = 8192, 2**22  # texts, and characters that are read of them, whose tokens are in memory
MARGIN = 64  # tokens: what the end of a text changes is nearer to it


# ---- arguments


def check_texts(texts, instruction):
    """The texts as a list, and the list of their instructions; each is checked to be text.

    texts may be any iterable of str; `instruction` is one str for all texts or one for each.
    """
    texts = list_of_str(texts, "texts")
    if isinstance(instruction, str):
        return texts, list_of_str([instruction], "instruction") * len(texts)
    instructions = list_of_str(instruction, "instruction")
    if len(instructions) != len(texts):
        got = f"got {len(instructions)} for {len(texts)} texts"
        raise InputError(f"instruction: expected a str, or one for each text; {got}")
    return texts, instructions


def list_of_str(values, name):
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name}: expected a list of str, got {type(values).__name__}")
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(f"{name}[{i}]: expected a str, got {value!r}")
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise InputError(f"{name}[{i}]: expected Unicode: {error}") from error
    return values


def check_length(max_length, c):
    """max_length, checked against a Config; None is the config's own."""
    if max_length is None:
        return c.max_seq_length
    check_from_1("max_length", max_length, c.max_position_embeddings, "which the model can read")
    return int(max_length)


def check_dims(dims, c):
    """How many numbers of a vector are used, checked against a Config; None is all of them."""
    if dims is None:
        return c.hidden_size
    check_from_1("dims", dims, c.hidden_size, "the width of a vector")
    return int(dims)


def check_from_1(name, value, most, what):
    """Refuses what is no whole number from 1 to `most`; `what` says what that is."""
    if value not in range(1, most + 1):
        raise InputError(f"{name}: expected from 1 to {most}, {what}, got {value}")


# ---- long texts


def characters_read(count):
    """How much of a text is read first, where `count` of its ids will be used."""
    return 8 * (count + MARGIN)


def encode_beginnings(encode_batch, texts, count):
    """Yields the encoding of each text, of which only the first `count` ids will be used.

    A tokenizer reads a text to its end, however long. So we cut a long one, and read more of it
    where that turns out to be too little. A cut changes tokens near it, in any script and encoding:
    the ids are those of the whole text if MARGIN tokens follow them.
    """
    for part in parts(texts, characters_read(count), (len(texts), 2**19)):
        for text, encoding in zip(texts[part], read(encode_batch, texts[part], count)):
            size = characters_read(count)
            while size < len(text) and len(encoding.ids) < count + MARGIN:
                size *= 4
                (encoding,) = encode_batch([text[:size]], add_special_tokens=False)
            yield encoding


def read(encode_batch, texts, count):
    starts = [text[: characters_read(count)] for text in texts]
    return encode_batch(starts, add_special_tokens=False)


def parts(texts, longest, limits=CHUNK):
    """Splits texts -> slices of at most so many texts, and characters, up to `longest` of each."""
    most_texts, most_characters = limits
    slices, start, characters = [], 0, 0
    for i, text in enumerate(texts):
        size = min(len(text), longest)
        if i > start and (i - start == most_texts or characters + size > most_characters):
            slices.append(slice(start, i))
            start, characters = i, 0
        characters += size
    if texts:
        slices.append(slice(start, len(texts)))
    return slices


def ahead(make, items):
    """Yields make(item) for each item; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        made = deque()
        for item in items:
            made.append(thread.submit(make, item))
            if len(made) == 2:
                yield made.popleft().result()
        if made:
            yield made.pop().result()


# ---- the mode of a model

LOCK = threading.Lock()
HELD = {}  # model: how many threads hold it in eval mode, and its modules' modes before


@contextlib.contextmanager
def eval_mode(model):
    """Holds a model in eval mode; the last of the threads that hold it restores its mode."""
    with LOCK:
        if model not in HELD:
            HELD[model] = [0, {module: module.training for module in model.modules()}]
            model.eval()
        HELD[model][0] += 1
    try:
        yield
    finally:
        with LOCK:
            HELD[model][0] -= 1
            if HELD[model][0] == 0:
                for module, training in HELD.pop(model)[1].items():
                    module.training = training
