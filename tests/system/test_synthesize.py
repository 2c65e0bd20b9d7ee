"""Synthetic rows from a local server that also misbehaves: all tasks come, none is asked twice, killed or not.

The server's answer, or its fault, is a pure function of the request, so that any two runs can be compared."""

import contextlib
import http.server
import io
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import nvembed
import pytest
import train
from conftest import ROOT

from data import synthesize
from data.prepare import read_rows

WORDS = "river stone engine paper window garden winter music doctor bread island letter".split()
FAULTS = {  # of an answer -> reason under which it is counted
    "prose": "bad: not JSON",
    "cut": "bad: not JSON",
    "null": "bad: not JSON",
    "nested": "bad: not JSON",
    "keys": "bad: wrong keys",
    "empty": "bad: not text",
    "number": "bad: not text",
    "surrogate": "bad: not text",
    "echo": "bad: placeholder",
    "late": "refused: time-out",
    "dropped": "refused: connection error",
    "503": "refused: HTTP 503",
    "429": "refused: HTTP 429",
}
TIMEOUT = 1.5  # seconds; a late answer comes after twice that
GARBAGE = [name for name, reason in FAULTS.items() if reason.startswith("bad")]
REFUSALS = [name for name in FAULTS if name not in GARBAGE]


def good(prompt, rng):
    """What was asked for, as a model would give it."""
    keys = re.findall('"([a-z_]+)": "<', prompt)
    texts = [" ".join(rng.choices(WORDS, k=8)) + f" {rng.randrange(10**9)}" for _ in keys or range(20)]
    if not keys:
        texts = [
            f"Given a {rng.choice(WORDS)}, find the {rng.choice(WORDS)} {rng.randrange(3)}" for _ in texts
        ]
    return dict(zip(keys, texts, strict=True)) if keys else texts


