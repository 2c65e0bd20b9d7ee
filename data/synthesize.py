"""Synthetic rows from a language model on an OpenAI-compatible server (section 4.3).

    python data/synthesize.py --endpoint http://localhost:8000 --model NAME
    python train.py --data runs/synthetic.jsonl

There are two prompts: one brainstorms about 20 tasks a request, the other writes one row for a
task, --rows times. This is the scheme of E5-mistral (Wang et al. 2024, arXiv 2401.00368) in our own
words, which synthesize.json holds. OPENAI_API_KEY is sent if it is set, to the endpoint and nowhere
else: no redirect is followed and no proxy is used.

Every outcome is a line of FILE.journal, written before its task's next request: the same command
continues where it was stopped, and may then ask for other kinds, more tasks or more retries. FILE
has the rows in the order of their tasks, whatever the concurrency; FILE.json has the counts.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import re
import socket
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from threading import Event, Timer
from urllib.parse import urlsplit

from tqdm import tqdm

if not __package__:  # python data/synthesize.py: imports start at the project, not at data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.commands import Flags, InputError, one_line, run_command
from data.files import read_json, write_rows
from data.rows import is_text, is_unicode

PROMPTS = read_json(Path(__file__).with_suffix(".json"))
PLACEHOLDERS = set(re.findall("<[^<>]+>", json.dumps(PROMPTS)))  # what an answer has to replace
TASKS_A_REQUEST = 20
BACKOFF = 0.5  # seconds before a refused request is repeated, doubled each time
LONGEST_WAIT = 60  # seconds
LONGEST_REPLY = 2**23  # bytes
V1 = "/v1/chat/completions"


def main():
    args = parse_arguments()
    path = Path(f"{args.out}.journal")
    for out in (args.out, f"{args.out}.json"):
        if Path(out).exists() and not path.exists():
            raise InputError(f"{out}: is in the way, not from this command: it has no journal")
    journal = Journal(path, args)
    pool = ThreadPoolExecutor(args.concurrency)
    rows = []
    counts = {}
    try:
        for kind in PROMPTS["kinds"]:
            if args.kind in (kind, "all"):
                new_rows, counts[kind] = generate(journal, pool, kind)
                rows += new_rows
    finally:
        journal.stop.set()
        pool.shutdown(cancel_futures=True)
        journal.file.close()
    if not rows:
        reasons = f"{args.out}.journal has the reasons"
        raise InputError(f"{args.endpoint}: no usable answer; {reasons}")
    counts = {"rows": len(rows), **counts, "requests": journal.count_outcomes()}
    write_rows(args.out, rows)
    write_rows(f"{args.out}.json", [counts])
    print(json.dumps(counts))


def parse_arguments():
    parser = Flags(__doc__)
    flag = parser.add_argument
    default = "default: %(default)s"
    flag("--kind", choices=(*PROMPTS["kinds"], "all"), default="all", help=default)
    flag("--endpoint", required=True, help="URL of the server")
    flag("--model", required=True, help="its name on the server")
    flag("--out", default="runs/synthetic.jsonl", help=default)
    flag("--tasks", type=int, default=100, help=f"of each kind; {default}")
    flag("--rows", type=int, default=1, help=f"of each task; {default}")
    flag("--concurrency", type=int, default=8, help=f"requests at a time; {default}")
    flag("--seed", type=int, default=0, help=default)
    flag("--timeout", type=float, default=120.0, help=f"seconds; {default}")
    flag("--retries", type=int, default=5, help=f"of a request; {default}")
    flag("--max-tokens", type=int, default=2048, help=f"of an answer; {default}")
    args = parser.parse_args()
    check_endpoint(args.endpoint)
    api_key()
    return args


def check_endpoint(endpoint):
    try:
        parts = urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        known = False
    if not known or not (endpoint.isascii() and endpoint.isprintable() and " " not in endpoint):
        raise InputError(f"--endpoint: expected a URL, got {endpoint!r}")


def api_key():
    key = os.environ.get("OPENAI_API_KEY", "none").strip()
    if not key.isascii() or not key.isprintable():  # the message must not show it
        raise InputError("OPENAI_API_KEY: expected one line of ASCII")
    return key


# ---- tasks and rows


def generate(journal, pool, kind):
    """Tasks of a kind and rows for each -> (rows, counts)."""
    tasks, duplicates = brainstorm(journal, pool, kind)
    chosen = list(tasks.values())[: journal.args.tasks]
    numbers = range(journal.args.rows)
    keys = [(*key, number) for key, _ in chosen for number in numbers]
    texts = [task for _, task in chosen for _ in numbers]
    answers = tqdm(pool.map(journal.ask, keys, texts), desc=kind, total=len(keys))
    rows = []
    for task, answer in zip(texts, answers, strict=True):
        if answer is not None:
            query, positive, *negatives = answer
            rows.append({"query": query, "pos": [positive], "neg": negatives, "prompt": task})
    return rows, {"tasks": len(chosen), "duplicates": duplicates}


def brainstorm(journal, pool, kind):
    """Asks for tasks until there are enough or nothing new comes.

    -> ({task in lower case: (where it first came, as the beginning of its rows' keys, task)}, how
    many came again)
    """
    args = journal.args
    tasks = {}
    duplicates = 0
    requests = 0
    prompts = prompts_hash(kind)
    while len(tasks) < args.tasks:
        known = len(tasks)
        more = math.ceil((args.tasks - known) / TASKS_A_REQUEST)
        numbers = range(requests, requests + more)
        keys = [(args.model, args.seed, kind, prompts, number) for number in numbers]
        requests += more
        for key, answer in zip(keys, pool.map(journal.ask, keys), strict=True):
            for place, text in enumerate(answer or []):
                task = bare_task(text)
                if task.casefold() in tasks:
                    duplicates += 1
                elif task:
                    tasks[task.casefold()] = ((*key, place), task)
        if len(tasks) == known:
            break
    return tasks, duplicates


def bare_task(text):
    """A task in one line, without the "Instruct:" that is added to it later."""
    task = " ".join(text.split())
    while task.startswith("Instruct:"):
        task = task.removeprefix("Instruct:").strip()
    return task


def prompts_hash(kind):
    """Stands in a key for the prompts of its kind: after a change of them all is asked anew."""
    content = json.dumps([PROMPTS["varied"], PROMPTS["kinds"][kind]])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def prompt_for(key, task):
    """The prompt of a key. What varies in it is drawn at random, for a key always the same."""
    kind = PROMPTS["kinds"][key[2]]
    rng = random.Random(repr(key))
    drawn = {}
    for name, values in PROMPTS["varied"].items():
        drawn[name] = rng.choice(values)
    if task:
        return kind["example"].format(task=task, **drawn)
    return kind["brainstorm"].format(**drawn)


class Journal:
    """The outcomes of all requests, a line [key, texts or the reason why there are none] each.

    The key of a brainstorm is (model, seed, kind, hash of the prompts, its number); that of a row
    has two more members, the place of its task in the brainstorm's answer and its number among the
    rows of that task. Several threads may ask at a time, each for another key.
    """

    def __init__(self, path, args):
        self.args = args
        self.stop = Event()  # set: no more requests
        self.outcomes = defaultdict(list)  # key: outcomes of its requests
        self.file = open_locked(path)
        self.read(path)

    def read(self, path):
        """Reads the outcomes of earlier runs; drops the half line that a kill may have left."""
        self.file.seek(0)
        content = self.file.read()
        *lines, half = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            key, outcome = parse_entry(line, f"{path}:{number}")
            self.outcomes[key].append(outcome)
        if not b"[[".startswith(half[:2]):  # not of a journal
            raise InputError(f"{path}:{len(lines) + 1}: expected a key and an outcome")
        self.file.truncate(len(content) - len(half))

    def write(self, key, outcome):
        self.outcomes[key].append(outcome)
        self.file.write(json.dumps([key, outcome]).encode() + b"\n")
        self.file.flush()

    def ask(self, key, task=""):
        """The answer to a key's prompt, from the journal or the server -> texts.

        None after too many bad answers; InputError after too many refusals.
        """
        args = self.args
        prompt = prompt_for(key, task)
        refusals = 0
        while True:
            outcomes = self.outcomes[key]
            if outcomes and not isinstance(outcomes[-1], str):
                return outcomes[-1]
            bad = sum(outcome.startswith("bad") for outcome in outcomes)
            if self.stop.is_set() or bad > args.retries:
                return None
            outcome = self.attempt(key, task, prompt, number=len(outcomes))
            self.write(key, outcome)
            if isinstance(outcome, str) and outcome.startswith("refused"):
                refusals += 1
                if refusals > args.retries:
                    message = f"{outcome}, {refusals} times; the same command goes on"
                    raise InputError(f"{args.endpoint}: {message}")
                self.stop.wait(min(LONGEST_WAIT, BACKOFF * 2 ** (refusals - 1)))

    def attempt(self, key, task, prompt, number):
        """One request -> its outcome: texts, or the reason why there are none."""
        seed = random.Random(f"{key} {number}").getrandbits(31)
        kind = PROMPTS["kinds"][key[2]]
        try:
            reply = request(self.args, prompt, seed)
            if task:
                return parse_row(reply, kind["keys"])
            return parse_tasks(reply)
        except Failed as error:
            return str(error)

    def count_outcomes(self):
        """{"answered" or reason: requests} of this model and seed, earlier runs included."""
        counts = Counter()
        for (model, seed, *_), outcomes in self.outcomes.items():
            if (model, seed) != (self.args.model, self.args.seed):
                continue
            for outcome in outcomes:
                if isinstance(outcome, str):
                    counts[outcome] += 1
                else:
                    counts["answered"] += 1
        return dict(sorted(counts.items()))


def open_locked(path):
    """Opens a file to read and to append to, for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    except OSError as error:
        raise InputError(f"{path}: expected a file to write: {one_line(error)}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{path}: in use by another run: {one_line(error)}") from error
    return file


def parse_entry(line, where):
    """A line of the journal -> (key, outcome)."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        message = f"expected a key and an outcome: {one_line(error)}"
        raise InputError(f"{where}: {message}") from error
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
        raise InputError(f"{where}: expected a key and an outcome")
    key, outcome = entry
    return tuple(key), outcome


# ---- one request


class Failed(Exception):
    """No usable answer: "bad: reason" or "refused: reason"."""


def request(args, prompt, seed):
    """The server's reply to a prompt -> bytes.

    Raises Failed, or InputError where repeating cannot help.
    """
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": prompt}],
        "seed": seed,
        "temperature": 1,
        "top_p": 1,
        "max_tokens": args.max_tokens,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key()}"}
    url = urlsplit(args.endpoint.rstrip("/").removesuffix("/v1").rstrip("/"))
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(url.hostname, url.port, timeout=args.timeout)
    end = time.monotonic() + args.timeout
    try:
        with contextlib.closing(connection), cut_off(connection, args.timeout):
            connection.request("POST", url.path + V1, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            status, reply = response.status, response.read(LONGEST_REPLY + 1)
    except (OSError, HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= end
        raise Failed("refused: time-out" if late else "refused: connection error") from error
    if time.monotonic() >= end:
        raise Failed("refused: time-out")
    if status in (408, 429) or status >= 500:  # too late, too much, the server's fault
        raise Failed(f"refused: HTTP {status}")
    if status != 200:
        said = " ".join(reply[:300].decode(errors="replace").split())
        raise InputError(f"{url.geturl()}{V1}: HTTP {status}: {said}")
    if len(reply) > LONGEST_REPLY:
        raise Failed("bad: too long")
    if response.length:  # of its bytes that did not come
        raise Failed("refused: connection error")
    return reply


@contextlib.contextmanager
def cut_off(connection, seconds):
    """Connects, and ends the connection after so many seconds, however slowly its bytes come."""
    connection.connect()
    timer = Timer(seconds, shut, [connection.sock])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shut(sock):
    with contextlib.suppress(OSError):  # it is closed
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the plain socket's, below TLS


def parse_tasks(reply):
    """A reply to a brainstorm -> a list of tasks."""
    found = content_of(reply)
    if not isinstance(found, list) or not found:
        raise Failed("bad: wrong keys")
    check_texts(found)
    return found


def parse_row(reply, keys):
    """A reply to a task -> the texts of a JSON object of exactly these keys, in their order."""
    found = content_of(reply)
    if not isinstance(found, dict) or set(found) != set(keys):
        raise Failed("bad: wrong keys")
    texts = [found[key] for key in keys]
    check_texts(texts)
    different = {text.strip().casefold() for text in texts}
    if len(different) < len(texts):
        raise Failed("bad: same text")
    return texts


def content_of(reply):
    """The JSON value that a model's message consists of, with or without a fence of backquotes."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"].strip()
        fenced = re.fullmatch("```(?:json)?(.*)```", text, re.DOTALL)
        if fenced:
            text = fenced[1]
        return json.loads(text)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Failed("bad: not JSON") from error


def check_texts(texts):
    """Raises Failed if any of them is no text, or one of the prompt's placeholders is left."""
    for text in texts:
        if not is_text(text) or not is_unicode(text):
            raise Failed("bad: not text")
    for text in texts:
        if any(placeholder in text for placeholder in PLACEHOLDERS):
            raise Failed("bad: placeholder")


if __name__ == "__main__":
    run_command(main)
