"""data/tasks.py: the suites, the instruction of every task, the bootstrap, the perturbations."""

import json
import math

import mteb
import numpy as np
import pytest
from conftest import ROOT
from small_suite import TOPICS, cells, error, local, output, suite  # noqa: F401

import data.tasks
import eval as evaluation
from data.files import read_json

QUESTION = "Given a question, retrieve passages that answer the question"
CLAIM = "Given a claim, retrieve documents that support or refute the claim"
FORUM = "Given a question paragraph at StackExchange, retrieve a question duplicated paragraph"
QUORA = (
    "Given a question, retrieve questions that are semantically equivalent to the given question"
)
SAME = "Retrieve semantically similar text"
NEWS = "Given a news summary, retrieve other semantically similar summaries"


# ---- instructions


@pytest.mark.parametrize(
    ("task", "query", "document"),  # None: mteb's own, any
    [
        ("ArguAna", CLAIM, ""),
        ("Touche2020Retrieval.v3", QUESTION, ""),
        ("NQ", QUESTION, ""),
        ("NQTablesRetrieval", None, ""),  # not NQ
        ("FEVERHardNegatives", CLAIM, ""),
        ("CQADupstackAndroidRetrieval", FORUM, ""),
        ("QuoraRetrieval", QUORA, QUORA),
        ("AskUbuntuDupQuestions", "Retrieve duplicate questions from AskUbuntu forum", ""),
        ("STS17", SAME, SAME),
        ("SprintDuplicateQuestions", None, "Retrieve duplicate questions from Sprint forum"),
        ("SummEval", NEWS, None),
    ],
)
def test_instruction_of_mteb_tasks(task, query, document):
    metadata = mteb.get_task(task).metadata
    theirs = metadata.prompt
    if isinstance(theirs, dict):
        theirs = theirs["query"]
    assert data.tasks.instruction(metadata, "query") == (query or theirs)
    if document is not None:
        assert data.tasks.instruction(metadata, "document") == document


def test_emotion_is_instructed_as_the_authors_spelled_it():
    metadata = mteb.get_task("EmotionClassification").metadata
    spelled = metadata.prompt.replace("emotions: ", "emotions:")
    assert data.tasks.instruction(metadata) == spelled != metadata.prompt


def test_every_task_of_the_paper_has_an_instruction():
    tasks = mteb.get_benchmark("MTEB(eng, v1)").tasks
    assert len(tasks) == 56
    assert all(data.tasks.instruction(task.metadata, "query") for task in tasks)


def test_local_tasks_are_instructed_as_in_training():
    recipe = json.loads((ROOT / "data/local.json").read_text())
    trained = {dataset["instruction"] for dataset in recipe["datasets"]}
    # out of domain
    trained.add("Given a short description, retrieve the software package it describes")
    tasks = data.tasks.local_tasks()
    names = [task.metadata.name for task in tasks]
    assert names == [name for name, *_ in data.tasks.TASKS]  # every set is shipped
    assert set(names) == set(data.tasks.LOCAL_INSTRUCTIONS)
    for task in tasks:
        given = data.tasks.instruction(task.metadata, "query")
        assert given == data.tasks.LOCAL_INSTRUCTIONS[task.metadata.name]
        assert given in trained or task.metadata.type == "STS"


# ---- suites


@pytest.mark.parametrize(
    ("suite_name", "least"),
    [
        ("MTEB(eng, v2)", 40),
        ("BEIR", 15),
        ("LongEmbed", 6),
        ("MTEB(Medical, v1)", 10),
        ("MTEB(Law, v1)", 8),
        ("MTEB(Code, v1)", 12),
        ("NanoBEIR", 13),
    ],
)
def test_other_suites_by_name(suite_name, least):
    tasks = data.tasks.find_tasks(suite_name, "all")
    assert len(tasks) >= least
    instructions = [data.tasks.instruction(task.metadata, "query") for task in tasks]
    assert all(isinstance(instruction, str) for instruction in instructions)


