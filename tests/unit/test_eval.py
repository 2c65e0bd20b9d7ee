"""eval.py and the local suite: mteb's numbers against double loops, who gets the instruction, what is run
again."""

import gzip
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
import train
from conftest import ROOT
from sklearn.linear_model import LogisticRegression

import data.tasks
import eval as evaluation
import nvembed

INSTRUCTION = "Given a question, retrieve passages that answer the question"
TOPICS = {
    "animal": "cat dog horse fish bird",
    "food": "bread soup cheese rice cake",
    "sky": "sun moon star cloud rain",
}


ARGS = SimpleNamespace(out="runs", overwrite=False)


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
    monkeypatch.setattr(evaluation, "RESAMPLES", 50)  # quick


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
        [[score, *resampled]] = evaluation.evaluate(encoder, [task], ARGS)
        deviations = np.array(resampled) - score
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
        ["--suite", "MTEBB"],
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
    trained |= {"Given a short description, retrieve the software package it describes"}  # out of domain
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
        "128",
    ]
    shown = run(monkeypatch, capsys, *args, "--dtype", "float32", "--out", str(tmp_path))
    assert {name for name, *_ in data.tasks.TASKS} < set(shown)
    assert (
        all(0 <= float(cell) <= 100 for cell in shown["SQuAD"][1:3])
        and shown["SQuAD"][1] != shown["SQuAD"][2]
    )


def columns(tasks, **models):
    """{model: (scores, their deviations)} -> what `averaged` returns for one seed."""
    scores = {m: [np.hstack([s[:, None], s[:, None] + d])] for m, (s, d) in models.items()}
    return evaluation.averaged(tasks, scores)


