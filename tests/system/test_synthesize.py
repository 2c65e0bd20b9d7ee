"""Synthetic rows from a local server that also misbehaves: every task comes, none is asked twice.

The server's answer is a pure function of the request: any two runs can be compared.
"""

import contextlib
import fcntl
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import train
from stub_server import FAULTS, GARBAGE, REFUSALS, TIMEOUT, Server, misbehaves

from data import synthesize
from data.commands import InputError, run_command
from data.files import ROOT
from data.rows import read_rows

KINDS = {
    "short-long": ("user_query", "positive_document", "hard_negative_document"),
    "long-short": ("input_text", "label", "misleading_label"),
    "short-short": ("input", "positive_document"),
}


@pytest.fixture
def serve():
    """Starts servers, which stop after the test."""
    with contextlib.ExitStack() as stack:

        def start(*args, **kwargs):
            server = stack.enter_context(Server(*args, **kwargs))
            stack.callback(server.shutdown)
            return server

        yield start


def flags(server, out, **changes):
    values = {
        "endpoint": server.url,
        "model": "stub",
        "out": out,
        "kind": "short-long",
        "timeout": TIMEOUT if getattr(server, "fault", None) is misbehaves else 30,
    }
    line = []
    for name, value in (values | changes).items():
        line += [f"--{name}", str(value)]
    return line


def command(server, out, **changes):
    """synthesize.py in this process -> (exit status, counts, stderr)."""
    stdout = io.StringIO()
    stderr = io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["synthesize.py", *flags(server, out, **changes)])
        try:
            run_command(synthesize.main)
        except SystemExit as error:
            code = error.code
    counts = json.loads(stdout.getvalue() or "{}")
    return code, counts, stderr.getvalue()


def finished(server, out, **changes):
    """The counts of a command that has to succeed."""
    code, counts, stderr = command(server, out, **changes)
    assert code == 0, stderr
    assert json.loads(Path(f"{out}.json").read_text()) == counts
    return counts


def journal_of(out):
    return Path(f"{out}.journal")


def journal_lines(out):
    path = journal_of(out)
    if not path.exists():
        return []
    return path.read_bytes().split(b"\n")[:-1]


def for_rows(server):
    """Prompts of the server's requests for a row."""
    return [prompt for prompt, _, _ in server.asked if "Write one" in prompt]


def requests(server):
    return {(prompt, seed) for prompt, seed, _ in server.asked}


# ---- a whole run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """100 tasks from a server that misbehaves, 16 at a time -> (server, file, counts)."""
    out = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    with Server(misbehaves) as server:
        counts = finished(server, out, concurrency=16)
        server.shutdown()
    return server, out, counts


def test_every_task_gives_a_row(finished_run):
    server, out, counts = finished_run
    rows = list(read_rows(out))
    tasks = {row["prompt"].casefold() for row in rows}
    assert counts["rows"] == len(rows) == len(tasks) == 100
    assert all(len(row["pos"]) == len(row["neg"]) == 1 for row in rows)
    assert counts["requests"] == Counter(
        FAULTS.get(fault, "answered") for *_, fault in server.asked
    )
    assert sum(counts["requests"].values()) == len(server.asked) == len(requests(server))
    lists = [prompt for prompt, _, fault in server.asked if "Think of" in prompt and not fault]
    assert counts["requests"]["answered"] == 100 + len(lists)


def test_the_server_misbehaved(finished_run):
    """Control: every reason occurred, often."""
    server, _, _ = finished_run
    faults = Counter(fault for *_, fault in server.asked)
    reasons = {FAULTS[name] for name in faults if name}
    assert reasons == set(FAULTS.values())
    assert faults["late"] >= 1
    assert 0.15 < sum(faults[name] for name in GARBAGE) / len(server.asked) < 0.3
    assert sum(faults[name] for name in REFUSALS) >= 4