def test_tasks_by_type_or_name_in_any_case(suite):
    def names(wanted):
        return [task.metadata.name for task in data.tasks.find_tasks("local", wanted)]

    assert names("all") == ["SQuAD", "TREC", "WikipediaTopics", "WordSim353"]
    assert names("STS") == names("sts") == names("wordsim353") == ["WordSim353"]


def test_limit_is_a_smaller_task_of_all_labels(suite):
    small = {task.metadata.name: task for task in data.tasks.local_tasks(limit=6)}
    for task in small.values():
        task.load_data()
    split = small["SQuAD"].dataset["default"]["test"]
    assert len(split["queries"]) <= 6 < len(split["corpus"]) <= 66
    relevant = {doc for docs in split["relevant_docs"].values() for doc in docs}
    assert relevant <= set(split["corpus"]["id"])
    trec = small["TREC"].dataset["test"]
    assert len(trec) <= 6 and len(set(trec["label"])) == 3
    assert len(small["WikipediaTopics"].dataset["test"]) <= 6
    assert len(small["WordSim353"].dataset["test"]) <= 6


@pytest.fixture
def air(tmp_path):
    """Two tasks in AIR-Bench's layout: QA by nDCG@10, a long document by recall@10."""
    corpus = [f"{word} {i}" for i, word in enumerate(TOPICS["sky"].split() * 9)]
    for place, relevant in (
        ("qa_web_en/AIR-Bench_24.05/default", [1, 5]),
        ("long-doc_book_en/a-tale", [2]),
    ):
        qrels = [{"qid": "q1", "docid": f"d{i}", "relevance": 1} for i in relevant]
        files = {
            "corpus": [{"id": f"d{i}", "text": text} for i, text in enumerate(corpus)],
            "dev_queries": [
                {"id": "q1", "text": corpus[relevant[0]]},
                {"id": "q2", "text": "of the test split"},
            ],
            "dev_qrels": [*qrels, {"qid": "q1", "docid": "d9", "relevance": 0}],
        }
        folder = tmp_path / "air" / place
        folder.mkdir(parents=True)
        for name, rows in files.items():
            text = "\n".join(json.dumps(row) for row in rows)
            (folder / f"{name}.jsonl").write_text(text)
    return tmp_path / "air"


def test_a_folder_in_air_benchs_layout(suite, air, monkeypatch, capsys):
    rows = cells(output(monkeypatch, capsys, "--suite", air, "--model", "model"))
    name, score = rows["qa_web_en-AIR-Bench_24-05-default-dev_qrels"]
    assert name == "ndcg_at_10"
    assert rows["long-doc_book_en-a-tale-dev_qrels"] == ["recall_at_10", "100.00"]
    documents = [f"{word} {i}" for i, word in enumerate(TOPICS["sky"].split() * 9)]
    query = suite.embed(documents[1])
    order = sorted(documents, key=lambda text: -float(suite.embed(text) @ query))
    ranks = [order.index(documents[i]) for i in (1, 5)]
    gain = sum(1 / math.log2(rank + 2) for rank in ranks if rank < 10)
    ideal = 1 + 1 / math.log2(3)
    assert float(score) == pytest.approx(100 * gain / ideal, abs=0.01)
    assert (QUESTION, [documents[1]]) in suite.calls


def test_results_of_a_folder_depend_on_all_its_files(suite, air, monkeypatch, capsys):
    how = ("--suite", air, "--task", "qa_web_en-AIR-Bench_24-05-default-dev_qrels")

    def encodes():
        suite.calls.clear()
        output(monkeypatch, capsys, *how, "--model", "model")
        return len(suite.calls)

    assert encodes() == 2
    assert encodes() == 0
    (folder,) = air.glob("qa*/*/default")
    (folder / "other.jsonl").write_text("not of the task")
    assert encodes() == 0  # control
    for name in ("corpus", "dev_queries"):
        path = folder / f"{name}.jsonl"
        path.write_text(path.read_text().replace("star", "moon").replace("moon 1", "cloud 1"))
        assert encodes() == 2
        assert encodes() == 0
    path.unlink()
    message = error(monkeypatch, capsys, *how, "--model", "model")
    assert "dev_qrels.jsonl: expected dev_queries.jsonl beside it" in message