def cells(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def named(*names, kind="Retrieval"):
    metadata = {"type": kind, "main_score": "x"}
    return [SimpleNamespace(metadata=SimpleNamespace(name=name, **metadata)) for name in names]


def test_interval_of_a_mean_is_narrower_than_those_of_its_tasks(monkeypatch):
    """Four tasks with independent deviations of size 1: half the width for their mean."""
    monkeypatch.setattr(evaluation, "RESAMPLES", 20000)
    tasks, still = named("t0", "t1", "t2", "t3"), np.zeros((4, 20000))
    moved = np.random.default_rng(0).standard_normal((4, 20000))
    found = columns(tasks, a=(np.full(4, 50.0), still), b=(np.full(4, 51.0), moved))
    rows = {name: row[-1] for name, row in cells(evaluation.table(tasks, found, {})).items()}
    low, high = (float(x) for x in rows["t0"].split("[")[1].rstrip("]").split(","))
    assert rows["t0"].startswith("+1.00 [") and (low, high) == pytest.approx((1 - 1.96, 1 + 1.96), abs=0.06)
    for name in ("Retrieval mean", "mean"):
        low, high = (float(x) for x in rows[name].split("[")[1].rstrip("]").split(","))
        assert (low, high) == pytest.approx((1 - 0.98, 1 + 0.98), abs=0.04)
    tasks, still, moved = (
        tasks + named("hub", kind="STS"),
        *(np.vstack([x, x[:1] + np.nan]) for x in (still, moved)),
    )
    found = columns(tasks, a=(np.array([50.0] * 4 + [1]), still), b=(np.array([51.0] * 4 + [2]), moved))
    rows = {name: row[-1] for name, row in cells(evaluation.table(tasks, found, {})).items()}
    assert rows["mean"] == "+1.00" and "[" in rows["t0"]  # no interval where a task has none


PAPER = "MTEB(eng, v1)"


def test_published_scores_are_those_of_the_56_tasks_and_stand_beside_ours():
    tasks, peers = mteb.get_benchmark(PAPER).tasks, evaluation.PUBLISHED["suites"][PAPER]
    second, means = peers["NV-Embed-v2"], {}
    names = {task.metadata.name for task in tasks}
    assert names == {name for name in second if not name.endswith("mean")} and len(names) == 56
    for kind in {task.metadata.type for task in tasks}:
        scores = [second[task.metadata.name] for task in tasks if task.metadata.type == kind]
        means[f"{kind} mean"] = np.mean(scores)
    means["mean"] = np.mean([second[name] for name in names])
    for title, mean in means.items():  # the printed means are those of the tasks
        assert mean == pytest.approx(second[title], abs=0.03), title
    ours = np.array([second[task.metadata.name] + 1.5 for task in tasks])
    found = columns(tasks, ours=(ours, np.full((56, evaluation.RESAMPLES), np.nan)))
    rows = cells(evaluation.table(tasks, found, peers))
    assert rows["task"][1:] == [
        "ours",
        "NV-Embed-v1",
        "NV-Embed-v2",
        "last - NV-Embed-v1",
        "last - NV-Embed-v2",
    ]
    assert rows["ArguAna"] == ["ndcg_at_10", "71.57", "-", "70.07", "-", "+1.50"]
    assert rows["mean"][2:4] == ["69.32", "72.31"] and float(rows["mean"][1]) == pytest.approx(
        73.81, abs=0.02
    )
    assert float(rows["mean"][4]) == pytest.approx(4.49, abs=0.02)
    assert rows["Reranking mean"][2:4] == ["60.59", "60.65"]


@pytest.mark.parametrize(
    ("suite_name", "least"),
    [("MTEB(eng, v2)", 40), ("BEIR", 15), ("LongEmbed", 6), ("MTEB(Medical, v1)", 10), ("MTEB(Law, v1)", 8)]
    + [("MTEB(Code, v1)", 12), ("NanoBEIR", 13)],
)
def test_other_suites_by_name(suite_name, least):
    tasks = evaluation.find_tasks(suite_name, "all", None)
    assert len(tasks) >= least
    assert all(isinstance(evaluation.instruction(task.metadata, "query"), str) for task in tasks)


def test_seeds_are_averaged_with_their_deviation_and_the_papers_row(suite, tmp_path, monkeypatch, capsys):
    cell, values = tmp_path / "reversed", {}
    for seed in range(3):
        shutil.copytree(tmp_path / "model", cell / str(seed))
        (cell / str(seed) / "model.safetensors").write_bytes(bytes([seed + 1]))
        embed = lambda self, text, s=seed: np.eye(8, dtype=np.float32)[(len(text) * (s + 1)) % 8]  # noqa: E731
        monkeypatch.setattr(FakeModel, "embed", embed)
        values[seed] = float(run(monkeypatch, capsys, "--model", f"reversed/{seed}")["mean"][1])
    shown = run(monkeypatch, capsys, "--compare", "reversed")
    mean, deviation = map(float, shown["reversed"][-1].split(" ± "))
    assert mean == pytest.approx(np.mean([*values.values()]), abs=0.01) and len(set(values.values())) > 1
    assert deviation == pytest.approx(np.std([*values.values()], ddof=1), abs=0.01) and deviation > 0.1
    assert shown["run"][0] == "Retrieval mean" and shown["reversed, paper"][0] == "61.91"
    assert suite.calls and not suite.calls.clear()
    run(monkeypatch, capsys, "--compare", "reversed")
    assert not suite.calls  # all were there


# ---- every kind of task, several ranks, killed runs


def test_mock_tasks_of_every_text_type(released, monkeypatch):
    encoder = evaluation.Encoder(str(released), max_length=128, dtype="float32")
    found = dict(mteb.mock_run(encoder).items())
    tasks = {task.metadata.name: task for task in mteb.mocks.MOCK_TASK_TEST_GRID}
    failed = {name: found[name] for name in tasks if not hasattr(found[name], "scores")}
    assert not failed and {task.metadata.type for task in tasks.values()} > {
        "Retrieval",
        "Reranking",
        "Clustering",
        "PairClassification",
        "Classification",
        "STS",
        "Summarization",
        "BitextMining",
        "InstructionReranking",
        "MultilabelClassification",
    }
    monkeypatch.setattr(type(encoder.model), "encode", lambda self, texts, *_, **__: np.zeros((1, 4)))
    assert not mteb.mock_run(encoder).all_passed  # control: one vector for all texts


def test_a_killed_evaluation_goes_on(suite, monkeypatch, capsys):
    whole, embed = run(monkeypatch, capsys, "--model", "model", "--out", "whole"), FakeModel.encode
    asked = [texts for _, texts in suite.calls]

    def killed(self, *args, **kwargs):
        if len(self.calls) == 4:
            raise KeyboardInterrupt
        return embed(self, *args, **kwargs)

    suite.calls.clear()
    monkeypatch.setattr(FakeModel, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, capsys, "--model", "model")
    assert [texts for _, texts in suite.calls] == asked[:4]
    suite.calls.clear()
    monkeypatch.setattr(FakeModel, "encode", embed)
    assert run(monkeypatch, capsys, "--model", "model") == whole
    assert [texts for _, texts in suite.calls] == asked[4:]  # the first two tasks took four


def test_equal_scores_on_one_and_two_ranks(released, tmp_path, monkeypatch, capsys):
    how = ["--limit", "6", "--max-length", "128", "--dtype", "float32", "--task", "wikipedia"]
    alone = run(monkeypatch, capsys, *how, "--model", str(released), "--out", str(tmp_path / "alone"))
    found = []
    for model in (released, "none"):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        line += [ROOT / "eval.py", *how, "--model", model, "--out", tmp_path / "two"]
        found.append(subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=300))
    two, failed = found
    assert two.returncode == 0 and cells(two.stdout)["Wikipedia"] == alone["Wikipedia"], two.stderr
    assert 0 < float(alone["Wikipedia"][1]) < 100
    assert (
        failed.returncode != 0 and "error: model 'none': not a folder" in failed.stderr
    )  # on rank 0: all end


