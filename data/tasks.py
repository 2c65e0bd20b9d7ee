"""What is evaluated on: mteb's benchmarks and the local suite, and the instruction of every task.

The local suite is the held-out sets of data/eval as tasks of mteb: the metrics are mteb's own, and
no network is needed. A file holds JSON lines, by type of task:

    Retrieval       {"query": str, "pos": [str, ...]}, and {"doc": str} for each passage to search
    Classification  {"text": str, "label": str or int, "split": "train" or "test"}
    Clustering      {"text": str, "label": str or int}
    STS             {"text1": str, "text2": str, "score": float}

A folder in AIR-Bench's layout is a suite too. The perturbations at the end show how much a score
depends on the form of the texts.
"""

import copy
import hashlib
import math
import random
import re
from pathlib import Path
from typing import get_args

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata, TaskType
from scipy.stats import entropy, spearmanr

from data.commands import InputError, one_line
from data.files import ROOT, json_lines, read_json

FOLDER = ROOT / "data/eval"
INSTRUCTIONS = read_json(ROOT / "data/instructions.json")  # the paper's
RESAMPLES = 1000  # of the bootstrap


def find_tasks(suite, wanted, limit=None):
    """The tasks of a suite that `wanted` means: "all", a type or a name, in any case.

    A suite is "local", a folder in AIR-Bench's layout or one of mteb's benchmarks. All of mteb's
    types are known; that a suite has no task of one of them is no error.
    """
    if limit and suite != "local":
        raise InputError("--limit: expected the local suite, not a benchmark of fixed sets")
    if suite == "local":
        tasks = local_tasks(limit=limit)
    elif Path(suite).is_dir():
        tasks = folder_tasks(suite)
    else:
        try:
            tasks = mteb.get_benchmark(suite).tasks
        except KeyError as error:
            raise InputError(f"--suite {suite}: {one_line(error)}") from error

    wanted = wanted.lower()
    known = ["all", *get_args(TaskType), *[task.metadata.name for task in tasks]]
    if wanted not in [name.lower() for name in known]:
        raise InputError(f"--task {wanted}: expected one of {', '.join(known)}")
    chosen = []
    for task in tasks:
        if wanted in ("all", task.metadata.type.lower(), task.metadata.name.lower()):
            chosen.append(task)
    if not chosen:
        hint = "see --suite, for instance 'MTEB(eng, v1)'"
        print(f"{wanted}: no set of it in the {suite} suite; {hint}")
    return chosen


def instruction(metadata, prompt_type=None):
    """The instruction on one side of an mteb task: the authors' evaluation string, else mteb's.

    Documents of retrieval and reranking have none, except Quora's. Every other type is symmetric:
    both sides carry the instruction.
    """
    name = re.sub(r"(Retrieval|HardNegatives|Decontaminated|\.v\d)+$", "", metadata.name)
    name = re.sub(r"^CQADupstack\w+$", "CQADupstack", name)  # its parts share one
    asymmetric = "Retrieval" in metadata.type or "Reranking" in metadata.type
    if prompt_type == "document" and asymmetric:
        if name not in INSTRUCTIONS["documents_instructed"]:
            return ""
    if name in INSTRUCTIONS["tasks"]:
        return INSTRUCTIONS["tasks"][name]
    if metadata.type in INSTRUCTIONS["types"]:
        return INSTRUCTIONS["types"][metadata.type]
    if isinstance(metadata.prompt, dict):
        return metadata.prompt["query"]
    return metadata.prompt or ""


# ---- scores


def score_task(task, model, cache, overwrite=False):
    """Runs a task unless its result is in the cache -> scores (1 + RESAMPLES,).

    The main score x 100 and its bootstrap. nan where there is none: BM25 has scores of retrieval
    only, and only local tasks have a bootstrap.
    """
    scores = np.full(1 + RESAMPLES, np.nan)
    if not isinstance(model, mteb.EncoderProtocol) and task.metadata.type != "Retrieval":
        return scores
    task = copy.deepcopy(task)  # every model starts from the task's first random state
    meta = model.mteb_model_meta
    settings = {"cache": cache, "co2_tracker": False, "show_progress_bar": False}
    path = cache.get_task_result_path(task.metadata.name, meta)
    remove_half_written(path)
    old = cache.load_task_result(task.metadata.name, meta)
    # mteb itself would serve a result of other data
    stale = old is not None and old.dataset_revision != task.metadata.revision
    if isinstance(task, Local):
        settings["prediction_folder"] = path.parent / "predictions"
        saved = settings["prediction_folder"] / task.prediction_file_name
        remove_half_written(saved)
        stale = stale or not saved.exists()
    if overwrite or stale:
        settings["overwrite_strategy"] = "always"

    result = mteb.evaluate(model, task, **settings).task_results[0]
    # in a stored result of another suite there may be other languages too
    scores[0] = 100 * result.validate_and_filter_scores(task).get_score()
    if isinstance(task, Local):
        predictions = read_json(saved)["default"]["test"]
        scores[1:] = scores[0] + 100 * bootstrap(task, result.scores["test"][0], predictions)
    return scores


