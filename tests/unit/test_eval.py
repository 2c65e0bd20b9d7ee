"""eval.py: mteb's numbers against ours, who is instructed, what is run again, the table."""

import gc
import gzip
import json
import math
import shlex
import shutil
import weakref
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from small_suite import CONFIG, TASKS, TOPICS, FakeModel, cells, error, local, output
from small_suite import suite  # noqa: F401

import data.tasks
import eval as evaluation
from data.files import read_json, write_json
from experiments import ablate

MODEL = ("--model", "model")


def shown(monkeypatch, capsys, *args):
    """python eval.py ARGS -> its table as {first cell: other cells}."""
    return cells(output(monkeypatch, capsys, *args))


# ---- scores


def ndcg_by_loops(model, split):
    """nDCG@10 from its definition, document by document."""
    total = 0.0
    for query in split["queries"]:
        relevant = split["relevant_docs"][query["id"]]
        q = model.embed(query["text"])
        scores = [(float(q @ model.embed(doc["text"])), doc["id"]) for doc in split["corpus"]]
        best = [doc for _, doc in sorted(scores, reverse=True)[:10]]
        gain = sum(relevant.get(doc, 0) / math.log2(rank + 2) for rank, doc in enumerate(best))
        ideal = sum(1 / math.log2(rank + 2) for rank in range(min(10, len(relevant))))
        total += gain / ideal
    return total / len(split["queries"])


def test_ndcg_equals_a_double_loop(suite, monkeypatch, capsys):
    row = shown(monkeypatch, capsys, "--task", "retrieval", *MODEL)["SQuAD"]
    split = local("SQuAD").dataset["default"]["test"]
    expected = ndcg_by_loops(suite, split)
    assert 0.2 < expected < 0.99 and row == ["ndcg_at_10", f"{100 * expected:.2f}"]
    monkeypatch.setattr(FakeModel, "embed", lambda self, text: np.eye(8)[len(text) % 8])
    assert abs(expected - ndcg_by_loops(suite, split)) > 0.1  # control: another model


def test_spearman_is_that_of_the_cosines(suite, monkeypatch, capsys):
    row = shown(monkeypatch, capsys, "--task", "sts", *MODEL)["WordSim353"]
    pairs = local("WordSim353").dataset["test"]
    cosines = [suite.embed(a) @ suite.embed(b) for a, b in zip(pairs["text1"], pairs["text2"])]
    expected = spearmanr(cosines, pairs["score"]).statistic
    assert row == ["cosine_spearman", f"{100 * expected:.2f}"] and abs(expected) > 0.01


def test_accuracy_is_the_share_of_right_predictions(suite, monkeypatch, capsys):
    """mteb's own predictions, as it saved them, against the labels."""
    row = shown(monkeypatch, capsys, "--task", "TREC", *MODEL)["TREC"]
    (saved,) = evaluation.Path("runs").rglob("TREC_predictions.json")
    experiments = read_json(saved)["default"]["test"]
    labels = local("TREC").dataset["test"]["label"]
    right = [guess == label for guesses in experiments for guess, label in zip(guesses, labels)]
    assert len(experiments) == 10 and len(right) == 10 * len(labels)
    assert row == ["accuracy", f"{100 * np.mean(right):.2f}"] and 0.4 < np.mean(right) < 0.999


def test_a_perfect_and_a_blind_model(suite, monkeypatch, capsys):
    """Of three labels of equal size a classifier that sees nothing guesses one."""
    places = {}
    for place, words in enumerate(TOPICS.values()):
        places.update(dict.fromkeys(words.split(), place))

    def perfect(self, text):
        return np.eye(3, dtype=np.float32)[places[text.split()[0]]]

    monkeypatch.setattr(FakeModel, "embed", perfect)
    rows = shown(monkeypatch, capsys, *MODEL, "--task", "TREC")
    rows |= shown(monkeypatch, capsys, *MODEL, "--task", "WikipediaTopics")
    assert rows["TREC"][1] == rows["WikipediaTopics"][1] == "100.00"
    monkeypatch.setattr(FakeModel, "embed", lambda self, text: np.eye(3, dtype=np.float32)[0])
    rows = shown(monkeypatch, capsys, *MODEL, "--task", "TREC", "--overwrite")
    assert rows["TREC"][1] == "33.33"


