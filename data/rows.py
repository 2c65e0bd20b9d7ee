"""Rows: what is trained on and mined. Checked once, then read from their file when asked for.

A row is one JSON object a line of a .jsonl or .jsonl.gz file:

    {"query": str, "pos": [str, ...], "neg": [str, ...], "prompt": str}

with optional "pos_scores" and "neg_scores", of which mining writes one for each text. No torch
here.
"""

import hashlib
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from data.commands import InputError
from data.files import bare, cache, open_lines, parse_object, reading, renamed, sha256

FIELDS = ("query", "pos", "neg", "prompt", "pos_scores", "neg_scores")
# What other tools write beside them: ids, FlagEmbedding's type of a row, where it comes from.
HARMLESS = ("id", "_id", "query_id", "pos_id", "neg_id", "type", "task", "label", "language")
HARMLESS += ("source", "dataset", "split", "metadata", "overlap")


# ---- one row


def check_row(row, where):
    """Checks one row, gives it an empty "neg" if it has none -> the row.

    A field that is null counts as missing: tables write one so.
    """
    for field in [field for field in row if row[field] is None]:
        del row[field]
    for field in row:
        if field not in FIELDS + HARMLESS:
            raise InputError(f"{where}: unknown field '{field}': expected one of {list(FIELDS)}")
    row.setdefault("neg", [])
    if not is_text(row.get("query")):
        raise InputError(f"{where}: field 'query': expected a non-empty string")
    for field in ("pos", "neg"):
        check_texts(row, field, where)
    if not row["pos"]:
        raise InputError(f"{where}: field 'pos': expected at least one positive")
    check_prompt(row.get("prompt", ""), where)
    for field, texts in (("query", [row["query"]]), ("pos", row["pos"]), ("neg", row["neg"])):
        if not all(is_unicode(text) for text in texts):
            raise InputError(f"{where}: field '{field}': half of a surrogate pair is no text")
    return row


def check_texts(row, field, where):
    """Checks the texts of "pos" or "neg" and their scores; a text is a list of one."""
    if isinstance(row.get(field), str):
        row[field] = [row[field]]
    texts = row.get(field)
    if not isinstance(texts, list) or not all(is_text(text) for text in texts):
        raise InputError(f"{where}: field '{field}': expected a list of non-empty strings")
    scores = row.get(f"{field}_scores", [])
    numbers = isinstance(scores, list) and all(is_score(score) for score in scores)
    if not numbers or len(scores) not in (0, len(texts)):
        raise InputError(f"{where}: field '{field}_scores': expected {len(texts)} numbers")


def check_prompt(prompt, where, field="prompt"):
    """Checks a row's instruction, or a data set's."""
    if not isinstance(prompt, str) or not is_unicode(prompt):
        raise InputError(f"{where}: field '{field}': expected a string")
    if prompt.startswith("Instruct:"):
        message = "expected the bare task: 'Instruct: ' is added to it"
        raise InputError(f"{where}: field '{field}': {message}")


def is_text(value):
    """A string of more than white space."""
    return isinstance(value, str) and value.strip() != ""


def is_score(value):
    """A number that fp32 holds, so neither NaN nor infinite."""
    return type(value) in (int, float) and abs(value) < 1e38