def remove_half_written(path):
    """Removes a file of mteb's that a kill or a full disk has cut: mteb cannot go on from it."""
    try:
        if path.exists():
            read_json(path)
    except InputError:
        path.unlink()


def bootstrap(task, scores, predictions):
    """Deviations (RESAMPLES,) of a local task's main score when its data are drawn again.

    scores and predictions are what mteb saved of a run. Drawn are the test items and the
    experiments that mteb averages (training sets, k-means): the same ones for every model, so that
    differences are paired. The deviations are from their own mean, since repeated items raise a
    V-measure.
    """
    task.load_data()
    observations, items, experiments = task.observations(scores, predictions)
    rng = np.random.default_rng([*task.metadata.name.encode()])  # other draws for each task
    resampled = []
    for _ in range(RESAMPLES):
        drawn_items = rng.integers(items, size=items)
        drawn_experiments = rng.integers(experiments, size=experiments)
        resampled.append(task.score_of(observations, drawn_items, drawn_experiments))
    return np.array(resampled) - np.mean(resampled)


# ---- local tasks, by type


def spread(rows, limit):
    """At most `limit` rows, equally spaced: a sorted set keeps all its labels. None: all rows."""
    if not limit or not rows:
        return rows
    return rows[:: math.ceil(len(rows) / limit)]


class Local:
    """A task read from one file: `path`, and `limit`, the most test items (None: all).

    For `bootstrap`, each type of task has

    observations(scores, predictions): from what mteb saved of a run, all that its main score is
    computed from -> (observations, number of test items, number of experiments that mteb averages)

    score_of(observations, items, experiments): the main score, between 0 and 1, of test items and
    experiments drawn by index
    """

    @staticmethod
    def files(path):
        """The files that the task is read from."""
        return [path]

    def load_data(self, **kwargs):
        rows = [row for _, row in json_lines(self.path)]
        self.dataset = self.to_dataset(rows)
        self.data_loaded = True

    def score_of(self, observations, items, experiments):
        """The mean of observations (experiments, items)."""
        return observations[experiments][:, items].mean()


class Retrieval(Local, AbsTaskRetrieval):
    main_score = "ndcg_at_10"
    measure = "ndcg_cut_10"  # the same in pytrec_eval's words
    k_values = (1, 3, 5, 10, 20, 100)

    def to_dataset(self, rows):
        queries = spread([row for row in rows if "query" in row], self.limit)
        relevant = {text for row in queries for text in row["pos"]}
        others = [row["doc"] for row in rows if "doc" in row and row["doc"] not in relevant]
        if self.limit:
            others = spread(others, 2 * self.limit)
        ids = {text: f"d{i}" for i, text in enumerate(sorted(relevant) + others)}

        query_rows = []
        relevant_docs = {}
        for i, row in enumerate(queries):
            query_rows.append({"id": f"q{i}", "text": row["query"]})
            relevant_docs[f"q{i}"] = {ids[text]: 1 for text in row["pos"]}
        documents = [{"id": ids[text], "title": "", "text": text} for text in ids]
        split = {
            "queries": Dataset.from_list(query_rows),
            "corpus": Dataset.from_list(documents),
            "relevant_docs": relevant_docs,
            "top_ranked": None,
        }
        return {"default": {"test": split}}

    def task_specific_scores(self, scores, *args, **kwargs):
        """Adds each query's score to mteb's result file."""
        by_query = [scores[query][self.measure] for query in sorted(scores)]
        return {f"{self.main_score}_by_query": by_query}

    def observations(self, scores, predictions):
        by_query = np.array([scores[f"{self.main_score}_by_query"]])  # (1, queries)
        return by_query, by_query.shape[1], 1