# ---- instructions


def test_queries_and_both_sides_of_symmetric_tasks_are_instructed(suite, monkeypatch, capsys):
    output(monkeypatch, capsys, *MODEL)
    given = data.tasks.LOCAL_INSTRUCTIONS
    squad = local("SQuAD").dataset["default"]["test"]
    assert (given["SQuAD"], list(squad["queries"]["text"])) in suite.calls
    bare = [texts for instruction, texts in suite.calls if not instruction]
    assert bare == [list(squad["corpus"]["text"])]  # documents, and nothing else, are bare
    pairs = local("WordSim353").dataset["test"]
    same = "Retrieve semantically similar text"
    sides = [texts for instruction, texts in suite.calls if instruction == same]
    assert sides == [list(pairs["text1"]), list(pairs["text2"])]
    assert given["TREC"] in dict(suite.calls) and given["WikipediaTopics"] in dict(suite.calls)


def test_perturbed_are_queries_and_symmetric_texts(suite, monkeypatch, capsys):
    output(monkeypatch, capsys, *MODEL, "--perturb", "case")
    squad = local("SQuAD").dataset["default"]["test"]
    pairs = local("WordSim353").dataset["test"]
    asked = [texts for _, texts in suite.calls]
    assert [text.upper() for text in squad["queries"]["text"]] in asked
    assert list(squad["corpus"]["text"]) in asked
    assert [text.upper() for text in pairs["text1"]] in asked
    suite.calls.clear()
    output(monkeypatch, capsys, *MODEL)
    assert suite.calls  # results of perturbed texts are kept apart


def test_results_of_some_dims_are_kept_apart(suite, monkeypatch, capsys):
    whole = output(monkeypatch, capsys, *MODEL)
    suite.calls.clear()
    some = output(monkeypatch, capsys, *MODEL, "--dims", "2")
    assert suite.calls and cells(some)["mean"] != cells(whole)["mean"]
    suite.calls.clear()
    assert output(monkeypatch, capsys, *MODEL, "--dims", "2") == some
    assert output(monkeypatch, capsys, *MODEL) == whole and not suite.calls
    message = error(monkeypatch, capsys, *MODEL, "--dims", "0")
    assert message == "error: --dims: expected a number in [1, inf), got 0"


# ---- models


def test_settings_behind_a_models_name(monkeypatch, tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    asked = []

    def resolve(name):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(evaluation, "resolve", resolve)
    cut = evaluation.Encoder("smollm2:8:mean:causal")  # a cut base is one name
    assert cut.settings == {"pooling": "mean", "causal": True}
    assert evaluation.Encoder("smollm2:8").settings == {} and asked == ["smollm2:8"] * 2
    quantized = evaluation.Encoder("run:bidirectional:int8")
    assert quantized.settings == {"causal": False, "quantize": "int8"} and asked[-1] == "run"
    given = []
    monkeypatch.setattr(
        evaluation.NVEmbed, "from_pretrained", lambda *args, **settings: given.append(settings)
    )
    assert quantized.model is None and given == [quantized.settings]


def test_int4_computes_in_bf16(suite):
    """On every machine; without int4 the dtype is the faster one."""
    assert evaluation.Encoder("model:int4").dtype == torch.bfloat16
    other = evaluation.Encoder("model:int8")
    assert other.dtype == evaluation.fast_dtype(other.device)


def test_one_model_is_in_memory_at_a_time(suite, tmp_path, monkeypatch):
    """Two of 7B would not fit: the first has gone when the second is loaded."""
    shutil.copytree("model", "other")
    loads, made, alive = [], [], []

    def load(path, *args, **settings):
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        loads.append(path)
        model = FakeModel()
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluation.NVEmbed, "from_pretrained", load)
    first, second = evaluation.Encoder("model"), evaluation.Encoder("other")
    assert not loads  # made, not loaded
    for encoder in (first, first, second, first):
        encoder.model  # noqa: B018
    assert loads == ["model", "other", "model"]
    assert alive == [0, 0, 0]