def test_duplicate_tasks_are_dropped_and_counted(finished_run):
    _, out, counts = finished_run
    tasks = []
    for line in journal_lines(out):
        key, outcome = json.loads(line)
        if len(key) == 5 and isinstance(outcome, list):
            tasks += [task.casefold() for task in outcome]
    different = len(set(tasks))
    assert counts["short-long"] == {"tasks": 100, "duplicates": len(tasks) - different}
    assert len(tasks) > different >= 100


# ---- stopped and started again


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", (3, 8))
def test_killed_in_between(finished_run, serve, tmp_path, concurrency):
    """Killed twice, a line left half-written: the same file, no finished request repeated."""
    whole_server, whole_out, whole_counts = finished_run
    server = serve(misbehaves)
    out = tmp_path / "rows.jsonl"
    for enough in (20, 70):
        asked_before = len(server.asked)
        done_before = len(journal_lines(out))
        kill_after(enough, server, out, concurrency)
        unfinished = (len(server.asked) - asked_before) - (len(journal_lines(out)) - done_before)
        assert 0 <= unfinished <= concurrency
        with open(journal_of(out), "ab") as file:
            file.write(b'[["stub", 0, "short-lo')
    asked_before = len(server.asked)
    done = len(journal_lines(out))
    assert 70 <= done < sum(whole_counts["requests"].values())
    counts = finished(server, out, concurrency=concurrency)
    assert counts == whole_counts
    assert out.read_bytes() == whole_out.read_bytes()
    assert len(server.asked) - asked_before == sum(counts["requests"].values()) - done
    repeated = len(server.asked) - len(requests(server))
    assert repeated <= 2 * concurrency
    assert set(server.asked) == set(whole_server.asked)


def kill_after(lines, server, out, concurrency):
    """Starts the command and kills it as soon as the journal has so many lines."""
    line = [sys.executable, str(ROOT / "data/synthesize.py")]
    line += flags(server, out, concurrency=concurrency)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(journal_lines(out)) < lines:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    time.sleep(0.2)  # until what it had sent has come


def test_a_finished_run_asks_nothing_and_grows(serve, tmp_path):
    out = tmp_path / "rows.jsonl"
    server = serve()
    first = finished(server, out, tasks=20)
    asked = len(server.asked)
    assert finished(server, out, tasks=20) == first
    assert len(server.asked) == asked
    rows = list(read_rows(out))
    assert finished(server, out, tasks=30)["rows"] == 30
    assert list(read_rows(out))[:20] == rows
    assert len(for_rows(server)) == 30
    out.unlink()  # control: without its journal everything is asked again
    journal_of(out).unlink()
    Path(f"{out}.json").unlink()
    finished(server, out, tasks=20)
    assert len(for_rows(server)) == 50


def test_every_byte_of_a_killed_line(serve, tmp_path):
    server = serve()
    out = tmp_path / "rows.jsonl"
    finished(server, out, tasks=2, concurrency=1)
    journal = journal_of(out).read_bytes()
    rows = out.read_bytes()
    last_line = journal[:-1].rindex(b"\n") + 1
    for end in range(last_line, len(journal), 7):
        asked = len(server.asked)
        journal_of(out).write_bytes(journal[:end])
        finished(server, out, tasks=2, concurrency=1)
        assert len(server.asked) == asked + 1
        assert out.read_bytes() == rows
        assert journal_of(out).read_bytes() == journal
    journal_of(out).write_bytes(b"no\n" + journal)
    code, _, stderr = command(server, out, tasks=2)
    assert code == 2
    assert "rows.jsonl.journal:1: expected" in stderr