class Air(Retrieval):
    """A QA task in AIR-Bench's layout.

    `path` is SPLIT_qrels.jsonl with {"qid": str, "docid": str, "relevance": int}; beside it stand
    SPLIT_queries.jsonl and corpus.jsonl with {"id": str, "text": str}.
    """

    @staticmethod
    def files(path):
        queries = path.with_name(path.name.replace("qrels", "queries"))
        files = [path, queries, path.with_name("corpus.jsonl")]
        for file in files:
            if not file.is_file():
                raise InputError(f"{path}: expected {file.name} beside it")
        return files

    def load_data(self, **kwargs):
        _, queries, corpus = self.files(self.path)
        queries, corpus = self.texts_by_id(queries), self.texts_by_id(corpus)
        positives = {}
        for where, row in json_lines(self.path, qid=str, docid=str, relevance=int):
            if row["qid"] not in queries or row["docid"] not in corpus:
                expected = "expected a query and a document of the files beside it"
                raise InputError(f"{where}: {expected}, got {row}")
            if row["relevance"] > 0:
                positives.setdefault(row["qid"], []).append(corpus[row["docid"]])

        rows = [{"query": queries[qid], "pos": texts} for qid, texts in positives.items()]
        rows += [{"doc": text} for text in corpus.values()]
        self.dataset = self.to_dataset(rows)
        self.data_loaded = True

    def texts_by_id(self, path):
        lines = json_lines(path, id=str, text=str)
        return {row["id"]: row["text"] for _, row in lines}


class AirLongDoc(Air):
    main_score = "recall_at_10"
    measure = "recall_10"


class Classification(Local, AbsTaskClassification):
    main_score = "accuracy"

    def to_dataset(self, rows):
        labels = sorted({row["label"] for row in rows})
        splits = {"train": [], "test": []}
        for row in rows:
            splits[row["split"]].append(row | {"label": labels.index(row["label"])})
        splits["test"] = spread(splits["test"], self.limit)
        return DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()})

    def observations(self, scores, predictions):
        """Which items each experiment's classifier got right (experiments, items)."""
        right = np.array(predictions) == self.dataset["test"]["label"]
        return right, right.shape[1], right.shape[0]


class Clustering(Local, AbsTaskClustering):
    main_score = "v_measure"
    input_column_name = "text"
    label_column_name = "label"
    max_fraction_of_documents_to_embed = None  # embed all
    n_clusters = 100  # mteb's experiments: resample with replacement, k-means, V-measure

    def to_dataset(self, rows):
        rows = spread(rows, self.limit)
        self.max_documents_per_cluster = len(rows)  # an experiment is one bootstrap resample
        return DatasetDict(test=Dataset.from_list(rows))

    def observations(self, scores, predictions):
        """Of each experiment the texts it drew, their labels, the clusters k-means put them in.

        All three are numbers, (experiments, items).
        """
        clusters = np.array(predictions["Level 0"])
        experiments, items = clusters.shape
        # mteb saves the clusters but not which texts an experiment drew: draw them again
        rng = random.Random(self.seed)
        drawn = np.array([rng.choices(range(items), k=items) for _ in range(experiments)])
        label_numbers = np.unique(self.dataset["test"]["label"], return_inverse=True)[1]
        return (drawn, label_numbers[drawn], clusters), items, experiments

    def score_of(self, observations, items, experiments):
        """The mean V-measure. A text counts as often as it stands in `items`."""
        drawn, labels, clusters = observations
        runs, size = drawn.shape
        k = max(clusters.max(), labels.max()) + 1
        weights = np.bincount(items, minlength=size)[drawn]

        # how often each label and cluster meet in each experiment
        cells = (np.arange(runs)[:, None] * k + labels) * k + clusters
        counts = np.bincount(cells.ravel(), weights.ravel(), runs * k * k)
        counts = counts.reshape(runs, k, k)[experiments]  # (experiments, labels, clusters)

        # V = 2 I(labels; clusters) / (H(labels) + H(clusters))
        separate = entropy(counts.sum(axis=2), axis=1) + entropy(counts.sum(axis=1), axis=1)
        joint = entropy(counts.reshape(runs, -1), axis=1)
        v_measures = 2 * (separate - joint) / np.maximum(separate, 1e-9)
        return np.where(separate > 0, v_measures, 1.0).mean()