def test_two_ranks_share_texts_and_keep_their_order(released, tmp_path):
    """Rank 0 embeds in this process; rank 1, in another one, counts what it is asked for."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import eval as evaluation
evaluation.dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=1, world_size=2)
share = evaluation.Encoder.share
evaluation.Encoder.share = lambda self, texts, task: print(len(texts), task, flush=True) or share(self, texts, task)
evaluation.serve()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    encoder, texts = (
        evaluation.Encoder(str(released), 64, "float32"),
        [f"{'word ' * (i % 5)}{i}" for i in range(9)],
    )
    alone = encoder.embed(texts, "Find it")
    evaluation.dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=2)
    try:
        lengths, encode = [], encoder.model.encode
        encoder.model.encode = lambda texts, *args, **how: (
            lengths.append(len(texts)) or encode(texts, *args, **how)
        )
        np.testing.assert_allclose(encoder.embed(texts, "Find it"), alone, atol=1e-5)
        assert encoder.embed(texts[:1], "").shape == alone[:1].shape and lengths == [5, 1]
    finally:
        evaluation.dist.broadcast_object_list([None])
        evaluation.dist.destroy_process_group()
    assert other.communicate(timeout=60)[0].split("\n")[:2] == ["9 Find it", "1 "] and other.returncode == 0
    assert np.abs(alone - alone[::-1]).max() > 1e-2  # an order that is lost shows


# ---- BM25, perturbed texts, AIR-Bench


def test_bm25_stands_beside_models_where_it_can(suite, monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--model", "model", "--model", "bm25")
    assert float(shown["SQuAD"][2]) > 70  # queries are words of the document
    assert shown["TREC"][2] == shown["mean"][2] == "-" and shown["Retrieval mean"][2] == shown["SQuAD"][2]
    small, again = (
        run(monkeypatch, capsys, "--model", "bm25", "--task", "SQuAD", *how) for how in (["--limit", "2"], [])
    )
    assert again["SQuAD"][1] == shown["SQuAD"][2] != small["SQuAD"][1]  # a quick look is another result


def test_perturbed_are_queries_and_symmetric_texts_the_same_way_always(suite, monkeypatch, capsys):
    run(monkeypatch, capsys, "--model", "model", "--perturb", "case")
    squad, pairs = local("SQuAD").dataset["default"]["test"], local("WordSim353").dataset["test"]
    asked = [texts for _, texts in suite.calls]
    assert [text.upper() for text in squad["queries"]["text"]] in asked and list(
        squad["corpus"]["text"]
    ) in asked
    assert [text.upper() for text in pairs["text1"]] in asked
    text = "the quick brown foxes jumped over sleeping hounds " * 20
    misspelt = data.tasks.typos(text)
    assert misspelt == data.tasks.typos(text) != text
    words = list(zip(text.split(), misspelt.split(), strict=True))
    assert all(sorted(a) == sorted(b) and (a[0], a[-1]) == (b[0], b[-1]) for a, b in words)
    assert 0.1 < np.mean([a != b for a, b in words]) < 0.3
    assert data.tasks.PERTURBED["truncate"]("one two") == "one"
    suite.calls.clear()
    run(monkeypatch, capsys, "--model", "model")
    assert suite.calls  # results of perturbed texts are kept apart


@pytest.fixture
def air(tmp_path):
    """Two tasks in AIR-Bench's layout: QA by nDCG@10, a long document by recall@10."""
    for place, found in (
        ("qa_web_en/AIR-Bench_24.05/default", ["d1", "d5"]),
        ("long-doc_book_en/a-tale", ["d2"]),
    ):
        folder = tmp_path / "air" / place
        folder.mkdir(parents=True)
        files = {
            "corpus": [
                {"id": f"d{i}", "text": f"{word} {i}"} for i, word in enumerate(TOPICS["sky"].split() * 9)
            ]
        }
        files["dev_queries"] = [{"id": "q1", "text": files["corpus"][int(found[0][1:])]["text"]}]
        files["dev_queries"].append({"id": "q2", "text": "of the test split"})
        files["dev_qrels"] = [{"qid": "q1", "docid": d, "relevance": 1} for d in found]
        files["dev_qrels"].append({"qid": "q1", "docid": "d9", "relevance": 0})
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "air"


