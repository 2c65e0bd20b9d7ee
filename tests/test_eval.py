"""eval.py and the local suite: mteb's numbers against double loops, who gets the instruction, what is run
again."""

import gzip
import json
import math
import shutil
import socket
import sys
import zlib
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import data.tasks
import eval as evaluation
import nvembed

TOPICS = {
    "animal": "cat dog horse fish bird",
    "food": "bread soup cheese rice cake",
    "sky": "sun moon star cloud rain",
}


class FakeModel:
    """A text is the sum of fixed random vectors of its words (an instruction changes nothing); calls are
    kept."""

    def __init__(self, sign=1):
        self.calls, self.sign = [], sign

    def encode(self, texts, instruction="", max_length=512, progress=False):
        self.calls.append((instruction, list(texts)))
        return np.stack([self.embed(text) for text in texts])

    def embed(self, text):
        words = [np.random.default_rng(zlib.crc32(w.encode())).normal(size=8) for w in text.lower().split()]
        vector = np.sum(words, axis=0)
        vector[0] = self.sign * abs(vector[0])
        return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("the local suite asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Small sets of the four types, a model folder and a fake model behind it; paths are relative to
    tmp_path."""
    rng = np.random.default_rng(0)
    labelled = [
        (f"{word} {rng.integers(40)}", label) for label, words in TOPICS.items() for word in words.split() * 4
    ]
    documents = [f"{a[0]} {b[0]}" for a, b in zip(labelled, labelled[7:])]
    rows = {
        "squad": [
            {"query": d.split()[0] + " " + d.split()[2], "pos": [d]} for d in dict.fromkeys(documents[:20])
        ]
        + [{"doc": d} for d in documents],
        "trec": [
            {"text": t, "label": y, "split": ("train", "test")[i % 2]} for i, (t, y) in enumerate(labelled)
        ],
        "topics": [{"text": t, "label": y} for t, y in labelled],
        "sts": [
            {"text1": a, "text2": b, "score": float(x == y)} for (a, x), (b, y) in zip(labelled, labelled[9:])
        ],
    }
    (tmp_path / "eval").mkdir()
    for name, content in rows.items():
        with gzip.open(tmp_path / "eval" / f"{name}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, content)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights of the first training")
    model = FakeModel()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluation, "local_tasks", lambda limit: data.tasks.local_tasks(tmp_path / "eval", limit)
    )
    monkeypatch.setattr(nvembed.NVEmbed, "from_pretrained", lambda *args, **settings: model)
    return model


def run(monkeypatch, capsys, *args):
    """python eval.py ARGS -> the table as {first cell: other cells}, or the text where there is no table."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *args])
    capsys.readouterr()
    nvembed.run(evaluation.main)
    out = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows} or out


def local(name):
    task = next(t for t in evaluation.local_tasks(None) if t.metadata.name == name)
    task.load_data()
    return task


def ndcg_by_loops(model, data):
    """nDCG@10 from the definition, document by document."""
    total = 0.0
    for query in data["queries"]:
        q = model.embed(query["text"])
        scores = [(float(q @ model.embed(doc["text"])), doc["id"]) for doc in data["corpus"]]
        gained = ideal = 0.0
        for rank, (_, doc) in enumerate(sorted(scores, reverse=True)[:10]):
            gained += data["relevant_docs"][query["id"]].get(doc, 0) / math.log2(rank + 2)
        for rank in range(min(10, len(data["relevant_docs"][query["id"]]))):
            ideal += 1 / math.log2(rank + 2)
        total += gained / ideal / len(data["queries"])
    return total