def wrong(fault, found):
    """The answer with a fault -> text of the message."""
    texts = found if isinstance(found, list) else list(found.values())
    changed = {
        "empty": " ",
        "number": 7,
        "surrogate": "\ud800",
        "echo": "<a short text>",
        "same": texts[0].upper(),
    }
    if fault in changed:
        texts[-1] = changed[fault]
        found = dict(zip(found, texts, strict=True)) if isinstance(found, dict) else texts
    if fault == "keys":
        found = found | {"why": "because"} if isinstance(found, dict) else {"tasks": found}
    text = json.dumps(found)
    return {"prose": f"Sure! {text}", "cut": text[:-9], "null": None, "nested": "[" * 99999}.get(fault, text)


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server at a free port; `fault(prompt, seed)` -> name of a fault or None."""

    request_queue_size = 64

    def __init__(self, fault=lambda prompt, seed: None, status=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.status, self.asked, self.headers = fault, status, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        """A client that has gone is part of the test."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Silent."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,), seed, server = body["messages"], body["seed"], self.server
        assert (self.path, message["role"], body["temperature"], body["top_p"]) == (
            "/v1/chat/completions",
            "user",
            1,
            1,
        )
        fault = server.fault(message["content"], seed)
        server.asked.append((message["content"], seed, fault))
        server.headers.append(self.headers["Authorization"])
        if fault == "dropped":
            return self.connection.close()
        if fault == "late":
            time.sleep(2 * TIMEOUT)
        text = wrong(fault, good(message["content"], random.Random(f"{message['content']} {seed}")))
        text = f"```json\n{text}\n```" if text and seed % 3 == 0 else text
        status = server.status or (int(fault) if fault in ("503", "429") else 200)
        reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        reply = json.dumps(reply if status == 200 else {"error": {"message": "no such\nmodel"}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


def misbehaves(prompt, seed):
    """A fifth of the answers are garbage, 8 % of the requests get none."""
    rng = random.Random(f"{seed} {prompt} fault")
    draw = rng.random()
    return rng.choice(GARBAGE) if draw < 0.2 else rng.choice(REFUSALS) if draw < 0.28 else None


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def start(*args, **kwargs):
            server = stack.enter_context(Server(*args, **kwargs))
            stack.callback(server.shutdown)
            return server

        yield start


def flags(server, out, **changes):
    found = {"endpoint": server.url, "model": "stub", "out": out, "kind": "short-long", "timeout": TIMEOUT}
    return [str(x) for name, value in (found | changes).items() for x in (f"--{name}", value)]


def command(server, out, **changes):
    """synthesize.py in this process -> (exit status, counts, stderr)."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["synthesize.py", *flags(server, out, **changes)])
        try:
            nvembed.run(synthesize.main)
        except SystemExit as error:
            code = error.code
    return code, json.loads(stdout.getvalue() or "{}"), stderr.getvalue()


def finished(server, out, **changes):
    code, counts, err = command(server, out, **changes)
    assert code == 0, err
    assert json.loads(out.with_name(f"{out.name}.json").read_text()) == counts
    return counts


def expected(asked):
    """Counts by outcome of what the server was asked."""
    return Counter(FAULTS.get(fault, "answered") for _, _, fault in asked)


def lines(out):
    journal = out.with_name(f"{out.name}.journal")
    return journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """100 tasks from the server that misbehaves, 16 at a time, never stopped -> (server, file, counts)."""
    out = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    with Server(misbehaves) as server:
        counts = finished(server, out, concurrency=16)
        server.shutdown()
    return server, out, counts


def test_every_task_gives_a_row(whole):
    server, out, counts = whole
    rows = read_rows(out)
    assert counts["rows"] == len(rows) == 100 == len({row["prompt"].casefold() for row in rows})
    assert all(len(row["pos"]) == len(row["neg"]) == 1 for row in rows)
    assert counts["requests"] == expected(server.asked)
    assert sum(counts["requests"].values()) == len(server.asked) == len({a[:2] for a in server.asked})
    faults = Counter(fault for *_, fault in server.asked)
    garbage, refusals = (sum(faults[name] for name in names) for names in (GARBAGE, REFUSALS))
    assert {FAULTS[name] for name in faults if name} == {*FAULTS.values()} and faults["late"] >= 1
    assert 0.15 < garbage / len(server.asked) < 0.3 and refusals >= 4
    assert counts["requests"]["answered"] == 100 + sum("Think of" in p and not f for p, _, f in server.asked)


def test_duplicate_tasks_are_dropped_and_counted(whole):
    _, out, counts = whole
    lists = [json.loads(line) for line in lines(out)]
    tasks = [
        task.casefold() for key, texts in lists if len(key) == 4 and isinstance(texts, list) for task in texts
    ]
    assert counts["short-long"] == {"tasks": 100, "duplicates": len(tasks) - len({*tasks})}
    assert len(tasks) > len({*tasks}) >= 100


@pytest.mark.parametrize("concurrency", (3, 8))
def test_killed_in_between(whole, serve, tmp_path, concurrency):
    """Killed twice, a line left half-written: the same file and the same counts, no finished request repeated."""
    server, out = serve(misbehaves), tmp_path / "rows.jsonl"
    line = [sys.executable, str(ROOT / "data/synthesize.py"), *flags(server, out, concurrency=concurrency)]
    for enough in (20, 70):
        before, done = len(server.asked), len(lines(out))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(lines(out)) < enough:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not out.exists()
        time.sleep(0.2)  # what it had sent has come
        unfinished = len(server.asked) - before - (len(lines(out)) - done)
        assert 0 <= unfinished <= concurrency
        with open(f"{out}.journal", "ab") as file:
            file.write(b'[["stub", 0, "short-lo')
    before, done = len(server.asked), len(lines(out))
    assert 70 <= done < sum(whole[2]["requests"].values())
    counts = finished(server, out, concurrency=concurrency)
    assert counts == whole[2] and out.read_bytes() == whole[1].read_bytes()
    assert len(server.asked) - before == sum(counts["requests"].values()) - done
    repeated = len(server.asked) - len({a[:2] for a in server.asked})
    assert repeated <= 2 * concurrency and {*server.asked} == {*whole[0].asked}


def test_a_finished_run_asks_nothing_and_grows(serve, tmp_path):
    out = tmp_path / "rows.jsonl"
    server = serve()
    first = finished(server, out, tasks=20)
    asked = len(server.asked)
    assert finished(server, out, tasks=20) == first and len(server.asked) == asked
    rows = read_rows(out)
    assert finished(server, out, tasks=30)["rows"] == 30 and read_rows(out)[:20] == rows
    assert sum("Write one" in prompt for prompt, *_ in server.asked) == 30
    out.unlink()  # control: without its journal all is asked again
    out.with_name("rows.jsonl.journal").unlink()
    finished(server, out, tasks=20)
    assert sum("Write one" in prompt for prompt, *_ in server.asked) == 50


def test_every_byte_of_a_killed_line(serve, tmp_path):
    server, out = serve(), tmp_path / "rows.jsonl"
    finished(server, out, tasks=2, concurrency=1)
    text, rows = out.with_name("rows.jsonl.journal").read_bytes(), out.read_bytes()
    last = text[:-1].rindex(b"\n") + 1
    for cut in range(last, len(text), 7):
        asked = len(server.asked)
        out.with_name("rows.jsonl.journal").write_bytes(text[:cut])
        finished(server, out, tasks=2, concurrency=1)
        assert len(server.asked) == asked + 1 and out.read_bytes() == rows
        assert out.with_name("rows.jsonl.journal").read_bytes() == text
    out.with_name("rows.jsonl.journal").write_bytes(b"no\n" + text)
    code, _, err = command(server, out, tasks=2)
    assert code == 2 and "rows.jsonl.journal:1: expected" in err


def test_the_seed_and_the_key_draw_the_prompts(serve, tmp_path):
    server = serve()
    asked = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finished(server, tmp_path / name, tasks=20, seed=seed, concurrency=3)
        asked.append({a[:2] for a in server.asked})
        server.asked.clear()
    assert asked[0] == asked[1] and not asked[0] & asked[2]
    rows, other = (read_rows(tmp_path / name) for name in "ac")
    assert rows != other and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    text = " ".join(prompt for found in asked for prompt, _ in found)
    for name in ("rarity", "length", "level", "clarity", "words"):
        assert all(f"{value}" in text for value in synthesize.PROMPTS["varied"][name]), name


KINDS = {
    "short-long": ("user_query", "positive_document", "hard_negative_document"),
    "long-short": ("input_text", "label", "misleading_label"),
    "short-short": ("input", "positive_document"),
}


def test_all_kinds(serve, tmp_path):
    server, out = serve(), tmp_path / "rows.jsonl.gz"
    counts = finished(server, out, kind="all", tasks=3)
    assert [len(row["neg"]) for row in read_rows(out)] == [1] * 6 + [0] * 3 and counts["rows"] == 9
    prompts = [prompt for prompt, *_ in server.asked if "Write one" in prompt]
    for keys in KINDS.values():
        found = [p for p in prompts if tuple(re.findall('"([a-z_]+)": "<', p)) == keys]
        assert len(found) == 3 and not any("{" in p.replace('{"', "") for p in found)
    assert {kind: tuple(found["keys"]) for kind, found in synthesize.PROMPTS["kinds"].items()} == KINDS


def reply(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


ROW = {"user_query": "a query", "positive_document": "one text", "hard_negative_document": "another"}


@pytest.mark.parametrize("fence", ("{}", "```json\n{}\n```", "```\n{}```", " {}\n\n"))
def test_good_answers(fence):
    keys = KINDS["short-long"]
    backwards = dict(reversed(ROW.items()))
    for row in (ROW, backwards):
        assert synthesize.parse(reply(fence.format(json.dumps(row))), keys) == list(ROW.values())
    assert synthesize.parse(reply(fence.format('["a task", "a task"]')), ()) == ["a task", "a task"]


@pytest.mark.parametrize(
    "text, reason",
    (
        ("a query", "not JSON"),
        (json.dumps(ROW)[:-1], "not JSON"),
        (f"Here it is: {json.dumps(ROW)}", "not JSON"),
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
        synthesize.parse(reply(text), KINDS["short-long"])


@pytest.mark.parametrize("text", ("[]", "{}", '["<first task>"]', '["a", 1]', '[""]', '"a task"'))
def test_bad_lists(text):
    with pytest.raises(synthesize.Failed):
        synthesize.parse(reply(text), ())


def test_without_checks_garbage_would_pass(serve, tmp_path, monkeypatch):
    """Negative control: the same answers, believed."""

    def believe(reply, keys):
        found = json.loads(json.loads(reply)["choices"][0]["message"]["content"].strip("`json\n"))
        return list(found.values()) if keys else found

    def fault(prompt, seed):
        return random.Random(seed).choice(["same", "echo", None]) if "Write one" in prompt else None

    def spoilt(rows):
        same = [row for row in rows if row["neg"][0].casefold() == row["query"].casefold()]
        return len(same), sum("<" in text for row in rows for text in row["neg"])

    server = serve(fault)
    finished(server, tmp_path / "checked", tasks=20, retries=20)
    assert spoilt(read_rows(tmp_path / "checked")) == (0, 0)
    monkeypatch.setattr(synthesize, "parse", believe)
    finished(server, tmp_path / "believed", tasks=20)
    assert min(spoilt(read_rows(tmp_path / "believed"))) >= 3


def test_retries_have_a_limit(serve, tmp_path):
    """A task without a usable answer is left out; --retries can be raised later."""

    def fault(prompt, seed):
        hard = "Write one" in prompt and "PhD" in prompt
        return "prose" if hard and sum(p == prompt for p, *_ in server.asked) < 4 else None

    server = serve(fault)
    counts = finished(server, tmp_path / "rows", tasks=20, retries=2)
    hard = len({prompt for prompt, *_ in server.asked if "Write one" in prompt and "PhD" in prompt})
    assert 2 <= hard < 20 and counts["rows"] == 20 - hard
    assert counts["requests"] == {
        "answered": 1 + 20 - hard + (len(server.asked) - 21 - 2 * hard),
        "bad: not JSON": 3 * hard,
    }
    more = finished(server, tmp_path / "rows", tasks=20, retries=4)
    assert more["rows"] == 20 and more["requests"]["bad: not JSON"] == 4 * hard


def test_nothing_new_ends_the_brainstorm(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WORDS", ["river"])
    counts = finished(serve(), tmp_path / "rows", tasks=100)
    assert counts["short-long"] == {"tasks": 3, "duplicates": 2 * 5 * 20 - 3} and counts["rows"] == 3


@pytest.mark.parametrize("suffix", ("", "/", "/v1", "/v1/"))
def test_endpoint_and_key(serve, tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    server = serve()
    assert finished(server, tmp_path / "rows", tasks=1, endpoint=server.url + suffix)["rows"] == 1
    assert {*server.headers} == {"Bearer secret"}


@pytest.mark.parametrize("status", (400, 401, 404))
def test_a_request_that_is_wrong_is_told_at_once(serve, tmp_path, status):
    server = serve(status=status)
    code, _, err = command(server, tmp_path / "rows", tasks=1)
    told = f'error: {server.url}/v1/chat/completions: HTTP {status}: {{"error": {{"message": "no such\\nmodel"}}}}\n'
    assert code == 2 and err == told and len(server.asked) == 1
    server.status = None
    assert finished(server, tmp_path / "rows", tasks=1)["rows"] == 1


def test_a_server_that_is_down(serve, tmp_path, monkeypatch):
    waits = []

    class Impatient(threading.Event):
        def wait(self, timeout):
            waits.append(timeout)

    monkeypatch.setattr(synthesize, "Event", Impatient)
    server = serve(status=503)
    code, _, err = command(server, tmp_path / "rows", tasks=1, retries=9)
    assert code == 2 and "refused: HTTP 503" in err and "the same command goes on" in err
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60] and len(server.asked) == 10
    server.status = None
    counts = finished(server, tmp_path / "rows", tasks=1)
    assert counts["rows"] == 1 and counts["requests"] == {"answered": 2, "refused: HTTP 503": 10}
    code, _, err = command(server, tmp_path / "other", endpoint="http://127.0.0.1:1", retries=1)
    assert code == 2 and "connection error" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "changes, told",
    (
        ({"endpoint": "localhost:8000"}, "--endpoint: expected a URL"),
        ({"tasks": 0}, "--tasks"),
        ({"retries": -1}, "--retries"),
        ({"timeout": 0}, "--timeout"),
    ),
)
def test_bad_flags(serve, tmp_path, changes, told):
    code, _, err = command(serve(), tmp_path / "rows", **changes)
    assert code == 2 and told in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_one_run_at_a_time(serve, tmp_path):
    server, out = serve(), tmp_path / "rows"
    finished(server, out, tasks=1)
    with open(f"{out}.journal", "ab") as file:
        synthesize.fcntl.flock(file, synthesize.fcntl.LOCK_EX)
        code, _, err = command(server, out, tasks=1)
    assert code == 2 and "in use by another run" in err


def trained(base, folder, *given):
    """Two steps of train.py in this process -> its log."""
    small = "--steps 2 --batch 4 --negatives 2 --warmup 1 --max-length 128 --micro-tokens 512 --lora-rank 2"
    line = [
        "train.py",
        *map(str, given),
        "--out",
        str(folder / "run"),
        *small.split(),
        "--dtype",
        "float32",
        "--init",
        str(base),
    ]
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)
        try:
            train.main()
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
    return [json.loads(text) for text in (folder / "run/log.jsonl").read_text().splitlines()]


def test_train_accepts_the_rows(whole, serve, base, tmp_path):
    log = trained(base, tmp_path / "own", "--data", whole[1])
    assert log[-1]["step"] == 2 and log[-1]["loss"] > 0
    finished(serve(), tmp_path / "all.jsonl.gz", kind="all", tasks=10)
    entry = {
        "name": "synthetic",
        "file": "all.jsonl.gz",
        "kind": "synthetic",
        "instruction": "",
        "stages": [1, 2],
    }
    recipe = {"base": str(base), "seed": 0, "datasets": [entry], "stages": {"1": {}, "2": {}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    log = trained(base, tmp_path / "recipe", "--recipe", tmp_path / "recipe.json")
    assert log[-1]["step"] == 2 and log[-1]["loss"] > 0
    with pytest.raises(nvembed.InputError, match="query"):  # control
        trained(base, tmp_path / "journal", "--data", f"{whole[1]}.json")