class STS(Local, AbsTaskSTS):
    main_score = "cosine_spearman"
    column_names = ("text1", "text2")

    def to_dataset(self, rows):
        return DatasetDict(test=Dataset.from_list(spread(rows, self.limit)))

    def observations(self, scores, predictions):
        pairs = np.array([predictions["cosine_scores"], self.dataset["test"]["score"]])
        return pairs, pairs.shape[1], 1  # (2, pairs)

    def score_of(self, observations, items, experiments):
        return spearmanr(*observations[:, items]).statistic


# ---- the suites

TASKS = [  # name, class, file in data/eval
    ("SQuAD", Retrieval, "squad"),
    ("Wikipedia", Retrieval, "wikipedia"),
    ("Debian", Retrieval, "debian"),
    ("TREC", Classification, "trec"),
    ("SMSSpam", Classification, "spam"),
    ("Sentiment", Classification, "sentiment"),
    ("WikipediaTopics", Clustering, "topics"),
    ("WordSim353", STS, "sts"),
]
LOCAL_INSTRUCTIONS = {  # those of the training sets of the same kind
    "SQuAD": "Given a question, retrieve passages that answer the question",
    "Wikipedia": "Given a title, retrieve the encyclopedia article it names",
    "Debian": "Given a short description, retrieve the software package it describes",
    "TREC": "Given a question, classify the type of answer it asks for",
    "SMSSpam": "Classify the given text message as spam or not spam",
    "Sentiment": "Classify the sentiment of the given text",
    "WikipediaTopics": "Identify the topic of the given encyclopedia article",
    "WordSim353": "Retrieve semantically similar text",
}


def local_tasks(folder=FOLDER, limit=None):
    """The TASKS whose file exists -> list of mteb tasks."""
    tasks = []
    for name, kind, file in TASKS:
        path = Path(folder) / f"{file}.jsonl.gz"
        if path.exists():
            tasks.append(make_task(name, kind, file, LOCAL_INSTRUCTIONS[name], path, limit))
    return tasks


def folder_tasks(folder):
    """Every SPLIT_qrels.jsonl under a folder -> list of mteb tasks, named by their place there."""
    paths = sorted(Path(folder).rglob("*qrels.jsonl"))
    if not paths:
        expected = "expected SPLIT_qrels.jsonl, SPLIT_queries.jsonl and corpus.jsonl in it"
        raise InputError(f"{folder}: {expected}")
    tasks = []
    for path in paths:
        name = re.sub(r"\W+", "-", str(path.relative_to(folder).with_suffix("")))
        kind = AirLongDoc if "long-doc" in str(path) else Air
        tasks.append(make_task(name, kind, name, LOCAL_INSTRUCTIONS["SQuAD"], path, limit=None))
    return tasks


def make_task(name, kind, file, instruction, path, limit):
    """A task of mteb. Its revision is the hash of its files: if one changes it has no results."""
    content = hashlib.sha256()
    for part in kind.files(path):
        content.update(part.read_bytes())
    revision = content.hexdigest()[:12]
    if limit:
        revision += f"-{limit}"
    task_type = kind.__name__
    prompt = instruction
    if issubclass(kind, Retrieval):
        task_type = "Retrieval"
        prompt = {"query": instruction}
    metadata = TaskMetadata(
        name=name,
        type=task_type,
        description=f"data/eval/{path.name}, see data/README.md",
        prompt=prompt,
        dataset={"path": file, "revision": revision},
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
    )
    task_class = type(name, (kind,), {"metadata": metadata, "path": path, "limit": limit})
    return task_class()


# ---- perturbations


def typos(text):
    """Swaps the second and third letter of a quarter of the words of four letters or more.

    The words are drawn by the text itself, so that they are the same every time.
    """
    rng = random.Random(text)
    pieces = re.split(r"(\w+)", text)  # every second piece is a word
    for i in range(1, len(pieces), 2):
        word = pieces[i]
        if len(word) >= 4 and rng.random() < 0.25:
            pieces[i] = word[0] + word[2] + word[1] + word[3:]
    return "".join(pieces)


def first_half(text):
    return text[: len(text) // 2]


PERTURBED = {"typos": typos, "case": str.upper, "truncate": first_half}