def test_a_folder_as_air_bench_lays_it_out(suite, air, monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--suite", str(air), "--model", "model")
    assert shown["qa_web_en-AIR-Bench_24-05-default-dev_qrels"][0] == "ndcg_at_10"
    assert shown["long-doc_book_en-a-tale-dev_qrels"] == ["recall_at_10", "100.00"]
    documents = [f"{word} {i}" for i, word in enumerate(TOPICS["sky"].split() * 9)]
    order = sorted(documents, key=lambda text: -float(suite.embed(text) @ suite.embed(documents[1])))
    gained = sum(
        1 / math.log2(order.index(documents[i]) + 2) for i in (1, 5) if order.index(documents[i]) < 10
    )
    wanted = 100 * gained / (1 + 1 / math.log2(3))
    assert float(shown["qa_web_en-AIR-Bench_24-05-default-dev_qrels"][1]) == pytest.approx(wanted, abs=0.01)
    assert ("Given a question, retrieve passages that answer the question", [documents[1]]) in suite.calls
    qrels = next(air.rglob("qa*/**/dev_qrels.jsonl"))
    qrels.write_text('{"qid": "q1", "docid": "gone", "relevance": 1}')
    assert "gone" in evaluation_error(monkeypatch, capsys, "--suite", str(air), "--model", "model")
    qrels.write_text('{"qid": "q1", "docid": 3, "relevance": 1}')
    error = evaluation_error(monkeypatch, capsys, "--suite", str(air), "--model", "model")
    assert "dev_qrels.jsonl:1: field 'docid': expected str" in error
    (air / "empty").mkdir()
    error = evaluation_error(monkeypatch, capsys, "--suite", str(air / "empty"), "--model", "model")
    assert error.count("\n") == 1 and "corpus.jsonl" in error


# ---- ablations


def test_declared_cells_are_recipes_and_have_the_papers_rows():
    declared = evaluation.read_json(ROOT / "data" / "ablations.json")
    used = {cell for names in declared["grids"].values() for cell in names}
    assert used == set(declared["cells"]) and [*declared["grids"]] == [
        "pooling",
        "stages",
        "labels",
        "mining",
        "data",
        "compression",
    ]
    assert len(declared["grids"]["pooling"]) == 16  # four poolings, two masks, after each of two stages
    recipe = evaluation.read_recipe(ROOT / "data" / "local.json", declared["preset"])
    names, known = {d["name"] for d in recipe["datasets"]}, {field.name for field in fields(train.Settings)}
    for cell in declared["cells"].values():
        assert cell.keys() <= {"stages", "settings", "without", "labels", "mine"}
        assert set(cell.get("without", [])) < names and all(stage in (1, 2, 3) for stage, _ in cell["stages"])
        assert {*cell.get("settings", {}), *(key for _, given in cell["stages"] for key in given)} <= known
    printed = evaluation.PUBLISHED["ablations"]
    assert {c for c in declared["grids"]["pooling"] if not c.endswith("stage1")} <= printed.keys()
    assert {*declared["grids"]["stages"], *declared["grids"]["labels"]} <= printed.keys()
    assert printed["latent-bidirectional"]["mean"] == 72.31 and printed["labels"]["Clustering mean"] == 53.04


@pytest.fixture
def commands(suite, tmp_path, monkeypatch):
    """Commands of a grid are noted, and make what they are asked to; `failing` names one that does not."""
    ran, failing = [], []

    def make(line, **how):
        ran.append(line[1:])
        if failing and failing[0] in line:
            how["stdout"].write("error: no luck\n")
            how["stdout"].flush()
            return SimpleNamespace(returncode=2)
        out = Path(line[line.index("--out") + 1])
        if line[1] == "train.py":
            shutil.copytree(tmp_path / "model", out, dirs_exist_ok=True)
            (out / "model.safetensors").write_bytes((out / "recipe.json").read_bytes())
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / (Path(line[-1]).name + ".json")).write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(evaluation.subprocess, "run", make)
    declared = evaluation.read_json(ROOT / "data" / "ablations.json") | {"evaluation": ["--task=sts"]}
    read_json = evaluation.read_json
    monkeypatch.setattr(
        evaluation,
        "read_json",
        lambda path: declared if Path(path).name == "ablations.json" else read_json(path),
    )
    return ran, failing