def test_ndcg_equals_a_double_loop(suite, monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--task", "retrieval", "--model", "model")["SQuAD"]
    wanted = ndcg_by_loops(suite, local("SQuAD").dataset["default"]["test"])
    assert 0.2 < wanted < 0.99 and shown == ["ndcg_at_10", f"{100 * wanted:.2f}"]
    assert abs(wanted - ndcg_by_loops(FakeModel(sign=-1), local("SQuAD").dataset["default"]["test"])) < 1e-6


def test_accuracy_equals_ten_classifiers_of_eight_texts_a_label(suite, monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--task", "TREC", "--model", "model")["TREC"]
    train, test = (local("TREC").dataset[split] for split in ("train", "test"))
    order, accuracy = list(range(len(train))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)  # mteb shuffles the last order again, with the same seed
        few = [i for y in range(3) for i in [i for i in order if train["label"][i] == y][:8]]
        few.sort(key=order.index)
        classifier = LogisticRegression(max_iter=100, random_state=42)
        classifier.fit([suite.embed(train["text"][i]) for i in few], [train["label"][i] for i in few])
        accuracy.append(np.mean(classifier.predict([suite.embed(t) for t in test["text"]]) == test["label"]))
    assert shown == ["accuracy", f"{100 * np.mean(accuracy):.2f}"] and 0.4 < np.mean(accuracy) < 0.999


def test_bootstrap_resamples_what_mteb_averages(suite, monkeypatch, capsys):
    """Every item and experiment drawn once gives mteb's score, drawn at random its distribution."""
    shown = run(monkeypatch, capsys, "--model", "model")
    encoder, cache = evaluation.Encoder("model"), mteb.ResultCache("runs")
    folder = cache.get_task_result_path("", encoder.mteb_model_meta).parent / "predictions"
    for task in evaluation.local_tasks(None):
        [(score, deviations)] = evaluation.evaluate(encoder, [task], cache, overwrite=False)
        assert f"{score:.2f}" == shown[task.metadata.name][1]
        task.load_data()
        scores = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta).scores["test"][0]
        predicted = nvembed.read_json(folder / task.prediction_file_name)["default"]["test"]
        statistic, items, experiments = task.resampled_score(scores, predicted)
        once = np.arange(items), np.arange(experiments)
        assert abs(100 * statistic(*once) - score) < 1e-3
        assert abs(100 * statistic(once[0] // 2, once[1]) - score) > 0.1  # other items, another score
        assert 0.5 < deviations.std() < 20 and abs(deviations.mean()) < 1e-6


def test_instruction_goes_to_queries_and_to_both_sides_of_symmetric_tasks(suite, monkeypatch, capsys):
    run(monkeypatch, capsys, "--model", "model")
    given = {task[0]: task[3] for task in data.tasks.TASKS}
    squad = local("SQuAD").dataset["default"]["test"]
    assert (given["SQuAD"], list(squad["queries"]["text"])) in suite.calls
    bare = [texts for instruction, texts in suite.calls if not instruction]
    assert bare == [list(squad["corpus"]["text"])]  # documents, and nothing else, are bare
    pairs = local("WordSim353").dataset["test"]
    sides = [
        texts for instruction, texts in suite.calls if instruction == "Retrieve semantically similar text"
    ]
    assert sides == [list(pairs["text1"]), list(pairs["text2"])]
    assert given["TREC"] in dict(suite.calls) and given["WikipediaTopics"] in dict(suite.calls)


@pytest.mark.parametrize(
    ("task", "query", "document"),
    [
        ("ArguAna", "Given a claim, retrieve documents that support or refute the claim", ""),
        ("Touche2020Retrieval.v3", "Given a question, retrieve passages that answer the question", ""),
        ("NQ", "Given a question, retrieve passages that answer the question", ""),
        ("NQTablesRetrieval", None, ""),  # not NQ
        ("FEVERHardNegatives", "Given a claim, retrieve documents that support or refute the claim", ""),
        (
            "CQADupstackAndroidRetrieval",
            "Given a question paragraph at StackExchange, retrieve a question duplicated paragraph",
            "",
        ),
        (
            "QuoraRetrieval",
            "Given a question, retrieve questions that are semantically equivalent to the given question",
            "Given a question, retrieve questions that are semantically equivalent to the given question",
        ),
        ("AskUbuntuDupQuestions", "Retrieve duplicate questions from AskUbuntu forum", ""),
        ("STS17", "Retrieve semantically similar text", "Retrieve semantically similar text"),
        ("SprintDuplicateQuestions", None, "Retrieve duplicate questions from Sprint forum"),
        ("SummEval", "Given a news summary, retrieve other semantically similar summaries", None),
    ],
)
def test_instruction_of_mteb_tasks(task, query, document):
    metadata = mteb.get_task(task).metadata
    theirs = metadata.prompt["query"] if isinstance(metadata.prompt, dict) else metadata.prompt
    assert evaluation.instruction(metadata, "query") == (query or theirs)
    assert document is None or evaluation.instruction(metadata, "document") == document


def test_emotion_is_instructed_as_the_authors_spelled_it():
    metadata = mteb.get_task("EmotionClassification").metadata
    assert (
        evaluation.instruction(metadata)
        == metadata.prompt.replace("emotions: ", "emotions:")
        != metadata.prompt
    )


def test_every_task_of_the_paper_has_an_instruction():
    tasks = mteb.get_benchmark("MTEB(eng, v1)").tasks
    assert len(tasks) == 56 and all(evaluation.instruction(task.metadata, "query") for task in tasks)


def test_a_type_without_a_set_says_so_and_an_unknown_name_is_an_error(suite, monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--task", "reranking", "--model", "model")
    assert out.count("\n") == 1 and out.startswith("reranking: no set") and not suite.calls
    for bad in (
        ["--task", "rerank"],
        ["--suite", "MTEB"],
        ["--model", "model:max"],
        ["--model", "absent/model"],
    ):
        with pytest.raises(SystemExit) as exit:
            run(monkeypatch, capsys, *(["--model", "model"] if "--model" not in bad else []), *bad)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1 and bad[1] in error
    assert "Reranking" in evaluation_error(monkeypatch, capsys, "--task", "rerank")
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys)  # neither runs/stage1 nor runs/stage2


def evaluation_error(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *args)
    return capsys.readouterr().err


def test_only_what_is_missing_or_stale_is_run(suite, tmp_path, monkeypatch, capsys):
    def encodes(*args):
        suite.calls.clear()
        run(monkeypatch, capsys, "--model", "model", *args)
        return len(suite.calls)

    assert encodes("--task", "sts") == 2
    assert encodes("--task", "sts") == 0  # its result is there
    assert (
        encodes("--task", "all") == 2 + 2 + 1
    )  # queries and documents, train and test texts, texts: not the pairs
    assert encodes("--task", "all") == 0 and encodes("--task", "sts", "--overwrite") == 2
    assert encodes("--task", "sts", "--limit", "5") == 2 and encodes("--task", "sts") == 0  # kept apart
    assert encodes("--task", "sts", "--max-length", "64") == 2
    weights = tmp_path / "model" / "model.safetensors"
    shutil.copy(weights, weights.with_suffix(".old"))
    weights.write_bytes(b"weights of another training")  # of the same size
    assert encodes("--task", "sts") == 2
    weights.write_bytes(weights.with_suffix(".old").read_bytes())
    assert encodes("--task", "sts") == 0  # the first training's result is still its own
    with gzip.open(tmp_path / "eval" / "sts.jsonl.gz", "at") as file:
        file.write('\n{"text1": "cat 1", "text2": "dog 2", "score": 1.0}')
    assert encodes("--task", "sts") == 2  # other data


def test_equal_models_differ_by_nothing_and_unequal_ones_by_more(suite, tmp_path, monkeypatch, capsys):
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"other bytes, same fake model")
    shown = run(monkeypatch, capsys, "--model", "model", "--model", "copy")
    assert all(
        shown[task][-1] == "+0.00 [+0.00, +0.00]"
        for task in ("SQuAD", "TREC", "WikipediaTopics", "WordSim353")
    )
    assert shown["task"][-1] == "last - first [95 %]" and shown["mean"][-1] == "+0.00 [+0.00, +0.00]"
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"a poor model")
    monkeypatch.setattr(FakeModel, "embed", lambda self, text: np.eye(8, dtype=np.float32)[len(text) % 8])
    shown = run(monkeypatch, capsys, "--model", "model", "--model", "copy")
    for task in ("SQuAD", "TREC", "WikipediaTopics", "WordSim353"):
        low, high = map(float, shown[task][-1].split("[")[1].strip("]").split(","))
        assert low < float(shown[task][2]) - float(shown[task][1]) < high
        assert high < 0 or task != "SQuAD"  # the other sets are too small to tell


def test_limit_is_a_smaller_task_of_all_labels(suite):
    small = {
        task.metadata.name: task
        for task in data.tasks.local_tasks(evaluation.local_tasks(None)[0].path.parent, 6)
    }
    for task in small.values():
        task.load_data()
    retrieval = small["SQuAD"].dataset["default"]["test"]
    assert len(retrieval["queries"]) <= 6 < len(retrieval["corpus"]) <= 66
    assert {doc for docs in retrieval["relevant_docs"].values() for doc in docs} <= set(
        retrieval["corpus"]["id"]
    )
    assert len(small["TREC"].dataset["test"]) <= 6 and len(set(small["TREC"].dataset["test"]["label"])) == 3
    assert (
        len(small["WikipediaTopics"].dataset["test"]) <= 6 and len(small["WordSim353"].dataset["test"]) <= 6
    )


def test_local_tasks_are_instructed_as_in_training():
    recipe = json.loads((data.tasks.FOLDER.parent / "local.json").read_text())
    trained = {dataset["instruction"] for dataset in recipe["datasets"]}
    tasks = {task.metadata.name: task for task in data.tasks.local_tasks()}
    assert set(tasks) == {name for name, *_ in data.tasks.TASKS}  # every set is shipped
    assert trained >= {
        evaluation.instruction(t.metadata, "query") for t in tasks.values() if t.metadata.type != "STS"
    }


def test_shipped_suite_with_a_released_model(released, tmp_path, monkeypatch, capsys):
    args = [
        "--model",
        str(released),
        "--model",
        f"{released}:mean:causal",
        "--limit",
        "4",
        "--max-length",
        "64",
    ]
    shown = run(monkeypatch, capsys, *args, "--dtype", "float32", "--out", str(tmp_path))
    assert {name for name, *_ in data.tasks.TASKS} < set(shown)
    assert (
        all(0 <= float(cell) <= 100 for cell in shown["SQuAD"][1:3])
        and shown["SQuAD"][1] != shown["SQuAD"][2]
    )


def test_interval_of_a_mean_is_narrower_than_those_of_its_tasks():
    """Four tasks with independent deviations of size 1: half the width for their mean."""
    rng, column = np.random.default_rng(0), [(50.0, np.zeros(20000))] * 4
    kind = {"type": "Retrieval", "main_score": "x"}
    tasks = [SimpleNamespace(metadata=SimpleNamespace(name=f"t{i}", **kind)) for i in range(4)]
    moved = [(51.0, rng.standard_normal(20000)) for _ in tasks]
    rows = {
        line.split("|")[1].strip(): line.split("|")[-2].strip()
        for line in evaluation.table(tasks, {"a": column, "b": moved})
    }
    low, high = (float(x) for x in rows["t0"].split("[")[1].rstrip("]").split(","))
    assert rows["t0"].startswith("+1.00 [") and (low, high) == pytest.approx((1 - 1.96, 1 + 1.96), abs=0.06)
    for name in ("Retrieval mean", "mean"):
        low, high = (float(x) for x in rows[name].split("[")[1].rstrip("]").split(","))
        assert (low, high) == pytest.approx((1 - 0.98, 1 + 0.98), abs=0.04)
    tasks.append(SimpleNamespace(metadata=SimpleNamespace(name="hub", type="STS", main_score="x")))
    lines = evaluation.table(tasks, {"a": [*column, (1.0, None)], "b": [*moved, (2.0, None)]})
    assert lines[-1].rstrip("| ").endswith("+1.00")  # no interval where a task has none
