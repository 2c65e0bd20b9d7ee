"""train.py as a user runs it: log, stages, finished runs, own rows, bad input.

Commands run in this process, on rows of random words that a tiny random base can embed.
"""

import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import references
import torch
import transformers
from helpers import FILES, WORDS, command, log, log_head, settings, some_rows, told
from safetensors.torch import load_file

import train
from data import files, sampling
from data.files import write_rows
from data.runs import checkpoint
from nvembed import NVEmbed

# ---- a run


def test_log(whole):
    head, lines = log_head(whole), log(whole)
    assert {"versions", "hardware", "commit", "settings"} <= head.keys()
    assert head["settings"]["steps"] == 10
    assert [line["step"] for line in lines] == list(range(11))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 5, 10]
    assert lines[10]["held_out_loss"] < lines[0]["held_out_loss"]  # it learns
    figures = {"loss", "accuracy", "lr", "grad_norm"}
    figures |= {"tokens_per_s", "share_of_peak", "memory_gib", "seconds_left"}
    for line in lines[1:]:
        assert figures <= line.keys()
        assert 0 < line["share_of_peak"] < 1.5
        assert line["memory_gib"] > 0.01


def test_kept_models(recipe, tmp_path):
    """--keep: a model for each checkpoint; the last one is the run's own, the first another."""
    run = tmp_path / "run"
    flags = ("--save-every", "5", "--keep", "--dtype", "float32", "--export-dtype", "float32")
    assert command(recipe, *flags, "--out", run)[0] == 0
    names = ("kept_000005", "kept_000010", ".")
    models = [NVEmbed.from_pretrained(run / name) for name in names]
    early, late, final = [model.encode(["the sun", "rises"]) for model in models]
    assert abs(late - final).max() <= 1e-6
    assert abs(early - final).max() > 1e-3


def test_finished_run_loads(whole, base):
    texts = ["a river", "the doctor's letter", "music of the winter"]
    model = train.build(whole, settings(), "cpu")[0].eval()
    adapted = model.encode(texts, "Find it")
    plain = NVEmbed.from_pretrained(base).encode(texts, "Find it")
    loaded = NVEmbed.from_pretrained(whole).encode(texts, "Find it")
    assert (loaded * adapted).sum(axis=1).min() >= 0.9999 > (plain * adapted).sum(axis=1).max()
    theirs = transformers.AutoModel.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32
    )
    ids = [t.ids for t in model.tokenize(texts)]
    untrained = references.hf_states(theirs, ids, causal=False)
    oracle = peft.PeftModel.from_pretrained(theirs, whole / "adapter").eval()
    states = references.hf_states(oracle, ids, causal=False)
    for text, found, before in zip(ids, states, untrained, strict=True):
        with torch.no_grad():
            ours = model.embedding_model(torch.tensor(text), (len(text),), torch.float32)
        assert (found[: len(text)] - ours).abs().max() <= 1e-4
        assert (before[: len(text)] - ours).abs().max() > 1e-4  # control


def lowest_cosine(out):
    return float(out.split("lowest ")[1].split()[0])