def test_bad_files_of_air_bench(suite, air, monkeypatch, capsys):
    command = ("--suite", air, "--model", "model")
    qrels = next(air.rglob("qa*/**/dev_qrels.jsonl"))
    qrels.write_text('{"qid": "q1", "docid": "gone", "relevance": 1}')
    message = error(monkeypatch, capsys, *command)
    assert "dev_qrels.jsonl:1: expected a query and a document" in message and "gone" in message
    qrels.write_text('{"qid": "q1", "docid": 3, "relevance": 1}')
    message = error(monkeypatch, capsys, *command)
    assert "dev_qrels.jsonl:1: field 'docid': expected str" in message
    (air / "empty").mkdir()
    message = error(monkeypatch, capsys, "--suite", air / "empty", "--model", "model")
    assert "empty: expected SPLIT_qrels.jsonl" in message and "corpus.jsonl" in message


# ---- bootstrap


def test_bootstrap_resamples_what_mteb_averages(suite):
    """Every item and experiment drawn once gives mteb's score, drawn at random its distribution."""
    encoder = evaluation.Encoder("model")
    cache = mteb.ResultCache("runs")
    folder = cache.get_task_result_path("", encoder.mteb_model_meta).parent / "predictions"
    for task in data.tasks.local_tasks():
        name = task.metadata.name
        score, *resampled = data.tasks.score_task(task, encoder, cache)
        result = cache.load_task_result(name, encoder.mteb_model_meta)
        assert abs(score - 100 * result.get_score()) < 1e-3, name  # the file is rounded
        task.load_data()
        predictions = read_json(folder / task.prediction_file_name)["default"]["test"]
        observations, items, experiments = task.observations(result.scores["test"][0], predictions)
        every_item = np.arange(items)
        every_experiment = np.arange(experiments)
        once = 100 * task.score_of(observations, every_item, every_experiment)
        assert abs(once - score) < 1e-3, name
        half = 100 * task.score_of(observations, every_item // 2, every_experiment)
        assert abs(half - score) > 0.1, name  # control: other items, another score
        deviations = np.array(resampled) - score
        assert 0.5 < deviations.std() < 20 and abs(deviations.mean()) < 1e-6, name


def test_bootstrap_draws_the_same_for_every_model(suite):
    """Paired: two models that are right about the same items deviate by the same."""
    task = local("TREC")
    items = len(task.dataset["test"])
    labels = np.array(task.dataset["test"]["label"])
    predictions = [labels.tolist(), np.zeros(items, int).tolist()]
    first = data.tasks.bootstrap(task, {}, predictions)
    np.testing.assert_array_equal(first, data.tasks.bootstrap(task, {}, predictions))
    other = data.tasks.bootstrap(task, {}, predictions[::-1])
    assert np.abs(first - other).max() > 0.01  # control


# ---- perturbations


def test_typos_swap_letters_inside_a_quarter_of_the_words():
    text = "the quick brown foxes jumped over sleeping hounds " * 20
    misspelt = data.tasks.typos(text)
    assert misspelt == data.tasks.typos(text) != text
    words = list(zip(text.split(), misspelt.split(), strict=True))
    assert all(sorted(a) == sorted(b) and (a[0], a[-1]) == (b[0], b[-1]) for a, b in words)
    assert 0.1 < np.mean([a != b for a, b in words]) < 0.3


def test_every_perturbation():
    assert data.tasks.PERTURBED["truncate"]("one two") == "one"
    assert data.tasks.PERTURBED["case"]("one two") == "ONE TWO"
    assert data.tasks.PERTURBED["typos"]("a word, or two") in ("a word, or two", "a wrod, or two")


def test_a_changed_file_is_another_revision(tmp_path):
    path = tmp_path / "sts.jsonl.gz"
    revisions = []
    for content, limit in ((b"a", None), (b"a", 5), (b"b", None)):
        path.write_bytes(content)
        (task,) = data.tasks.local_tasks(tmp_path, limit)
        revisions.append(task.metadata.dataset["revision"])
    assert revisions[1] == revisions[0] + "-5" and len(set(revisions)) == 3