def test_where_results_are_stored(suite, monkeypatch, capsys):
    """By the content of the model and what else a result depends on."""
    output(monkeypatch, capsys, "--model", "model:mean:causal", "--task", "sts", "--limit", "9")
    (path,) = evaluation.Path("runs/results").rglob("WordSim353.json")
    dtype = str(evaluation.Encoder("model").dtype).removeprefix("torch.")
    assert path.parts[2:] == (
        "nvembed__model",
        "d5a6f0220cf35d25",
        "experiments",
        f"causal_True__dtype_{dtype}__limit_9__max_length_512__pooling_mean",
        "WordSim353.json",
    )


def test_bm25_stands_beside_models_where_it_can(suite, monkeypatch, capsys):
    rows = shown(monkeypatch, capsys, *MODEL, "--model", "bm25")
    assert float(rows["SQuAD"][2]) > 70  # queries are words of the document
    assert rows["TREC"][2] == rows["mean"][2] == "-"
    assert rows["Retrieval mean"][2] == rows["SQuAD"][2]
    only = ("--model", "bm25", "--task", "SQuAD")
    small = shown(monkeypatch, capsys, *only, "--limit", "2")
    again = shown(monkeypatch, capsys, *only)
    assert again["SQuAD"][1] == rows["SQuAD"][2] != small["SQuAD"][1]  # kept apart


def test_bm25_without_its_packages(suite, monkeypatch, capsys):
    def missing(name):
        raise ImportError("BM25Search requires the `bm25s` library")

    monkeypatch.setattr(mteb, "get_model", missing)
    message = error(monkeypatch, capsys, "--model", "bm25")
    assert message.startswith("error: --model bm25: needs bm25s and PyStemmer: BM25Search requires")


def test_bad_input(suite, monkeypatch, capsys):
    out = output(monkeypatch, capsys, "--task", "reranking", *MODEL)
    assert out.count("\n") == 1 and out.startswith("reranking: no set") and not suite.calls
    assert "Reranking" in error(monkeypatch, capsys, *MODEL, "--task", "rerank")
    assert "--suite MTEBB: " in error(monkeypatch, capsys, *MODEL, "--suite", "MTEBB")
    message = error(monkeypatch, capsys, "--model", "model:max")
    assert "--model model:max: expected model, then none or some of ['latent', " in message
    message = error(monkeypatch, capsys, "--model", "absent/model")
    assert "model 'absent/model': not a folder" in message
    message = error(monkeypatch, capsys, *MODEL, "--suite", "BEIR", "--limit", "3")
    assert "--limit: expected the local suite" in message
    message = error(monkeypatch, capsys)
    assert "--model: expected a folder or hub id; there is no runs/stage1 or stage2" in message
    assert not suite.calls


ODD = [  # arguments, words of the one line
    (("--model", ""), "model: expected a folder or hub id, got ''"),
    (("--model", ":mean"), "model: expected a folder or hub id, got ''"),
    (("--model", "eval/sts.jsonl.gz"), "expected a folder, got a file"),
    ((*MODEL, "--limit", "1"), "--limit: expected a number in [2, inf), got 1"),
    ((*MODEL, "--limit", "-1"), "--limit: expected a number in [2, inf), got -1"),
    ((*MODEL, "--limit", "x"), "argument --limit: invalid int value: 'x'"),
    ((*MODEL, "--max-length", "0"), "--max-length: expected a number in [1, inf), got 0"),
    ((*MODEL, "--dtype", "int8"), "argument --dtype: invalid choice"),
    ((*MODEL, "--colour", "red"), "unrecognized arguments: --colour red"),
    ((*MODEL, "--out", "eval/sts.jsonl.gz"), "File exists"),
    ((*MODEL, "--suite", "empty"), "empty: expected SPLIT_qrels.jsonl"),
    ((*MODEL, "--model", "empty"), "empty/config.json: "),  # a run that is not finished
    ((*MODEL, "--dims", "9"), "dims: expected from 1 to 8, the width of a vector, got 9"),
    ((*MODEL, "--max-length", "99999"), "max_length: expected from 1 to 32768"),
    ((*MODEL, "--model", "model:int4", "--dtype", "float32"), "expected bfloat16 for int4"),
    (("--model", "adapter"), "expected an adapter that says how to pool"),
    (("--model", "bm25", "--perturb", "case"), "--model bm25: expected no --perturb"),
]


