"""Leakage: how near a training text is to those of the evaluation, and dropping what is too near.

Two measures, from 0 to 1: "bm25" compares the words of two texts, "runs" their runs of 5 words.
"""

import re
from pathlib import Path

import numpy as np

from data.commands import InputError
from data.files import as_list, beside, check_outputs, json_lines, write_rows
from data.rows import HARMLESS


def words(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def runs(text, n):
    """The different runs of n words of a text; a shorter text is one run."""
    found = words(text)
    starts = range(max(1, len(found) - n + 1))
    return {" ".join(found[start : start + n]) for start in starts}


def bm25_overlap(texts, against, k1=1.2, b=0.75):
    """For each text the highest BM25 score of any of `against`, in 0..1 -> (number of texts,).

    The score is a share of what the two score for themselves, of whichever is more: 1 if they
    have the same words, little if one only contains the other.
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    n = len(texts)
    counts = CountVectorizer(analyzer=words).fit_transform(texts + against)
    tf = csr_array(counts, dtype=np.float64)  # term frequencies (texts and against, words)
    df = np.bincount(tf[n:].indices, minlength=tf.shape[1])  # document frequencies (words,)
    idf = np.log(1 + (len(against) - df + 0.5) / (df + 0.5))
    length = tf.sum(axis=1)
    saturation = k1 * (1 - b + b * length / length[n:].mean())  # of each text
    saturation = np.repeat(saturation, np.diff(tf.indptr))  # of each entry of tf
    weight = tf.copy()
    weight.data = tf.data * (k1 + 1) / (tf.data + saturation) * idf[tf.indices]

    own = weight.sum(axis=1)  # the score of a text for itself
    queries = tf[:n] > 0
    documents = weight[n:].T
    best = np.zeros(n)
    for start in range(0, n, 256):
        score = (queries[start : start + 256] @ documents).tocoo()
        row = start + score.row
        share = score.data / np.maximum(own[row], own[n + score.col])
        np.maximum.at(best, row, share)
    return best


def run_overlap(texts, against, n=5):
    """For each text the share of its runs of n words found in `against` -> (number of texts,)."""
    known = set()  # hashes: the runs themselves may not fit in memory
    for text in against:
        known.update(hash(run) for run in runs(text, n))
    shares = []
    for text in texts:
        own = runs(text, n)
        shared = sum(hash(run) in known for run in own)
        shares.append(shared / len(own))
    return np.array(shares)


OVERLAPS = {"bm25": bm25_overlap, "runs": run_overlap}
NOT_COMPARED = (*HARMLESS, "prompt")  # fields of a row


def strings(row):
    """Every text of an item or of a row of any kind."""
    texts = []
    for name, value in row.items():
        if name not in NOT_COMPARED:
            texts += as_list(value)
    return [text for text in texts if isinstance(text, str) and words(text)]


def drop_leaks(items, against, by, threshold):
    """Items -> (kept, dropped with their "overlap", which is at least the threshold).

    An item's overlap is the highest of its texts. `by` is "bm25" or "runs".
    """
    texts = set()
    for item in items:
        texts.update(strings(item))
    texts = sorted(texts)
    against = sorted({text for text in against if words(text)})
    if not texts or not against:
        raise InputError("leakage: expected texts on both sides")
    shares = OVERLAPS[by](texts, against).round(4).tolist()
    overlap = dict(zip(texts, shares, strict=True))

    kept = []
    dropped = []
    for item in items:
        highest = max((overlap[text] for text in strings(item)), default=0)
        if highest < threshold:
            kept.append(item)
        else:
            dropped.append(item | {"overlap": highest})
    return kept, dropped


def check_files(rows, against, by, threshold, out):
    """Drops the rows of one file that are too near to any text of another -> counts.

    The rows kept go to the file `out`, if one is given, those dropped beside it.
    """
    if out:
        outputs = [Path(out), beside(out, "dropped.jsonl")]
        check_outputs(outputs, [rows, against])
        for file in outputs:
            if file.exists():
                raise InputError(f"{file}: is there already; use another --out")
    items = [row for _, row in json_lines(rows)]
    texts = []
    for _, row in json_lines(against):
        texts += strings(row)
    kept, dropped = drop_leaks(items, texts, by, threshold)
    if out:
        write_rows(out, kept)
        write_rows(beside(out, "dropped.jsonl"), dropped)
    return {"rows": len(items), "kept": len(kept), "dropped": len(dropped)}