def test_a_grid_shares_runs_and_goes_on(commands, tmp_path, monkeypatch, capsys):
    ran, failing = commands
    shown = run(monkeypatch, capsys, "--grid", "stages", "--jobs", "2")
    assert len(ran) == 3 * (2 + 1 + 1 + 2) and all(line[0] == "train.py" for line in ran)
    assert {
        "latent-bidirectional",
        "one-stage",
        "one-stage-in-batch",
        "reversed",
        "reversed, paper",
    } < shown.keys()
    assert "±" in shown["reversed"][0]
    ran.clear()
    assert run(monkeypatch, capsys, "--grid", "stages") == shown and not ran
    run(monkeypatch, capsys, "--grid", "labels")
    second = [line for line in ran if "2" in line]
    assert len(ran) == len(second) == 3  # stage 1 does not depend on the labels
    recipe = json.loads((tmp_path / "runs/ablations/labels/1/recipe.json").read_text())
    files = {Path(d["file"]).name for d in recipe["datasets"]}
    assert recipe["seed"] == 1 and {"trec_names.jsonl.gz", "topics_names.jsonl.gz"} <= files
    given = recipe["stages"]["2"]
    assert set(recipe["stages"]) == {"2"} and given["steps"] < 30 and not given["in_batch"]
    ran.clear()
    failing.append("naive")
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--grid", "mining")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "exit status 2: error: no luck" in error
    done = [line for line in ran if "naive" not in line]  # what had begun before the end was told
    failing.clear(), ran.clear()
    run(monkeypatch, capsys, "--grid", "mining")
    ran += done
    mined = [line for line in ran if line[0] == "mine.py"]
    assert (
        len(mined) == 6 and sum(line[0] == "train.py" for line in ran) == 18
    )  # once a rule, not once a seed
    used = [line[line.index("--mined") + 1] for line in ran if line[0] == "train.py"]
    assert all(used.count(folder) == 3 for folder in used)
    assert "one of" in evaluation_error(monkeypatch, capsys, "--grid", "poolings")


# ---- to look at


def test_search_ranks_the_documents_of_a_file(suite, tmp_path, monkeypatch, capsys):
    texts = [word + " in the sky" for word in TOPICS["sky"].split()] + ["a cat"]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out = run(
        monkeypatch, capsys, "--search", "moon in the sky", "--corpus", "docs.jsonl", "--model", "model"
    )
    lines = out.splitlines()
    assert lines[0] == "100.00  moon in the sky" and len(lines) == 6 and lines[-1].endswith("a cat")
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert (INSTRUCTION, ["moon in the sky"]) in suite.calls and ("", texts) in suite.calls
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n{"txt": "b"}')
    error = evaluation_error(
        monkeypatch, capsys, "--search", "x", "--corpus", "docs.jsonl", "--model", "model"
    )
    assert error == "error: docs.jsonl:2: field 'text': expected str\n"
    assert "--corpus" in evaluation_error(monkeypatch, capsys, "--search", "x", "--model", "model")