def is_unicode(text):
    """Whether UTF-8 can hold the text: JSON can escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def canonical(text):
    """Texts that differ only in case or white space are one document, or one query."""
    return " ".join(text.split()).casefold()


def text_id(text):
    """A 64-bit hash of the canonical text: equal for texts that count as one."""
    return hash64(canonical(text).encode())


def hash64(content):
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class KnownPositives:
    """Query -> text_ids of what is never its negative: itself and all positives that rows give it.

    Memory: 16 bytes a pair of a query and a positive.
    """

    def __init__(self, parts):
        """`parts` are sequences of rows."""
        queries, texts = array("q"), array("q")
        for rows in parts:
            for row in rows:
                queries.extend([text_id(row["query"])] * len(row["pos"]))
                texts.extend(text_id(text) for text in row["pos"])
        queries, texts = np.frombuffer(queries, np.int64), np.frombuffer(texts, np.int64)
        order = queries.argsort(kind="stable")
        self.queries = queries[order]
        self.texts = texts[order]

    def __getitem__(self, query):
        key = text_id(query)
        first = np.searchsorted(self.queries, key, side="left")
        last = np.searchsorted(self.queries, key, side="right")
        return {key, *self.texts[first:last].tolist()}


# ---- the rows of a file


def read_rows(path, check=check_row, shown=None):
    """Checks every row of a .jsonl or .jsonl.gz file -> Rows. Memory: 24 bytes a row.

    `check` makes a row of a line's object and its place, or raises InputError. `shown` is what
    messages call the file, if not by its path.
    """
    file = RowFile(path, check, shown or path)
    return Rows(file, np.arange(len(file.hashes)))


class Rows(Sequence):
    """Rows of a file by their numbers, as a sequence of dict; each is read when it is asked for.

    Threads and forked processes may share one. A slice is Rows too.
    """

    def __init__(self, file, numbers):
        self.file = file
        self.numbers = numbers  # (number of rows,) int64, their places in the file

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self.file, self.numbers[i])
        return self.file.read(self.numbers[i])

    def select(self, numbers):
        """The rows with some of these rows' numbers, in their order -> Rows."""
        return Rows(self.file, self.numbers[np.asarray(numbers, np.int64)])

    def where(self, i):
        """The place of a row: "FILE:LINE"."""
        return self.file.where(self.numbers[i])

    @property
    def longest_prompt(self):
        """Bytes of the longest "prompt" of any row of the file."""
        return self.file.longest_prompt

    @property
    def digest(self):
        """Hash of all rows of the file, gzipped or not."""
        return self.file.digest


class RowFile:
    """A file of rows, checked whole and open: where each row begins, and a hash of each."""

    def __init__(self, path, check, shown):
        self.path = shown  # in messages
        self.check = check
        self.longest_prompt = 0  # in bytes
        starts, hashes, content = array("q"), array("q"), hashlib.sha256()
        with reading(path):
            file = plain_file(path)
        with reading(path), file:
            # its own descriptor, which is open as long as the rows are in use
            self.descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self.descriptor)
            place = 0
            for number, line in enumerate(progress(file, shown), 1):
                start, place = place, place + len(line)
                line = bare(line)
                if line:
                    where = f"{shown}:{number}"
                    row = check(parse_object(line, where), where)
                    prompt = len(row.get("prompt", "").encode())
                    self.longest_prompt = max(self.longest_prompt, prompt)
                    starts.append(start)
                    hashes.append(hash64(line))
                    content.update(line + b"\n")
        if not hashes:
            raise InputError(f"{shown}: expected at least one row")
        starts.append(place)
        self.starts = np.array(starts)
        self.hashes = np.array(hashes)
        self.digest = content.hexdigest()[:32]

    def read(self, number):
        """A row by its number in the file -> dict."""
        start, end = self.starts[number : number + 2].tolist()
        line = bare(os.pread(self.descriptor, end - start, start))
        if hash64(line) != self.hashes[number]:
            raise InputError(f"{self.path}: changed while it was in use")
        return self.check(parse_object(line, self.path), self.path)

    def where(self, number):
        """The place of a row, "FILE:LINE", by counting the lines before it."""
        lines, place, start = 1, 0, int(self.starts[number])
        while place < start:
            block = os.pread(self.descriptor, min(2**20, start - place), place)
            if not block:
                raise InputError(f"{self.path}: changed while it was in use")
            lines += block.count(b"\n")
            place += len(block)
        return f"{self.path}:{lines}"


def plain_file(path):
    """A file of lines, open; of a .gz its content, unpacked once into the cache."""
    if not str(path).endswith(".gz"):
        return open(path, "rb")
    name = sha256(path)[:32]
    unpacked = cache() / "rows" / f"{name}.jsonl"
    try:
        if not unpacked.exists():
            with renamed(unpacked) as temporary, open(temporary, "wb") as file:
                unpack(path, file)
        return open(unpacked, "rb")
    except OSError:  # a cache that is full or read-only; or no gzip: then this fails again
        file = tempfile.TemporaryFile()
        unpack(path, file)
        file.seek(0)
        return file


def unpack(path, file):
    with open_lines(path) as source:
        shutil.copyfileobj(source, file, 2**20)


def progress(lines, path):
    """Shows the number of lines read where that takes long."""
    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(lines, str(path), unit=" rows", mininterval=2, delay=2, disable=quiet)
