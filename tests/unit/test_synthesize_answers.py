"""Answers of a language model: what is taken as a row or a list of tasks, and what is not."""

import json
import random
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest

from data import synthesize
from data.commands import InputError

KEYS = ("user_query", "positive_document", "hard_negative_document")
ROW = {
    "user_query": "a query",
    "positive_document": "one text",
    "hard_negative_document": "another",
}


def reply(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.mark.parametrize("fence", ("{}", "```json\n{}\n```", "```\n{}```", " {}\n\n"))
def test_good_answers(fence):
    backwards = dict(reversed(ROW.items()))
    for row in (ROW, backwards):
        answer = reply(fence.format(json.dumps(row)))
        assert synthesize.parse_row(answer, KEYS) == list(ROW.values())
    tasks = reply(fence.format('["a task", "a task"]'))
    assert synthesize.parse_tasks(tasks) == ["a task", "a task"]


@pytest.mark.parametrize(
    "text, reason",
    (
        ("a query", "not JSON"),
        (json.dumps(ROW)[:-1], "not JSON"),
        (f"Here it is: {json.dumps(ROW)}", "not JSON"),
        ("[" * 99999, "not JSON"),
        (None, "not JSON"),
        (json.dumps([ROW]), "wrong keys"),
        (json.dumps(ROW | {"note": "x"}), "wrong keys"),
        (json.dumps({"user_query": "a query", "positive_document": "one text"}), "wrong keys"),
        (json.dumps(ROW | {"user_query": "\n"}), "not text"),
        (json.dumps(ROW | {"user_query": ["a query"]}), "not text"),
        (json.dumps(ROW | {"user_query": "half \udc00"}), "not text"),
        (json.dumps(ROW | {"user_query": "about <what a user asks>"}), "placeholder"),
        (json.dumps(ROW | {"hard_negative_document": "One text "}), "same text"),
        (json.dumps(ROW | {"positive_document": "a query"}), "same text"),
    ),
)
def test_bad_answers(text, reason):
    with pytest.raises(synthesize.Failed, match=f"^bad: {reason}$"):
        synthesize.parse_row(reply(text), KEYS)


@pytest.mark.parametrize("content", (b"", b"\xff", b"{}", b'{"choices": []}', b"[1]", b"3"))
def test_replies_of_another_form(content):
    with pytest.raises(synthesize.Failed, match="^bad: not JSON$"):
        synthesize.parse_tasks(content)


@pytest.mark.parametrize(
    "text, reason",
    (
        ("[]", "wrong keys"),
        ("{}", "wrong keys"),
        ('"a task"', "wrong keys"),
        ('["<first task>"]', "placeholder"),
        ('["a", 1]', "not text"),
        ('[""]', "not text"),
    ),
)
def test_bad_lists(text, reason):
    with pytest.raises(synthesize.Failed, match=f"^bad: {reason}$"):
        synthesize.parse_tasks(reply(text))


def test_prompts():
    """The key draws what varies in a prompt; no field of the template is left unfilled."""
    for kind, template in synthesize.PROMPTS["kinds"].items():
        prompts = set()
        for number in range(20):
            key = ("model", 0, kind, number, 0)
            prompt = synthesize.prompt_for(key, "a task")
            assert prompt == synthesize.prompt_for(key, "a task")
            assert "Task: a task\n" in prompt
            assert "{" not in prompt.replace('{"', "")
            assert all(f'"{name}": "<' in prompt for name in template["keys"])
            prompts.add(prompt)
        assert len(prompts) > 5
        brainstorm = synthesize.prompt_for(("model", 0, kind, 0), "")
        assert brainstorm.startswith("Think of about 20 different text matching tasks")


def test_tasks_are_bare():
    """Without "Instruct:", however often a model writes it; an empty one is none."""
    texts = ["Instruct: Instruct: find  it", "Instruct:", "Instruct: Instruct:", "Find IT", "rank"]
    journal = Namespace(args=Namespace(model="m", seed=0, tasks=9), ask=lambda key: texts)
    with ThreadPoolExecutor(1) as pool:
        tasks, duplicates = synthesize.brainstorm(journal, pool, "short-long")
    assert [task for _, task in tasks.values()] == ["find it", "rank"]
    assert [key[-2:] for key, _ in tasks.values()] == [(0, 0), (0, 4)]
    assert duplicates == 1 + 3  # in the first request and in the second


# ---- the journal


def arguments():
    return Namespace(model="m", seed=0, retries=1)


@pytest.mark.parametrize("line", (b"no", b"3", b"[1, 2, 3]", b'["key", "outcome"]', b"\xff"))
def test_bad_lines_of_a_journal(tmp_path, line):
    path = tmp_path / "rows.journal"
    path.write_bytes(b'[["m", 0, "short-long", 0], ["a task"]]\n' + line + b"\n")
    message = f"^{path}:2: expected a key and an outcome"
    with pytest.raises(InputError, match=message) as caught:
        synthesize.Journal(path, arguments())
    assert "\n" not in str(caught.value)


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "rows.journal"
    whole = b'[["m", 0, "short-long", 0], ["a task"]]\n'
    for half in (b"", b"[", b'[["m", 0, "short-long", 1], ["b"]]'):
        path.write_bytes(whole + half)
        journal = synthesize.Journal(path, arguments())
        assert journal.count_outcomes() == {"answered": 1}
        journal.write(("m", 0, "short-long", 1), "bad: not JSON")
        journal.file.close()
        assert path.read_bytes() == whole + b'[["m", 0, "short-long", 1], "bad: not JSON"]\n'


@pytest.mark.parametrize("content", (b"Dear diary", b"[1, 2]", b'[["a"], []]\nDear diary'))
def test_a_file_that_is_no_journal_stays(tmp_path, content):
    path = tmp_path / "rows.journal"
    path.write_bytes(content)
    line = content.count(b"\n") + 1
    with pytest.raises(InputError, match=f"^{path}:{line}: expected a key and an outcome$"):
        synthesize.Journal(path, arguments())
    assert path.read_bytes() == content


def test_answers_of_the_journal_are_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def request(args, prompt, seed):
        asked.append(seed)
        raise synthesize.Failed("bad: not JSON")

    monkeypatch.setattr(synthesize, "request", request)
    path = tmp_path / "rows.journal"
    path.write_bytes(b'[["m", 0, "short-long", 0], ["a task"]]\n')
    journal = synthesize.Journal(path, arguments())
    assert journal.ask(("m", 0, "short-long", 0)) == ["a task"]
    assert not asked
    assert journal.ask(("m", 0, "short-long", 1)) is None  # control: asked once and once again
    assert len(set(asked)) == 2
    assert journal.ask(("m", 0, "short-long", 1)) is None
    assert len(asked) == 2
    assert journal.count_outcomes() == {"answered": 1, "bad: not JSON": 2}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/rows.journal", tmp_path):
        with pytest.raises(InputError, match=f"^{path}: expected a file to write: "):
            synthesize.Journal(path, arguments())


@pytest.mark.parametrize("ending", ("", "/", "/v1", "/v1/", "//v1//"))
def test_address(monkeypatch, ending):
    """The server's address may or may not name the version of the interface."""
    asked = []

    def ask(connection, method, path, *_):
        asked.append(f"{connection.host}:{connection.port}{path}")
        raise ConnectionRefusedError

    monkeypatch.setattr(synthesize.HTTPConnection, "connect", lambda connection: None)
    monkeypatch.setattr(synthesize.HTTPConnection, "request", ask)
    args = Namespace(endpoint="http://host:8000" + ending, model="m", max_tokens=9, timeout=1)
    with pytest.raises(synthesize.Failed, match="^refused: connection error$"):
        synthesize.request(args, "prompt", random.randrange(9))
    assert asked == ["host:8000/v1/chat/completions"]