def test_one_run_at_a_time(serve, tmp_path):
    server = serve()
    out = tmp_path / "rows"
    finished(server, out, tasks=1)
    with open(journal_of(out), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, stderr = command(server, out, tasks=1)
    assert code == 2
    assert "in use by another run" in stderr
    finished(server, out, tasks=1)  # control


# ---- prompts and checks


def test_the_seed_and_the_key_draw_the_prompts(serve, tmp_path):
    server = serve()
    asked = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finished(server, tmp_path / name, tasks=20, seed=seed, concurrency=3)
        asked[name] = requests(server)
        server.asked.clear()
    assert asked["a"] == asked["b"]
    assert not asked["a"] & asked["c"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(read_rows(tmp_path / "a")) != list(read_rows(tmp_path / "c"))
    prompts = " ".join(prompt for prompt, _ in asked["a"] | asked["c"])
    for name in ("rarity", "length", "level", "clarity", "words"):
        for value in synthesize.PROMPTS["varied"][name]:
            assert str(value) in prompts, name


def test_all_kinds(serve, tmp_path):
    server = serve()
    out = tmp_path / "rows.jsonl.gz"
    counts = finished(server, out, kind="all", tasks=3)
    assert counts["rows"] == 9
    assert [len(row["neg"]) for row in read_rows(out)] == [1] * 6 + [0] * 3
    keys_asked = [tuple(re.findall('"([a-z_]+)": "<', prompt)) for prompt in for_rows(server)]
    assert Counter(keys_asked) == dict.fromkeys(KINDS.values(), 3)
    templates = synthesize.PROMPTS["kinds"]
    assert {kind: tuple(templates[kind]["keys"]) for kind in templates} == KINDS


def test_several_rows_of_a_task(serve, tmp_path):
    """The first of each task are those of --rows 1, and are not asked for again."""
    server = serve()
    out = tmp_path / "rows.jsonl"
    finished(server, out, tasks=3)
    first = list(read_rows(out))
    asked = len(server.asked)
    counts = finished(server, out, tasks=3, rows=2)
    assert (counts["rows"], counts["short-long"]["tasks"]) == (6, 3)
    assert len(server.asked) == asked + 3
    rows = list(read_rows(out))
    assert rows[::2] == first
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one["prompt"] == other["prompt"]
        assert one["query"] != other["query"]


def test_other_prompts_are_asked_anew(serve, tmp_path, monkeypatch):
    server = serve()
    out = tmp_path / "rows.jsonl"
    finished(server, out, tasks=3)
    asked = len(server.asked)
    finished(server, out, tasks=3)
    assert len(server.asked) == asked  # control
    kind = synthesize.PROMPTS["kinds"]["short-long"]
    monkeypatch.setitem(kind, "example", kind["example"] + " Be brief.")
    finished(server, out, tasks=3)
    assert len(server.asked) == 2 * asked


def test_without_checks_garbage_would_pass(serve, tmp_path, monkeypatch):
    """Negative control: the same answers, believed."""

    def believe(reply, keys):
        content = json.loads(reply)["choices"][0]["message"]["content"]
        return list(json.loads(content.strip("`json\n")).values())

    def fault(prompt, seed):
        if "Write one" in prompt:
            return random.Random(seed).choice(["same", "echo", None])
        return None

    def spoilt(path):
        rows = read_rows(path)
        same = sum(row["neg"][0].casefold() == row["query"].casefold() for row in rows)
        return same, sum("<" in row["neg"][0] for row in rows)

    server = serve(fault)
    finished(server, tmp_path / "checked", tasks=20, retries=20)
    assert spoilt(tmp_path / "checked") == (0, 0)
    monkeypatch.setattr(synthesize, "parse_row", believe)
    finished(server, tmp_path / "believed", tasks=20)
    assert min(spoilt(tmp_path / "believed")) >= 3


# ---- retries and refusals


def test_retries_have_a_limit(serve, tmp_path):
    """A task without a usable answer is left out; --retries can be raised later."""

    def fault(prompt, seed):
        hard = "Write one" in prompt and "PhD" in prompt
        asked = [earlier for earlier, _, _ in server.asked if earlier == prompt]
        return "prose" if hard and len(asked) < 4 else None

    server = serve(fault)
    out = tmp_path / "rows"
    counts = finished(server, out, tasks=20, retries=2)
    hard = len({prompt for prompt in for_rows(server) if "PhD" in prompt})
    assert 2 <= hard < 20
    assert counts["rows"] == 20 - hard
    bad = 3 * hard
    assert counts["requests"] == {"answered": len(server.asked) - bad, "bad: not JSON": bad}
    more = finished(server, out, tasks=20, retries=4)
    assert more["rows"] == 20
    assert more["requests"]["bad: not JSON"] == 4 * hard


def test_nothing_new_ends_the_brainstorm(serve, tmp_path):
    counts = finished(serve(words=["river"]), tmp_path / "rows", tasks=100)
    assert counts["short-long"] == {"tasks": 3, "duplicates": 2 * 5 * 20 - 3}
    assert counts["rows"] == 3


@pytest.mark.parametrize("ending", ("", "/", "/v1", "/v1/"))
def test_endpoint_and_key(serve, tmp_path, monkeypatch, ending):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    server = serve()
    counts = finished(server, tmp_path / "rows", tasks=1, endpoint=server.url + ending)
    assert counts["rows"] == 1
    assert set(server.keys) == {"Bearer secret"}


@pytest.mark.parametrize("status", (400, 401, 404))
def test_a_request_that_is_wrong_ends_at_once(serve, tmp_path, status):
    server = serve(status=status)
    code, _, stderr = command(server, tmp_path / "rows", tasks=1)
    reply = '{"error": {"message": "no such\\nmodel"}}'
    assert code == 2
    assert stderr == f"error: {server.url}/v1/chat/completions: HTTP {status}: {reply}\n"
    assert len(server.asked) == 1
    server.status = None
    assert finished(server, tmp_path / "rows", tasks=1)["rows"] == 1


def test_a_server_that_is_down(serve, tmp_path, monkeypatch):
    waits = []

    class Impatient(threading.Event):
        def wait(self, timeout):
            waits.append(timeout)

    monkeypatch.setattr(synthesize, "Event", Impatient)
    server = serve(status=503)
    code, _, stderr = command(server, tmp_path / "rows", tasks=1, retries=9)
    assert code == 2
    assert "refused: HTTP 503, 10 times; the same command goes on" in stderr
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert len(server.asked) == 10
    server.status = None
    counts = finished(server, tmp_path / "rows", tasks=1)
    assert counts["rows"] == 1
    assert counts["requests"] == {"answered": 2, "refused: HTTP 503": 10}
    nowhere = "http://127.0.0.1:1"
    code, _, stderr = command(server, tmp_path / "other", endpoint=nowhere, retries=1)
    assert code == 2
    assert "connection error" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"endpoint": "localhost:8000"}, "--endpoint: expected a URL"),
        ({"endpoint": "http://[bad"}, "--endpoint: expected a URL"),
        ({"endpoint": "http://host:port"}, "--endpoint: expected a URL"),
        ({"endpoint": "http://"}, "--endpoint: expected a URL"),
        ({"endpoint": "http://a b"}, "--endpoint: expected a URL"),
        ({"timeout": "nan"}, "--timeout"),
        ({"tasks": 0}, "--tasks"),
        ({"retries": -1}, "--retries"),
        ({"timeout": 0}, "--timeout"),
    ),
)
def test_bad_flags(serve, tmp_path, changes, message):
    code, _, stderr = command(serve(), tmp_path / "rows", **changes)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- a server that is not to be trusted