@pytest.mark.parametrize(("args", "words"), ODD, ids=str)
def test_odd_arguments_are_one_line(args, words, suite, monkeypatch, capsys):
    evaluation.Path("empty").mkdir()
    write_adapter("adapter", "model")
    assert words in error(monkeypatch, capsys, "--task", "sts", *args)
    assert not suite.calls


def write_adapter(folder, base):
    folder = evaluation.Path(folder)
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": base})
    (folder / "adapter_model.safetensors").write_bytes(b"weights of an adapter")


def test_results_of_an_adapter_depend_on_its_base(suite, monkeypatch, capsys):
    """It is refused where neither says how to pool; told how, it is one more model."""
    write_adapter("adapter", "model")
    how = ("--task", "sts", "--model", "adapter:mean:causal")

    def encodes():
        suite.calls.clear()
        output(monkeypatch, capsys, *how)
        return len(suite.calls)

    assert encodes() == 2
    assert encodes() == 0
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        evaluation.Path(file).write_bytes(b"other weights")
        assert encodes() == 2
        assert encodes() == 0
    write_json("model/config.json", CONFIG | {"pooling": "eos"})
    output(monkeypatch, capsys, "--task", "sts", "--model", "adapter")  # now its base says how


def test_results_of_a_clone_of_e5_depend_on_its_pooling(suite, monkeypatch, capsys):
    """1_Pooling is neither a run by seed nor left out of what the model is."""
    evaluation.Path("model/1_Pooling").mkdir()
    write_json("model/1_Pooling/config.json", {"pooling_mode": "lasttoken"})
    path = evaluation.Path("model/modules.json")
    kind = "sentence_transformers.models.Pooling"
    path.write_text(json.dumps([{"idx": 1, "name": "1", "path": "1_Pooling", "type": kind}]))
    first = evaluation.Encoder("model")
    assert not first.is_peer
    assert ablate.runs_by_seed("model:int8") == ["model:int8"]
    write_json("model/1_Pooling/config.json", {"pooling_mode": "mean"})
    again = evaluation.Encoder("model").mteb_model_meta.revision
    assert again != first.mteb_model_meta.revision
    assert evaluation.Encoder("model").mteb_model_meta.revision == again


def examples(text, command):
    """The examples of a help text: lists of arguments, without the command."""
    lines = [line.strip() for line in text.splitlines() if f" {command}" in line]
    words = [
        shlex.split(line, comments=True) for line in lines if line.startswith(("py", "torchr"))
    ]
    return [line[line.index(command) + 1 :] for line in words]


def test_examples_of_the_help_run(suite, monkeypatch, capsys):
    """Each with the fake model in every place, the benchmark's with the small sets."""
    shutil.copytree("model", "runs/stage2")
    monkeypatch.setattr(evaluation, "resolve", lambda name: "model")
    small = SimpleNamespace(tasks=data.tasks.local_tasks())
    monkeypatch.setattr(data.tasks.mteb, "get_benchmark", lambda name: small)
    found = examples(evaluation.__doc__, "eval.py")
    assert len(found) == 3
    for number, args in enumerate(found):
        rows = shown(monkeypatch, capsys, *args, "--out", f"out{number}")
        assert "mean" in rows
    assert rows["task"][1].startswith("nvidia/NV-Embed-v2")
    assert examples("x\n    python eval.py --a 'b c'  # d\n", "eval.py") == [["--a", "b c"]]


def test_the_last_run_is_the_default(suite, monkeypatch, capsys):
    for run in ("runs/stage1", "runs/stage2"):
        shutil.copytree("model", run)
        rows = shown(monkeypatch, capsys, "--task", "sts")
        assert rows["task"] == ["main score x 100", run]


# ---- results that are there