def test_export_prints_the_cosine(recipe, unexported, tmp_path):
    code, out, err = command(recipe, "--out", unexported)
    assert code == 0, err
    assert lowest_cosine(out) >= 0.9999
    half = tmp_path / "half"
    code, out, _ = command(recipe, "--out", half, "--steps", 1, "--export-dtype", "bfloat16")
    assert code == 0
    assert 0.999 <= lowest_cosine(out) < 1  # control: rounding shows
    dtypes = {t.dtype for t in load_file(half / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


# ---- stages


def test_another_rank_goes_on_from_the_merged_model(whole, base):
    """The same rank: own adapters on the base. None or another one: the run's merged weights."""
    texts, same = ["river stone", "a letter from the island"], settings().lora_rank
    expected = NVEmbed.from_pretrained(whole, dtype=torch.float32).encode(texts)
    for lora_rank, start in ((same, base), (0, whole), (same + 1, whole)):
        model, found = train.build(whole, settings(lora_rank=lora_rank), "cpu")
        assert found == str(start)
        np.testing.assert_allclose(model.eval().encode(texts), expected, atol=1e-6)
        weight = "embedding_model.layers.0.self_attn.q_proj.weight"
        assert (weight in train.trained(model)) == (lora_rank == 0)
    plain = NVEmbed.from_pretrained(base, dtype=torch.float32).encode(texts)
    assert np.abs(plain - expected).max() > 1e-3


def start_of(init):
    """What is trained, before its first step -> ({name: tensor}, name of the base)."""
    model, name = train.build(init, settings(), "cpu")
    return {n: p.detach() for n, p in train.trained(model).items()}, name


def test_stage_two_goes_on_with_stage_one(recipe, whole, base, tmp_path, monkeypatch):
    stored = load_file(checkpoint(whole) / FILES[0])
    ours, name = start_of(whole)
    assert name == str(base)
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[n], stored[n]) for n in ours)
    fresh, _ = start_of(base)
    assert not any(torch.equal(ours[n], fresh[n]) for n in ours)  # control
    two = tmp_path / "two"
    stage = ("--stage", 2, "--init", whole)
    code, _, err = command(recipe, *stage, "--out", two, "--steps", 2, "--in-batch")
    assert code == 0, err
    before_its_first_step = log(two)[0]["held_out_loss"]
    assert before_its_first_step == log(whole)[-1]["held_out_loss"]
    optimizer = load_file(checkpoint(two) / FILES[1])
    steps = {float(t) for n, t in optimizer.items() if n.endswith(".step")}
    assert steps == {2.0}  # begun anew
    assert json.loads((checkpoint(two) / FILES[2]).read_text())["base"] == str(base)


BEFORE = (
    (2, "runs/stage1: no finished run; run --stage 1 first"),
    (3, "runs/pruned: no finished run; run experiments/compress.py first"),
)


@pytest.mark.parametrize(("stage", "message"), BEFORE)
def test_a_stage_needs_the_one_before(recipe, tmp_path, monkeypatch, stage, message):
    monkeypatch.chdir(tmp_path)
    found = json.loads(recipe.read_text())
    found["stages"]["3"] = {}
    recipe = recipe.parent / "three_stages.json"
    recipe.write_text(json.dumps(found))
    assert message in told(command(recipe, "--stage", stage))
    assert not (tmp_path / "runs").exists()


