"""What mining searches and what it finds, by numbers: texts stay in their files.

No torch here. Beside the vectors, memory holds about 40 bytes a document and 100 a row.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from data.commands import InputError
from data.rows import check_row, is_text, is_unicode, read_rows, text_id


def check_document(line, where):
    """A line of a corpus, {"text": str} or BEIR's {"_id", "title", "text"} or a row -> a row.

    A title stands before its text, with a space, as BEIR joins them.
    """
    if "text" not in line:
        if "query" not in line:
            raise InputError(f"{where}: expected a field 'text', or a row's 'query' and 'pos'")
        return check_row(line, where)
    parts = {field: line.get(field) or "" for field in ("title", "text")}
    for field, value in parts.items():
        if not isinstance(value, str) or not is_unicode(value):
            raise InputError(f"{where}: field '{field}': expected a string")
    document = parts["text"]
    if parts["title"]:
        document = f"{parts['title']} {document}".strip()
    if not is_text(document):
        raise InputError(f"{where}: field 'text': expected a non-empty string")
    return {"query": "-", "pos": [document], "neg": []}


class Corpus(Sequence):
    """The distinct documents of files and of rows, as a sequence of str; a slice is a list.

    Those of files come first. Of documents that differ only in case or white space the first is
    kept. Rows are dict or Rows; each document is read when it is asked for.
    """

    def __init__(self, rows, paths=()):
        self.sources = [read_rows(path, check_document) for path in paths] + [rows]
        self.first_rows = np.cumsum([0, *(len(source) for source in self.sources)])
        firsts = array("q")  # number of each row's first text
        self.keys, self.text_of_key = distinct(self.all_text_ids(firsts))  # (documents,)
        self.texts = np.sort(self.text_of_key)  # the same texts in the order of the files
        self.first_texts = np.frombuffer(firsts, np.int64)

    def all_text_ids(self, firsts):
        """text_ids of all texts, equal ones too; `firsts` collects where those of a row begin."""
        text_ids = array("q")
        for source in self.sources:
            for row in source:
                firsts.append(len(text_ids))
                text_ids.extend(text_id(text) for text in row["pos"] + row["neg"])
        return text_ids

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.read(self.texts[i])
        return self.read(self.texts[[i]])[0]

    def read(self, texts):
        """Texts by their numbers among all texts, equal ones included -> list of str."""
        rows = np.searchsorted(self.first_texts, texts, side="right") - 1
        found, last, documents = [], None, []
        for text, row in zip(texts.tolist(), rows.tolist(), strict=True):
            if row != last:  # texts of one row are mostly asked for together
                last, documents = row, self.texts_of_row(row)
            found.append(documents[text - int(self.first_texts[row])])
        return found

    def texts_of_row(self, number):
        source = int(np.searchsorted(self.first_rows, number, side="right")) - 1
        row = self.sources[source][number - int(self.first_rows[source])]
        return row["pos"] + row["neg"]

    def numbers(self, text_ids):
        """Documents' numbers by text_ids, of those that are in the corpus -> (n,) int64."""
        text_ids = np.array(list(text_ids), np.int64)
        places = np.searchsorted(self.keys, text_ids)
        found = self.keys.take(places, mode="clip") == text_ids
        return np.searchsorted(self.texts, self.text_of_key[places[found]])


def distinct(values):
    """Distinct values of an array("q"), ascending, and where each of them is first.

    Memory: at most 26 bytes a value, on the way, if the caller keeps none.
    """
    order = np.argsort(values, kind="stable").astype(np.uint32)
    ordered = np.frombuffer(values, np.int64)[order]
    del values
    new = np.append(True, ordered[1:] != ordered[:-1])
    return ordered[new], order[new]


def documents_and_tasks(corpus, task, part):
    """The documents of a slice, each with the task to embed it with."""
    texts = corpus[part]
    return texts, [task] * len(texts)


def queries_and_tasks(rows, task, part):
    """The queries of a slice of rows, and their own tasks or the data set's."""
    found = list(rows[part])
    return [row["query"] for row in found], [row.get("prompt", task) for row in found]


def positives_of(group, rows, corpus, known_positives):
    """Documents' numbers, for each row of a group -> (its positives, all that are no negatives)."""
    own, known = [], []
    for i in group:
        row = rows[i]
        own.append(corpus.numbers(text_id(text) for text in row["pos"]))
        known.append(corpus.numbers(known_positives[row["query"]]))
    return own, known


class Mined:
    """The negatives chosen for rows, as numbers of documents, and the last teacher's scores."""

    def __init__(self, rows, most):
        """Room for `most` negatives of each of so many rows."""
        self.ids = np.full((rows, most), -1, np.int32)  # -1: none
        self.scores = np.zeros((rows, most), np.float32)  # of the negatives
        self.positive_scores = []  # arrays, of all rows' positives one after the other

    def add(self, row, ids):
        """Chooses documents (n,) for a row, after those it has."""
        start = self.count(row)
        self.ids[row, start : start + len(ids)] = ids

    def count(self, row):
        return int((self.ids[row] >= 0).sum())

    def count_short(self):
        """How many rows have fewer negatives than there is room for."""
        return int((self.ids[:, -1] < 0).sum())

    def rows(self, rows, corpus):
        """Yields each row with its "neg", "neg_scores" and "pos_scores"."""
        positive_scores = np.concatenate(self.positive_scores)
        place = 0
        for i, row in enumerate(rows):
            count = self.count(i)
            start, place = place, place + len(row["pos"])
            yield row | {
                "neg": [corpus[number] for number in self.ids[i, :count]],
                "neg_scores": self.scores[i, :count].round(4).tolist(),
                "pos_scores": positive_scores[start:place].round(4).tolist(),
            }