def test_only_what_is_missing_or_stale_is_run(suite, monkeypatch, capsys):
    def encodes(*args):
        suite.calls.clear()
        output(monkeypatch, capsys, *MODEL, *args)
        return len(suite.calls)

    assert encodes("--task", "sts") == 2
    assert encodes("--task", "sts") == 0  # its result is there
    # queries and documents, training and test texts, texts; not the pairs
    assert encodes("--task", "all") == 2 + 2 + 1
    assert encodes("--task", "all") == 0
    assert encodes("--task", "sts", "--overwrite") == 2
    assert encodes("--task", "sts", "--limit", "5") == 2
    assert encodes("--task", "sts") == 0  # kept apart
    assert encodes("--task", "sts", "--max-length", "64") == 2

    weights = evaluation.Path("model/model.safetensors")
    first = weights.read_bytes()
    weights.write_bytes(b"weights of another training")  # of the same size
    assert encodes("--task", "sts") == 2
    weights.write_bytes(first)
    assert encodes("--task", "sts") == 0  # the first training's result is still its own

    with gzip.open("eval/sts.jsonl.gz", "at") as file:
        file.write('\n{"text1": "cat 1", "text2": "dog 2", "score": 1.0}')
    assert encodes("--task", "sts") == 2  # other data


def test_a_killed_evaluation_goes_on(suite, monkeypatch, capsys):
    whole = output(monkeypatch, capsys, *MODEL, "--out", "whole")
    asked = [texts for _, texts in suite.calls]
    encode = FakeModel.encode

    def killed(self, *args, **kwargs):
        if len(self.calls) == 4:
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    suite.calls.clear()
    monkeypatch.setattr(FakeModel, "encode", killed)
    with pytest.raises(SystemExit) as exit:
        output(monkeypatch, capsys, *MODEL)
    assert exit.value.code == 130
    assert [texts for _, texts in suite.calls] == asked[:4]
    suite.calls.clear()
    monkeypatch.setattr(FakeModel, "encode", encode)
    assert output(monkeypatch, capsys, *MODEL) == whole
    assert [texts for _, texts in suite.calls] == asked[4:]  # the first two tasks took four


