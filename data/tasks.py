"""The local suite: held-out sets in data/eval as mteb's own tasks, so that the metrics are mteb's and no
network is needed. A file holds JSON lines, by task type:

    Retrieval       {"query": str, "pos": [str, ...]} and, for every passage of the corpus, {"doc": str}
    Classification  {"text": str, "label": str or int, "split": "train" or "test"}
    Clustering      {"text": str, "label": str or int}
    STS             {"text1": str, "text2": str, "score": float}
"""

import gzip
import hashlib
import json
import random
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from scipy.stats import entropy, spearmanr

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
        with gzip.open(self.path, "rt", encoding="utf-8") as lines:
            self.dataset = self.fill([json.loads(line) for line in lines])
        self.data_loaded = True


class Retrieval(Local, AbsTaskRetrieval):
    main_score = "ndcg_at_10"
    k_values = (1, 3, 5, 10, 20, 100)

    def fill(self, rows):
        queries = spread([row for row in rows if "query" in row], self.limit)
        found = {text for row in queries for text in row["pos"]}
        others = [row["doc"] for row in rows if "doc" in row and row["doc"] not in found]
        corpus = sorted(found) + spread(others, self.limit and 10 * self.limit)
        ids = {text: f"d{i}" for i, text in enumerate(corpus)}
        queries = [row | {"id": f"q{i}"} for i, row in enumerate(queries)]
        data = {"queries": Dataset.from_list([{"id": q["id"], "text": q["query"]} for q in queries])}
        data["corpus"] = Dataset.from_list([{"id": i, "title": "", "text": text} for text, i in ids.items()])
        data["relevant_docs"] = {q["id"]: {ids[text]: 1 for text in q["pos"]} for q in queries}
        return {"default": {"test": data | {"top_ranked": None}}}

    def task_specific_scores(self, scores, *args, **kwargs):
        return {"ndcg_at_10_by_query": [scores[query]["ndcg_cut_10"] for query in sorted(scores)]}

    def resampled_score(self, scores, predicted):
        ndcg = np.array(scores["ndcg_at_10_by_query"])
        return lambda items, _: ndcg[items].mean(), len(ndcg), 1


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


TASKS = [  # name, type, file in data/eval, instruction (that of the training set of the same kind)
    ("SQuAD", Retrieval, "squad", "Given a question, retrieve passages that answer the question"),
    ("Wikipedia", Retrieval, "wikipedia", "Given a title, retrieve the encyclopedia article it names"),
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


def make_task(name, kind, file, instruction, path, limit):
    metadata = TaskMetadata(
        name=name,
        type=kind.__name__,
        description=f"data/eval/{path.name}, see data/README.md",
        prompt={"query": instruction} if kind is Retrieval else instruction,
        dataset={"path": file, "revision": hashlib.sha256(path.read_bytes()).hexdigest()[:12]},
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
    )
    return type(name, (kind,), {"metadata": metadata, "path": path, "limit": limit})()