def test_drift_is_the_cosine_of_one_model_with_the_next(suite, tmp_path, monkeypatch, capsys):
    shutil.copytree(tmp_path / "model", tmp_path / "later")
    (tmp_path / "later" / "model.safetensors").write_bytes(b"more training")
    how = ("--task", "SQuAD", "--model", "model", "--model", "later", "--drift")
    run(monkeypatch, capsys, *how)
    monkeypatch.setattr(sys, "argv", ["eval.py", *how])
    evaluation.main()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("model -> later: mean cosine of ") and said.endswith(
        " 1.0000"
    )  # one fake for both


def test_pictures(released, tmp_path, monkeypatch, capsys):
    run_folder = tmp_path / "run"
    shutil.copytree(released, run_folder)
    log = [{"settings": {}}, {"step": 0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    (run_folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    how = [
        "--plot",
        str(run_folder),
        "--out",
        str(tmp_path),
        "--task",
        "sts",
        "--limit",
        "8",
        "--max-length",
        "64",
    ]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        error = evaluation_error(patch, capsys, *how)
    assert "error: --plot: expected the package matplotlib" in error
    run(monkeypatch, capsys, *how)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "plot.png"
    ).stat().st_size > 2e4
    error = evaluation_error(monkeypatch, capsys, "--plot", f"{run_folder}:mean", *how[2:])
    assert error.splitlines()[-1].startswith("error: --plot: no latents")
    (run_folder / "log.jsonl").unlink()
    error = evaluation_error(monkeypatch, capsys, *how)
    assert error.splitlines()[-1].startswith("error: --plot: ") and "log.jsonl" in error


def test_latent_map_is_the_attention_of_the_layer_unfolded(released):
    model = nvembed.NVEmbed.from_pretrained(released)
    tokens, most, weights = evaluation.latent_map(model, "cat 1")
    layer = model.latent_attention_model
    block, ids = layer.cross_attend_blocks[0], model.tokenize(["cat 1"])[0].ids
    with torch.no_grad():
        x = block.norm(model.embedding_model(torch.tensor(ids), (len(ids),), torch.float32))
        q = block.fn.to_q(x).unflatten(-1, (layer.heads, -1))
        k, _ = layer.keys_values(layer.latents)
        whole = (layer.scale * torch.einsum("sck,rck->scr", q, k)).softmax(dim=-1).mean(dim=1).numpy()
    assert len(tokens) == len(ids) == len(weights) and whole.sum(axis=1) == pytest.approx(1)
    np.testing.assert_allclose(weights, whole[:, most], atol=1e-5)
    assert whole.std(axis=0).max() > 1e-6 and set(most) == set(whole.sum(axis=0).argsort()[-48:])


def test_a_cut_base_is_one_name(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    asked = []
    monkeypatch.setattr(evaluation, "resolve", lambda name: asked.append(name) or str(tmp_path))
    assert evaluation.Encoder("smollm2:8:mean:causal").settings == {"pooling": "mean", "causal": True}
    assert evaluation.Encoder("smollm2:8").settings == {} and asked == ["smollm2:8"] * 2


def test_use_from_elsewhere_as_the_readme_says(base, tmp_path, monkeypatch):
    """mteb, FAISS and PEFT with a run of ours, by the README's own lines."""
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "part.README.md") if path.exists()]
    (code,) = re.findall(r"```python\n(import faiss.*?)```", "".join(texts), re.DOTALL)
    model = nvembed.NVEmbed.from_pretrained(base, max_position_embeddings=256)
    nvembed.add_lora(model, rank=2)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "runs/stage2", torch.float32)
    nvembed.save_adapter(model.eval(), tmp_path / "runs/stage2/adapter", base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.prepare.base", lambda: base)
    found = {}
    exec(code, found)
    assert -1 <= found["results"].task_results[0].get_score() <= 1
    wanted = found["model"].encode(["how deep is the Baikal?"], INSTRUCTION)
    documents = found["index"].reconstruct_n(0, 2)
    assert found["ids"][0, 0] == (wanted @ documents.T).argmax()
    assert found["scores"][0, 0] == pytest.approx((wanted @ documents.T).max(), abs=1e-5)
    ids = torch.tensor(model.tokenize(["cat 1"])[0].ids)
    model.config.causal = True
    for block in model.embedding_model.layers:
        block.c.causal = True
    with torch.no_grad():
        theirs = found["decoder"](ids[None]).last_hidden_state[0]
        torch.testing.assert_close(
            model.embedding_model(ids, (len(ids),), torch.float32), theirs, rtol=0, atol=1e-4
        )