@pytest.mark.parametrize("name", ("WordSim353.json", "WordSim353_predictions.json"))
def test_a_half_written_result_is_made_again(suite, monkeypatch, capsys, name):
    """As by a kill while mteb writes it, or a full disk; so is one whose predictions are gone."""
    how = (*MODEL, "--task", "sts")
    whole = output(monkeypatch, capsys, *how)
    (path,) = evaluation.Path("runs").rglob(name)
    content = path.read_text()
    suite.calls.clear()
    path.write_text(content[: len(content) // 2])
    assert output(monkeypatch, capsys, *how) == whole
    assert len(suite.calls) == 2
    assert read_json(path).keys() == json.loads(content).keys()
    if "predictions" in name:
        path.unlink()
        assert output(monkeypatch, capsys, *how) == whole


def test_other_languages_in_a_stored_result_do_not_count(suite, monkeypatch, capsys):
    """A suite of many languages stores a task under the name that a suite of one has."""
    how = (*MODEL, "--task", "sts")
    whole = output(monkeypatch, capsys, *how)
    (path,) = evaluation.Path("runs").rglob("WordSim353.json")
    result = read_json(path)
    (score,) = result["scores"]["test"]
    other = score | {"hf_subset": "zh", "languages": ["zho-Hans"], "main_score": 0.9}
    write_json(path, result | {"scores": {"test": [score, other]}})
    suite.calls.clear()
    assert output(monkeypatch, capsys, *how) == whole
    assert not suite.calls


# ---- the table


def test_equal_models_differ_by_nothing_and_unequal_ones_by_more(suite, monkeypatch, capsys):
    shutil.copytree("model", "copy")
    weights = evaluation.Path("copy/model.safetensors")
    weights.write_bytes(b"other bytes, same fake model")
    both = (*MODEL, "--model", "copy")
    rows = shown(monkeypatch, capsys, *both)
    assert rows["task"][-1] == "last - first [95 %]"
    assert all(rows[task][-1] == "+0.00 [+0.00, +0.00]" for task in (*TASKS, "mean"))

    weights.write_bytes(b"a poor model")
    poor = np.eye(8, dtype=np.float32)
    monkeypatch.setattr(FakeModel, "embed", lambda self, text: poor[len(text) % 8])
    rows = shown(monkeypatch, capsys, *both)
    for task in TASKS:
        _, first, last, difference = rows[task]
        low, high = interval(difference)
        assert low < float(last) - float(first) < high
        assert high < 0 or task != "SQuAD"  # the other sets are too small to tell


def interval(difference):
    """ "+1.00 [-0.50, +2.50]" -> (-0.5, 2.5)"""
    return [float(x) for x in difference.split("[")[1].rstrip("]").split(",")]


def named(*names, kind="Retrieval"):
    metadata = {"type": kind, "main_score": "x"}
    return [SimpleNamespace(metadata=SimpleNamespace(name=name, **metadata)) for name in names]


def rows_of(monkeypatch, tasks, scores):
    """What `evaluate` makes of scores (tasks, 1 + RESAMPLES)."""
    by_task = dict(zip([task.metadata.name for task in tasks], scores))
    monkeypatch.setattr(evaluation, "score_task", lambda task, *args: by_task[task.metadata.name])
    return evaluation.evaluate(None, tasks, SimpleNamespace(out="runs", overwrite=False))


def test_interval_of_a_mean_is_narrower_than_those_of_its_tasks(monkeypatch):
    """Four tasks with independent deviations of size 1: half the width for their mean."""
    tasks = named("t0", "t1", "t2", "t3")
    deviations = np.random.default_rng(0).standard_normal((4, 20000))
    a = np.full((4, 20001), 50.0)
    b = 51.0 + np.hstack([np.zeros((4, 1)), deviations])
    found = {name: rows_of(monkeypatch, tasks, scores) for name, scores in (("a", a), ("b", b))}
    last = {row: line[-1] for row, line in cells(evaluation.table(tasks, found, {})).items()}
    assert last["t0"].startswith("+1.00 [")
    assert interval(last["t0"]) == pytest.approx([1 - 1.96, 1 + 1.96], abs=0.06)
    for row in ("Retrieval mean", "mean"):
        assert interval(last[row]) == pytest.approx([1 - 0.98, 1 + 0.98], abs=0.04)

    tasks += named("hub", kind="STS")  # of a benchmark: it has no bootstrap
    alone = np.full((1, 20001), np.nan)
    alone[0, 0] = 1.0
    found = {}
    for name, scores in (("a", [*a, *alone]), ("b", [*b, *(1 + alone)])):
        found[name] = rows_of(monkeypatch, tasks, scores)
    last = {row: line[-1] for row, line in cells(evaluation.table(tasks, found, {})).items()}
    assert last["hub"] == last["mean"] == "+1.00" and "[" in last["t0"]


def test_published_scores_are_those_of_the_56_tasks_and_stand_beside_ours(monkeypatch):
    suite_name = "MTEB(eng, v1)"
    tasks = mteb.get_benchmark(suite_name).tasks
    peers = evaluation.PUBLISHED["suites"][suite_name]
    second = peers["NV-Embed-v2"]
    names = {task.metadata.name for task in tasks}
    assert names == {name for name in second if not name.endswith("mean")} and len(names) == 56
    for kind in {task.metadata.type for task in tasks}:  # the printed means are those of the tasks
        scores = [second[task.metadata.name] for task in tasks if task.metadata.type == kind]
        assert np.mean(scores) == pytest.approx(second[f"{kind} mean"], abs=0.03), kind
    mean = np.mean([second[name] for name in names])
    assert mean == pytest.approx(second["mean"], abs=0.03)

    ours = np.full((56, 51), np.nan)
    ours[:, 0] = [second[task.metadata.name] + 1.5 for task in tasks]
    found = {"ours": rows_of(monkeypatch, tasks, ours)}
    rows = cells(evaluation.table(tasks, found, peers))
    assert rows["task"][1:4] == ["ours", "NV-Embed-v1", "NV-Embed-v2"]
    assert rows["task"][4:] == ["last - NV-Embed-v1", "last - NV-Embed-v2"]
    assert rows["ArguAna"] == ["ndcg_at_10", "71.57", "-", "70.07", "-", "+1.50"]
    assert rows["mean"][2:4] == ["69.32", "72.31"]
    assert float(rows["mean"][1]) == pytest.approx(73.81, abs=0.02)
    assert float(rows["mean"][4]) == pytest.approx(4.49, abs=0.02)
    assert rows["Reranking mean"][2:4] == ["60.59", "60.65"]


def test_columns_are_aligned():
    table = evaluation.markdown([["task", "a"], ["SQuAD", "66.41 ± 1.00"]])
    assert table == "| task  | a            |\n| ----- | ------------ |\n| SQuAD | 66.41 ± 1.00 |"
