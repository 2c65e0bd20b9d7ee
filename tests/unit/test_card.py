"""What a finished run says of itself: prompts, the model card, and whose README.md it is."""

import json
import re
import shutil
import sys

import pytest
from helpers import command, some_rows

from data import card
from data.commands import run_command
from data.dialects import content_hash
from data.folders import QUERY_TEMPLATE
from data.sampling import Dataset
from nvembed import NVEmbed

MINE = "# My notes on this run\n"


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "stage1")


def prompts(run):
    return json.loads((run / "config_sentence_transformers.json").read_text())["prompts"]


# ---- prompts


def some_set(name, instruction, symmetric=False, **fields):
    rows = [row | fields for row in some_rows(5)]
    return Dataset(name, instruction, symmetric, rows, [])


def test_prompts_are_the_recipes():
    sets = [some_set("topics", "b", symmetric=True), some_set("questions", "a")]
    assert card.prompts_of(sets, QUERY_TEMPLATE) == {
        "query": "Instruct: a\nQuery: ",  # the first whose documents carry none
        "document": "",
        "topics": "Instruct: b\nQuery: ",
        "questions": "Instruct: a\nQuery: ",
    }
    assert card.prompts_of(sets[:1], "{instruction}:")["query"] == "b:"


@pytest.mark.parametrize("name", ["query", "document"])
def test_a_set_of_the_name_of_a_prompt(name):
    sets = [some_set("questions", "a"), some_set(name, "b")]
    found = card.prompts_of(sets, QUERY_TEMPLATE)
    assert (found["query"], found["document"]) == ("Instruct: a\nQuery: ", "")


def test_prompts_of_rows_that_have_their_own():
    rows = some_set("mine", "", prompt="Find it")
    rows.rows[0]["prompt"] = "Find another"
    found = card.prompts_of([rows], QUERY_TEMPLATE)
    assert found == {
        "query": "Instruct: Find it\nQuery: ",
        "document": "",
        "mine": "Instruct: Find it\nQuery: ",
    }
    bare = some_set("bare", "")
    assert card.prompts_of([bare], QUERY_TEMPLATE) == {"query": "", "document": "", "bare": ""}


def test_a_run_of_own_rows_has_their_prompt(recipe, tmp_path):
    rows = [row | {"prompt": "Say it"} for row in some_rows(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "mine.jsonl"
    code, _, err = command(recipe, "--data", data, "--out", tmp_path / "run", "--steps", 1)
    assert code == 0, err
    assert prompts(tmp_path / "run")["mine"] == "Instruct: Say it\nQuery: "


# ---- card


def test_the_card_tells_the_run(run, base):
    text = (run / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: sentence-transformers\n")
    assert f"trained from `{base.name}`" in text
    assert str(base) not in text  # no path of this machine
    assert '| rows | `"Instruct: Find it\\nQuery: "` |' in text
    assert "| steps | 10 |" in text
    assert "| data sets | rows |" in text
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert f"loss {last['held_out_loss']:.4f}" in text
    assert "## Scores" not in text


def test_its_code_runs(run, monkeypatch):
    """Both ways to load it, and they agree."""
    text = (run / "README.md").read_text().replace('"whole"', '"stage1"')
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(run.parent)
    found = []
    for block in blocks:
        names = {}
        exec(block, names)
        found.append((names["queries"], names["documents"]))
    for ours, theirs in zip(*found, strict=True):
        assert (ours * theirs).sum() > 0.99999
    queries, documents = found[0]
    assert (queries * documents).sum() < 0.999  # control


def store(results, run, task, score, settings="dtype_float32__max_length_512", split="test"):
    name = run.name.replace(" ", "_")
    folder = results / f"results/nvembed__{name}/{content_hash(run)}/experiments/{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"scores": {split: [{"main_score": score}]}}
    (folder / f"{task}.json").write_text(json.dumps(content))
    (folder / "model_meta.json").write_text("{}")


def rewrite(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["card.py", *map(str, flags)])
    run_command(card.main)


def test_scores_come_from_evaluation(run, tmp_path, monkeypatch, capsys):
    before = content_hash(run)
    store(tmp_path, run, "SQuAD", 0.61234)
    store(tmp_path, run, "MSMARCO", 0.25, split="dev")
    for other in ("limit_9__max_length_512", "max_length_512__pooling_mean"):  # not this model
        store(tmp_path, run, "TREC", 0.5, f"dtype_float32__{other}")
    rewrite(monkeypatch, run, "--results", tmp_path)
    text = (run / "README.md").read_text()
    assert "| SQuAD | 61.23 | dtype_float32, max_length_512 |" in text
    assert "| MSMARCO | 25.00 | dtype_float32, max_length_512 |" in text
    assert "TREC" not in text
    assert "README.md: written, with 2 scores of whole tasks" in capsys.readouterr().out
    assert content_hash(run) == before  # the card is no part of what results belong to
    link = tmp_path / "of a cell"
    link.symlink_to(run)
    store(tmp_path, link, "STS", 0.75)
    rewrite(monkeypatch, link, "--results", tmp_path)
    assert "| STS | 75.00 |" in (run / "README.md").read_text()
    config = run / "config.json"  # control: results of other weights are not shown
    config.write_text(config.read_text() + "\n")
    rewrite(monkeypatch, run, "--results", tmp_path)
    assert "SQuAD" not in (run / "README.md").read_text()


def test_a_card_needs_a_finished_run(run, monkeypatch, capsys):
    (run / "finished").unlink()
    with pytest.raises(SystemExit) as end:
        rewrite(monkeypatch, run)
    assert end.value.code == 2
    assert "expected a finished run" in capsys.readouterr().err


# ---- a README.md of the user


def test_a_users_readme_is_left_alone(run, unexported, recipe, monkeypatch, capsys):
    for folder in (run, unexported):
        (folder / "README.md").write_text(MINE)
    rewrite(monkeypatch, run)
    assert "left as it is" in capsys.readouterr().out
    for folder, flags in ((unexported, ["--steps", 10]), (run, ["--restart", "--steps", 1])):
        code, _, err = command(recipe, "--out", folder, *flags)
        assert code == 0, err
        assert (folder / "README.md").read_text() == MINE
        assert NVEmbed.from_pretrained(folder)
    NVEmbed.from_pretrained(run).save_pretrained(run)
    assert (run / "README.md").read_text() == MINE


def test_a_card_of_ours_is_written_anew(run, recipe):
    path = run / "README.md"
    path.write_text(path.read_text() + "an old line\n")
    code, _, err = command(recipe, "--out", run, "--restart", "--steps", 1)
    assert code == 0, err
    text = path.read_text()
    assert "an old line" not in text
    assert "| steps | 1 |" in text
