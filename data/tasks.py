"""The local suite: held-out sets in data/eval as mteb's own tasks, so that the metrics are mteb's and no
network is needed. A file holds JSON lines, by task type:

    Retrieval       {"query": str, "pos": [str, ...]} and, for every passage of the corpus, {"doc": str}
    Classification  {"text": str, "label": str or int, "split": "train" or "test"}
    Clustering      {"text": str, "label": str or int}
    STS             {"text1": str, "text2": str, "score": float}

A folder in AIR-Bench's layout is a suite too. Texts are perturbed here to see how much a score depends on form.
"""

import hashlib
import random
import re
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from scipy.stats import entropy, spearmanr

from data.prepare import json_lines
from nvembed import expect

FOLDER = Path(__file__).parent / "eval"


def spread(rows, limit):
    """At most `limit` rows (None: all), equally spaced, so that a sorted set keeps its labels."""
    return rows[:: -(-len(rows) // limit)] if limit and rows else rows


class Local:
    """A task from one file; a task's class says its `path` and `limit` (at most so many test items).

    For a bootstrap, `resampled_score(mteb's scores, mteb's predictions)` gives the main score as a function
    of the indices of drawn items and of drawn experiments, and the number of each.
    """

    def load_data(self, **kwargs):
        self.dataset, self.data_loaded = self.fill([row for _, row in json_lines(self.path)]), True


class Retrieval(Local, AbsTaskRetrieval):
    main_score, measure = "ndcg_at_10", "ndcg_cut_10"
    k_values = (1, 3, 5, 10, 20, 100)

    def fill(self, rows):
        queries = spread([row for row in rows if "query" in row], self.limit)
        found = {text for row in queries for text in row["pos"]}
        others = [row["doc"] for row in rows if "doc" in row and row["doc"] not in found]
        corpus = sorted(found) + spread(others, self.limit and 2 * self.limit)
        ids = {text: f"d{i}" for i, text in enumerate(corpus)}
        queries = [row | {"id": f"q{i}"} for i, row in enumerate(queries)]
        data = {"queries": Dataset.from_list([{"id": q["id"], "text": q["query"]} for q in queries])}
        data["corpus"] = Dataset.from_list([{"id": i, "title": "", "text": text} for text, i in ids.items()])
        data["relevant_docs"] = {q["id"]: {ids[text]: 1 for text in q["pos"]} for q in queries}
        return {"default": {"test": data | {"top_ranked": None}}}

    def task_specific_scores(self, scores, *args, **kwargs):
        return {f"{self.main_score}_by_query": [scores[query][self.measure] for query in sorted(scores)]}

    def resampled_score(self, scores, predicted):
        found = np.array(scores[f"{self.main_score}_by_query"])
        return lambda items, _: found[items].mean(), len(found), 1


class Air(Retrieval):
    """A QA task of AIR-Bench as its data sets are laid out: `path` is SPLIT_qrels.jsonl with {"qid": str, "docid":
    str, "relevance": int}; beside it stand SPLIT_queries.jsonl and corpus.jsonl with {"id": str, "text": str}."""

    def load_data(self, **kwargs):
        queries, corpus = (
            {row["id"]: row["text"] for _, row in json_lines(self.path.with_name(name), id=str, text=str)}
            for name in (self.path.name.replace("qrels", "queries"), "corpus.jsonl")
        )
        found = {}
        for where, row in json_lines(self.path, qid=str, docid=str, relevance=int):
            known = row["qid"] in queries and row["docid"] in corpus
            expect(known, f"{where}: expected a query and a document of the files beside it, got {row}")
            if row["relevance"] > 0:
                found.setdefault(row["qid"], []).append(corpus[row["docid"]])
        rows = [{"query": queries[query], "pos": texts} for query, texts in found.items()]
        self.dataset, self.data_loaded = self.fill(rows + [{"doc": text} for text in corpus.values()]), True


class AirLongDoc(Air):
    main_score, measure = "recall_at_10", "recall_10"


class Classification(Local, AbsTaskClassification):
    main_score = "accuracy"

    def fill(self, rows):
        labels = sorted({row["label"] for row in rows})
        rows = [row | {"label": labels.index(row["label"])} for row in rows]
        split = {name: [row for row in rows if row["split"] == name] for name in ("train", "test")}
        split["test"] = spread(split["test"], self.limit)
        return DatasetDict({name: Dataset.from_list(rows) for name, rows in split.items()})

    def resampled_score(self, scores, predicted):
        right = np.array(predicted) == self.dataset["test"]["label"]  # (experiments, items)
        return lambda items, runs: right[runs][:, items].mean(), right.shape[1], len(right)


class Clustering(Local, AbsTaskClustering):
    main_score = "v_measure"
    input_column_name, label_column_name = "text", "label"
    max_fraction_of_documents_to_embed = None  # all
    n_clusters = 100  # what mteb calls its experiments: resample with replacement, k-means, V-measure

    def fill(self, rows):
        data = Dataset.from_list(spread(rows, self.limit))
        self.max_documents_per_cluster = len(data)  # so that an experiment is one bootstrap resample
        return DatasetDict(test=data)

    def resampled_score(self, scores, predicted):
        clusters, rng = np.array(predicted["Level 0"]), random.Random(self.seed)
        runs, n = clusters.shape
        drawn = np.array([rng.choices(range(n), k=n) for _ in range(runs)])  # what mteb clustered
        labels = np.unique(self.dataset["test"]["label"], return_inverse=True)[1][drawn]
        k = max(clusters.max(), labels.max()) + 1
        cells = (np.arange(runs)[:, None] * k + labels) * k + clusters

        def v_measure(items, chosen):
            weights = np.bincount(items, minlength=n)[drawn]
            counts = np.bincount(cells.ravel(), weights.ravel(), runs * k * k).reshape(runs, k, k)[chosen]
            alone = entropy(counts.sum(axis=2), axis=1) + entropy(counts.sum(axis=1), axis=1)
            mutual = alone - entropy(counts.reshape(runs, -1), axis=1)
            return np.mean(np.where(alone > 0, 2 * mutual / np.maximum(alone, 1e-9), 1.0))

        return v_measure, n, runs


class STS(Local, AbsTaskSTS):
    main_score = "cosine_spearman"
    column_names = ("text1", "text2")

    def fill(self, rows):
        return DatasetDict(test=Dataset.from_list(spread(rows, self.limit)))

    def resampled_score(self, scores, predicted):
        pairs = np.array([predicted["cosine_scores"], self.dataset["test"]["score"]])
        return lambda items, _: spearmanr(*pairs[:, items]).statistic, pairs.shape[1], 1


def typos(text):
    """Of a quarter of the words of four letters or more the second and third are swapped, always of the same ones."""
    rng, word = random.Random(text), r"\b(\w)(\w)(\w)(?=\w)"
    return re.sub(word, lambda m: m[1] + m[3] + m[2] if rng.random() < 0.25 else m[0], text)


PERTURBED = {"typos": typos, "case": str.upper, "truncate": lambda text: text[: len(text) // 2]}

TASKS = [  # name, type, file in data/eval, instruction (that of the training set of the same kind)
    ("SQuAD", Retrieval, "squad", "Given a question, retrieve passages that answer the question"),
    ("Wikipedia", Retrieval, "wikipedia", "Given a title, retrieve the encyclopedia article it names"),
    ("Debian", Retrieval, "debian", "Given a short description, retrieve the software package it describes"),
    ("TREC", Classification, "trec", "Given a question, classify the type of answer it asks for"),
    ("SMSSpam", Classification, "spam", "Classify the given text message as spam or not spam"),
    ("Sentiment", Classification, "sentiment", "Classify the sentiment of the given text"),
    ("WikipediaTopics", Clustering, "topics", "Identify the topic of the given encyclopedia article"),
    ("WordSim353", STS, "sts", "Retrieve semantically similar text"),
]


def local_tasks(folder=FOLDER, limit=None):
    """TASKS whose file exists -> list of mteb tasks. A changed file is another revision of the data."""
    paths = [Path(folder) / f"{file}.jsonl.gz" for _, _, file, _ in TASKS]
    return [make_task(*task, path, limit) for task, path in zip(TASKS, paths) if path.exists()]


def folder_tasks(folder):
    """Every SPLIT_qrels.jsonl under a folder -> list of mteb tasks, named by their place there."""
    paths = sorted(Path(folder).rglob("*qrels.jsonl"))
    expect(paths, f"{folder}: expected SPLIT_qrels.jsonl, SPLIT_queries.jsonl and corpus.jsonl in it")
    names = [re.sub(r"\W+", "-", str(path.relative_to(folder).with_suffix(""))) for path in paths]
    kinds = [AirLongDoc if "long-doc" in str(path) else Air for path in paths]
    return [make_task(*task, TASKS[0][-1], path, None) for *task, path in zip(names, kinds, names, paths)]


def make_task(name, kind, file, instruction, path, limit):
    revision = hashlib.sha256(path.read_bytes()).hexdigest()[:12] + (f"-{limit}" if limit else "")
    metadata = TaskMetadata(
        name=name,
        type="Retrieval" if issubclass(kind, Retrieval) else kind.__name__,
        description=f"data/eval/{path.name}, see data/README.md",
        prompt={"query": instruction} if issubclass(kind, Retrieval) else instruction,
        dataset={"path": file, "revision": revision},
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
    )
    return type(name, (kind,), {"metadata": metadata, "path": path, "limit": limit})()
