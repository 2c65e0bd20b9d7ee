"""An OpenAI-compatible server that answers, or misbehaves, as a pure function of the request."""

import http.server
import json
import random
import re
import threading
import time

WORDS = [
    "river",
    "stone",
    "engine",
    "paper",
    "window",
    "garden",
    "winter",
    "music",
    "doctor",
    "bread",
    "island",
    "letter",
]
FAULTS = {  # of an answer: reason under which it is counted
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
GARBAGE = [name for name, reason in FAULTS.items() if reason.startswith("bad")]
REFUSALS = [name for name, reason in FAULTS.items() if reason.startswith("refused")]
TIMEOUT = 3  # seconds that the client waits; a late answer comes after twice that


def misbehaves(prompt, seed):
    """A fifth of the answers are garbage, 8 % of the requests get none."""
    rng = random.Random(f"{seed} {prompt} mood")
    draw = rng.random()
    if draw < 0.2:
        return rng.choice(GARBAGE)
    if draw < 0.28:
        return rng.choice(REFUSALS)
    return None


def behaves(prompt, seed):
    return None


def good_answer(prompt, rng, words):
    """What was asked for, as a model would give it: a list of tasks or the object of a row."""
    keys = re.findall('"([a-z_]+)": "<', prompt)
    if keys:
        return {key: f"{' '.join(rng.choices(words, k=8))} {rng.randrange(10**9)}" for key in keys}
    tasks = []
    for _ in range(20):
        given = rng.choice(words)
        wanted = rng.choice(words)
        tasks.append(f"Given a {given}, find the {wanted} {rng.randrange(3)}")
    return tasks


def replace_last(answer, text):
    if isinstance(answer, list):
        return [*answer[:-1], text]
    return answer | {list(answer)[-1]: text}


def spoil(fault, answer):
    """The answer with a fault -> text of the message, or None."""
    if fault == "null":
        return None
    if fault == "nested":
        return "[" * 99999
    if fault == "prose":
        return f"Sure! {json.dumps(answer)}"
    if fault == "cut":
        return json.dumps(answer)[:-9]
    if fault == "keys" and isinstance(answer, list):
        answer = {"tasks": answer}
    elif fault == "keys":
        answer = answer | {"why": "because"}
    last = {"empty": " ", "number": 7, "surrogate": "\ud800", "echo": "<a short text>"}
    if fault in last:
        answer = replace_last(answer, last[fault])
    if fault == "same":  # the last text is the first one
        first = answer[0] if isinstance(answer, list) else list(answer.values())[0]
        answer = replace_last(answer, first.upper())
    return json.dumps(answer)


class Server(http.server.ThreadingHTTPServer):
    """Listens at a free port. `fault(prompt, seed)` names a fault or returns None."""

    request_queue_size = 64

    def __init__(self, fault=behaves, status=None, words=WORDS):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = fault
        self.status = status  # of every answer, if given
        self.words = words
        self.asked = []  # (prompt, seed, fault) of each request
        self.keys = []  # what each sent to authorize itself
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        """A client that has gone is part of the test."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Silent."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = body["messages"]
        prompt = message["content"]
        seed = body["seed"]
        assert self.path == "/v1/chat/completions"
        assert message["role"] == "user"
        assert body["temperature"] == body["top_p"] == 1
        fault = server.fault(prompt, seed)
        server.asked.append((prompt, seed, fault))
        server.keys.append(self.headers["Authorization"])
        if fault == "dropped":
            self.connection.close()
            return
        if fault == "late":
            time.sleep(2 * TIMEOUT)
        text = spoil(fault, good_answer(prompt, random.Random(f"{prompt} {seed}"), server.words))
        if text and seed % 3 == 0:
            text = f"```json\n{text}\n```"
        self.reply(text, fault)

    def reply(self, text, fault):
        status = self.server.status or 200
        if fault in ("503", "429"):
            status = int(fault)
        content = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        if status != 200:
            content = {"error": {"message": "no such\nmodel"}}
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