@pytest.mark.parametrize("status", (301, 302, 303, 307, 308))
def test_the_key_follows_no_redirect(serve, tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    other = serve()
    with SpokenServer(f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/v1/\r\n\r\n") as server:
        code, _, stderr = command(server, tmp_path / "rows", tasks=1)
    assert code == 2
    assert f"HTTP {status}" in stderr
    assert "Bearer secret" in server.heard  # control: the endpoint itself has it
    assert not other.asked


class SpokenServer:
    """Answers a request with the given text, a character every `pause` seconds."""

    def __init__(self, text, pause=0, repeat=1):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.parts = [text[:1], *text[1:]] if pause else [text]
        self.pause, self.repeat, self.heard = pause, repeat, ""
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with contextlib.suppress(OSError), connection:
                    self.speak(connection)

    def speak(self, connection):
        while "messages" not in self.heard:
            self.heard += connection.recv(2**16).decode()
        for _ in range(self.repeat):
            for part in self.parts:
                connection.sendall(part.encode())
                time.sleep(self.pause)


@pytest.mark.parametrize(
    "text",
    (
        "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + "x" * 1000,
        "HTTP/1.1 200 OK\r\n" + "X-Slow: yes\r\n" * 90,
    ),
)
def test_a_slow_drip_ends_in_time(tmp_path, text):
    """Each byte comes well within the time of a request, all of them would take 50 s."""
    with SpokenServer(text, pause=0.05) as server:
        begin = time.monotonic()
        code, _, stderr = command(server, tmp_path / "rows", tasks=1, retries=0, timeout=0.5)
    assert 0.4 < time.monotonic() - begin < 5
    assert code == 2
    assert "refused: time-out, 1 times" in stderr


def test_an_endless_answer_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "LONGEST_REPLY", 2**20)
    text = "HTTP/1.1 200 OK\r\n\r\n" + "x" * 2**16
    with SpokenServer(text, repeat=10**6) as server:
        code, _, stderr = command(server, tmp_path / "rows", tasks=1, retries=0, timeout=20)
    assert code == 2
    assert b"bad: too long" in journal_of(tmp_path / "rows").read_bytes()


def test_an_answer_that_is_cut_off_is_asked_for_again(tmp_path):
    with SpokenServer("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx") as server:
        code, _, stderr = command(server, tmp_path / "rows", tasks=1, retries=0)
    assert code == 2
    assert "refused: connection error, 1 times" in stderr


@pytest.mark.parametrize("key", ("sec\nret", "sec\r\nX-Evil: ret", "secr\u00e9t", "secret\u65e5"))
def test_a_key_that_no_header_can_hold(serve, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve()
    code, _, stderr = command(server, tmp_path / "rows", tasks=1)
    assert code == 2
    assert stderr == "error: OPENAI_API_KEY: expected one line of ASCII\n"
    assert not server.asked


@pytest.mark.parametrize("name", ("rows.jsonl", "rows.jsonl.json"))
def test_a_file_of_the_user_stays(name, serve, tmp_path):
    own = tmp_path / name
    own.write_text("mine")
    code, _, stderr = command(serve(), tmp_path / "rows.jsonl", tasks=1)
    assert code == 2
    assert f"{own}: is in the way, not from this command" in stderr
    assert own.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [own]


# ---- training on the rows


def trained(base, folder, *data):
    """Two steps of train.py in this process -> its log."""
    run = folder / "run"
    settings = "--steps 2 --batch 4 --negatives 2 --warmup 1 --max-length 128 --micro-tokens 512"
    settings += " --lora-rank 2 --dtype float32 --no-compile --held-out 4"
    line = ["train.py", *data, "--out", run, *settings.split(), "--init", base]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(part) for part in line])
        try:
            train.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]


def test_train_accepts_the_rows(finished_run, serve, base, tmp_path):
    _, out, _ = finished_run
    last = trained(base, tmp_path / "own", "--data", out)[-1]
    assert last["step"] == 2
    assert last["loss"] > 0
    finished(serve(), tmp_path / "all.jsonl.gz", kind="all", tasks=10)
    entry = {"name": "synthetic", "file": "all.jsonl.gz", "kind": "synthetic"}
    entry |= {"instruction": "", "stages": [1, 2]}
    recipe = {"base": str(base), "seed": 0, "datasets": [entry], "stages": {"1": {}, "2": {}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    last = trained(base, tmp_path / "recipe", "--recipe", tmp_path / "recipe.json")[-1]
    assert last["step"] == 2
    assert last["loss"] > 0
    with pytest.raises(InputError, match="query"):  # control: the counts are no rows
        trained(base, tmp_path / "counts", "--data", f"{out}.json")