def test_stages_by_their_default_folders(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in (1, 2):
        code, _, err = command(recipe, "--stage", stage, "--steps", 1)
        assert code == 0, err
        assert (tmp_path / "runs" / f"stage{stage}" / "config.json").exists()
    heads = [log_head(Path("runs", f"stage{n}"))["settings"] for n in (1, 2)]
    assert [head["in_batch"] for head in heads] == [True, False]


# ---- own rows


def test_own_rows_from_a_released_model(recipe, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row | {"prompt": "Mine"} for row in some_rows(20, 1)]
    write_rows(tmp_path / "my.jsonl.gz", rows)
    flags = ("--data", "my.jsonl.gz", "--init", released, "--steps", 2)
    code, _, err = command(recipe, *flags)
    assert code == 0, err
    run = tmp_path / "runs" / "my"
    assert NVEmbed.from_pretrained(run).encode(["a river"]).shape == (1, 64)
    start = references.read_released(released)["latent_attention_model.latents"]
    stored = load_file(checkpoint(run) / FILES[0])["latent_attention_model.latents"]
    moved = (stored - start).norm()
    assert 0 < moved < 0.2 * start.norm()  # the released pooling layer, two steps on


def test_mined_rows_are_used(recipe, tmp_path):
    mined = tmp_path / "mined"
    mined.mkdir()
    write_rows(mined / "rows.jsonl", some_rows(40, 3))
    flags = ("--steps", 1, "--mined")
    code, out, err = command(recipe, "--out", tmp_path / "run", *flags, mined)
    assert code == 0, err
    assert f"rows of {mined / 'rows.jsonl'}" in out
    assert "no/such" in told(command(recipe, "--out", tmp_path / "odd", *flags, "no/such"))


def test_mined_rows_have_to_be_those_of_the_set(recipe, tmp_path):
    """A file of that name that was mined from other rows, or none at all, is refused."""
    (tmp_path / "mined").mkdir()
    write_rows(tmp_path / "mined/rows.jsonl", some_rows(40, 3))
    report = tmp_path / "mined/rows.jsonl.json"
    flags = ("--steps", 1, "--out", tmp_path / "run", "--mined")
    report.write_text(json.dumps({"plan": {"sha256": "0123456789abcdef"}}))
    line = told(command(recipe, *flags, tmp_path / "mined"))
    assert "mined/rows.jsonl: was mined from other rows than those of" in line
    (tmp_path / "empty").mkdir()
    line = told(command(recipe, *flags, tmp_path / "empty"))
    assert "expected a file of a data set's name in it, found none" in line
    digest = files.digest(recipe.parent / "rows.jsonl")
    report.write_text(json.dumps({"plan": {"sha256": digest}}))
    assert command(recipe, *flags, tmp_path / "mined")[0] == 0  # control


def test_nothing_to_learn_from(recipe, tmp_path):
    """Without in-batch negatives and without hard ones every loss is 0."""
    rows = [row | {"neg": []} for row in some_rows(40)]
    write_rows(tmp_path / "my.jsonl", rows)
    flags = ("--data", tmp_path / "my.jsonl", "--out", tmp_path / "run", "--steps", 1)
    line = told(command(recipe, *flags, "--no-in-batch"))
    assert "in_batch is off: expected rows with negatives, got none" in line
    line = told(command(recipe, "--no-in-batch", "--negatives", 0, "--out", tmp_path / "run"))
    assert "negatives: expected 1 or more, as in_batch is off, got 0" in line
    assert not (tmp_path / "run").exists()
    assert command(recipe, *flags)[0] == 0  # control


def test_own_rows_do_not_take_a_stages_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "stage1.jsonl", some_rows(40))
    line = told(command(recipe, "--data", "stage1.jsonl", "--steps", 1))
    assert "--data stage1.jsonl: expected --out: runs/stage1 is a stage's" in line
    assert not (tmp_path / "runs").exists()
    assert command(recipe, "--data", "stage1.jsonl", "--steps", 1, "--out", "runs/my")[0] == 0


# ---- bad input


def test_nan_stops_with_rows_and_checkpoint(recipe, tmp_path, monkeypatch):
    true_step, true_loss = train.train_step, train.batch_loss
    steps = []

    def counted(*args):
        steps.append(1)
        return true_step(*args)

    def broken(*args):
        loss, accuracy = true_loss(*args)
        return loss * (math.nan if len(steps) == 4 else 1), accuracy

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(train, "batch_loss", broken)
    run = tmp_path / "run"
    line = told(command(recipe, "--out", run))
    entry = {
        "name": "rows",
        "file": str(recipe.parent / "rows.jsonl"),
        "instruction": "",
        "stages": [1],
    }
    (data,) = sampling.read_datasets([entry], 1, settings())
    places = sampling.schedule([36], settings(), 3)
    numbers = [data.rows.where(i).rpartition(":")[2] for _, _, i in places]
    rows = f"rows: {entry['file']} lines {', '.join(numbers)}"
    assert "step 4 " in line
    assert "not finite" in line
    assert rows in line
    assert line.endswith(f"last checkpoint: {run / 'step_000002'}")
    for name in FILES[:2]:
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint(run) / name).values())
    monkeypatch.undo()
    assert command(recipe, "--out", run)[0] == 0


BAD_FLAGS = [
    (["--micro-tokens", 5], "expected at least"),
    (["--pooling", "max"], "field 'pooling'"),
    (["--batching", "odd"], "batching: expected blended or task"),
    (["--batching", "task", "--batch", 37], "batch: expected at most 36"),
    (["--batch", 37], "batch: expected at most 36"),
    (["--batch", 0], "--batch: expected a number in [1, inf), got 0"),
    (["--lora-rank", -1], "--lora-rank: expected a number in [0, inf), got -1"),
    (["--negatives", -1], "--negatives: expected a number in [0, inf), got -1"),
    (["--lora-dropout", 1], "--lora-dropout: expected a number in [0, 1), got 1.0"),
    (["--lr", "nan"], "--lr: expected a number in [0, inf), got nan"),
    (["--steps", 0], "--steps: expected a number in [1, inf), got 0"),
    (["--save-every", 0], "--save-every: expected a number in [1, inf), got 0"),
    (["--temperature", -1], "--temperature: expected a number in (0, inf), got -1.0"),
    (["--clip", 0], "--clip: expected a number in (0, inf], got 0.0"),
    (["--warmup", -5], "--warmup: expected a number in [0, inf), got -5"),
    (["--teacher", "no/such"], "--teacher: expected --distill above 0"),
    (["--keep-zeros"], "keep_zeros: expected lora_rank 0, got 4"),
    (["--tensorboard", "board"], "expected the package tensorboard"),
    (["--dtype", "float16"], "dtype: expected one of ('auto', 'float32', 'bfloat16'), got"),
    (
        ["--export-dtype", "int7"],
        "dtype: expected one of ('auto', 'float32', 'bfloat16', 'float16'), got",
    ),
    (["--seed", 10**20], "--seed: expected a number in [0, 1e18)"),
    (["--init", "no/such"], "model 'no/such'"),
    (["--distill", 1.0, "--teacher", "no/such"], "model 'no/such'"),
    (["--data", "no.jsonl"], "no.jsonl"),
    (["--recipe", "no.json"], "no.json"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_bad_flags(recipe, tmp_path, flags, message):
    assert message in told(command(recipe, "--out", tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


BAD_ARGUMENTS = (
    (["--nonsense", 1], "unrecognized arguments: --nonsense"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--stage", 4], "--stage: invalid choice: 4"),
)


@pytest.mark.parametrize(("flags", "message"), BAD_ARGUMENTS)
def test_bad_arguments(recipe, tmp_path, flags, message):
    assert message in told(command(recipe, "--out", tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_budget_below_a_text_is_found_before_training(recipe, tmp_path):
    file = str(recipe.parent / "rows.jsonl")
    entry = {"name": "rows", "file": file, "instruction": "", "stages": [1]}
    (data,) = sampling.read_datasets([entry], 1, settings())
    (_, _, i), *_ = sampling.schedule([36], settings(), 8)  # of the last step of an epoch
    rows = some_rows(40)
    late = next(row for row in rows if row["query"] == data.rows[i]["query"])
    late["neg"] = [" ".join(WORDS * 5)] * 2
    own = tmp_path / "rows.jsonl"
    write_rows(own, rows)
    flags = ("--data", own, "--out", tmp_path / "run", "--micro-tokens", 40)
    assert "expected at least" in told(command(recipe, *flags))
    assert not (tmp_path / "run" / "latest").exists()


@pytest.mark.parametrize("words", (40, 400))
def test_a_prompt_that_leaves_no_room(recipe, tmp_path, words):
    """Found before the first step; one that just fits is no error."""
    rows = some_rows(40)
    rows[17]["prompt"] = "x " * (words // 2)
    own = tmp_path / "my.jsonl"
    write_rows(own, rows)
    flags = ("--data", own, "--out", tmp_path / "run", "--steps", 1, "--max-length", 64)
    if words == 400:
        line = told(command(recipe, *flags))
        assert f"{own}:18: field 'prompt': max_length 64: tokens ['" in line
        assert not (tmp_path / "run" / "log.jsonl").exists()
    else:
        assert command(recipe, *flags)[0] == 0


BAD_SETTINGS = [
    ("stepz", 3, "stages.1: unknown setting 'stepz'"),
    ("steps", "3", "stages.1.steps: expected int, got '3'"),
    ("steps", 3.5, "stages.1.steps: expected int, got 3.5"),
    ("in_batch", 1, "stages.1.in_batch: expected bool, got 1"),
    ("steps", True, "stages.1.steps: expected int, got True"),
    ("dims", 64, "stages.1.dims: expected a list of int, got 64"),
    ("dims", [8, 2.5], "stages.1.dims: expected a list of int, got [8, 2.5]"),
    ("dims", [8, True], "stages.1.dims: expected a list of int, got [8, True]"),
    ("dims", [8, 0], "stages.1.dims: expected a number in [1, inf), got 0"),
    ("kd", -1, "stages.1.kd: expected a number in [0, inf), got -1"),
    ("kd_temperature", 0, "stages.1.kd_temperature: expected a number in (0, inf), got 0"),
    ("false_negatives", -0.1, "stages.1.false_negatives: expected a number in [0, 2], got -0.1"),
    ("steps", 0, "stages.1.steps: expected a number in [1, inf), got 0"),
    ("temperature", -1, "stages.1.temperature: expected a number in (0, inf), got -1"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_SETTINGS)
def test_bad_stage_setting(recipe, tmp_path, name, value, message):
    found = json.loads(recipe.read_text())
    found["stages"]["1"][name] = value
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(found))
    line = told(command(path, "--out", tmp_path / "run"))
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_kd_needs_scores(recipe, tmp_path):
    """One row with scores will do, if only for a part of the batches."""
    own, run = tmp_path / "my.jsonl", tmp_path / "run"
    flags = ("--data", own, "--held-out", 0, "--steps", 3, "--kd", 1)
    rows = some_rows(12)
    rows[0]["pos_scores"] = [1.0]  # not of all its documents
    write_rows(own, rows)
    line = told(command(recipe, *flags, "--out", run))
    assert line == "error: kd: expected rows with pos_scores and neg_scores, got none"
    rows[0]["neg_scores"] = [0.5, 1]
    write_rows(own, rows)
    losses = []
    for kd in ((), ("--kd", 0), ("--kd-temperature", 0.1)):
        out = tmp_path / str(len(losses))
        code, _, err = command(recipe, *flags, *kd, "--out", out)
        assert code == 0, err
        losses.append(np.array([line["loss"] for line in log(out)[1:]]))
    assert (losses[0] != losses[1]).any() and (losses[0] != losses[2]).any()


def test_dims_by_flag(recipe, tmp_path):
    """Flags override the recipe's list; none at all is an empty one. A run keeps its own."""
    found = json.loads(recipe.read_text())
    found["stages"]["1"]["dims"] = [16]
    path = recipe.with_name("dims.json")
    path.write_text(json.dumps(found))
    losses = {}
    for name, flags, dims in (
        ("recipe", (), [16]),
        ("flag", ("--dims", 8, 32), [8, 32]),
        ("none", ("--dims",), []),
    ):
        out = ("--out", tmp_path / name, "--steps", 2)
        code, _, err = command(path, *out, *flags)
        assert code == 0, err
        assert log_head(tmp_path / name)["settings"]["dims"] == dims
        assert command(path, *out, *flags)[0] == 0  # finished
        losses[name] = log(tmp_path / name)[1]["loss"]
    assert len(set(losses.values())) == 3
    assert "was begun with dims = [16], now [8]" in told(
        command(path, "--out", tmp_path / "recipe", "--steps", 2, "--dims", 8)
    )
    line = told(command(recipe, "--out", tmp_path / "odd", "--dims", 8, 65))
    assert line == "error: dims: expected from 1 to 64, the width of a vector, got 65"
    assert not (tmp_path / "odd" / "log.jsonl").exists()
    line = told(command(path, "--out", tmp_path / "odd", "--dims", 8, 0))
    assert line == "error: --dims: expected a number in [1, inf), got 0"
