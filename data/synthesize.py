"""Synthetic rows from a language model behind an OpenAI-compatible server, by two prompts (section 4.2).

    python data/synthesize.py --endpoint http://localhost:8000 --model NAME --out runs/synthetic.jsonl
    torchrun train.py --data runs/synthetic.jsonl

The first prompt brainstorms about 20 tasks a request, the second writes one row of a task: the scheme of
E5-mistral (Wang et al. 2024, arXiv 2401.00368) in our own words, which synthesize.json holds. OPENAI_API_KEY is
sent if it is set. Every outcome is a line of FILE.journal, written before its task's next request: the same
command goes on where it was stopped, and may then ask for other kinds, more tasks or more retries. FILE has the
rows in the order of their tasks, whatever the concurrency; FILE.json has the counts.
"""

import argparse
import fcntl
import json
import os
import random
import re
import sys
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from threading import Event

from tqdm import tqdm

if not __package__:  # python data/synthesize.py
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from data.prepare import write_rows
from nvembed import InputError, attempt, expect, read_json, run

PROMPTS = read_json(Path(__file__).with_suffix(".json"))
PLACEHOLDER = re.compile("|".join(re.findall("<[^<>]+>", json.dumps(PROMPTS))))
NOT_TEXT = re.compile("^\\s*$|[\ud800-\udfff]")  # empty, or half a surrogate pair, which no file can hold
BACKOFF = 0.5  # seconds before a refused request is repeated, doubled each time
DEFAULTS = {"endpoint": "", "model": "", "out": "runs/synthetic.jsonl", "tasks": 100, "concurrency": 8}
DEFAULTS |= {"seed": 0, "timeout": 120.0, "retries": 5, "max-tokens": 2048}


class Failed(Exception):
    """No usable answer: "bad: reason" or "refused: reason"."""


def request(args, prompt, seed):
    """The server's reply to a prompt -> bytes. Raises Failed, or InputError where repeating cannot help."""
    body = {"model": args.model, "messages": [{"role": "user", "content": prompt}], "seed": seed}
    body |= {"temperature": 1, "top_p": 1, "max_tokens": args.max_tokens}
    url = re.sub("/*(/v1)?/*$", "", args.endpoint, count=1) + "/v1/chat/completions"
    posted = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    posted.add_header("Authorization", f"Bearer {os.environ.get('OPENAI_API_KEY', 'none').strip()}")
    try:
        with urllib.request.urlopen(posted, timeout=args.timeout) as response:
            return response.read()
    except urllib.request.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise Failed(f"refused: HTTP {error.code}") from None
        detail = attempt(url, error.read, 300).decode(errors="replace").split()
        raise InputError(f"{url}: HTTP {error.code}: {' '.join(detail)}") from None
    except (OSError, HTTPException) as error:
        late = isinstance(getattr(error, "reason", error), TimeoutError)
        raise Failed("refused: time-out" if late else "refused: connection error") from None


def parse(reply, keys):
    """Texts of a reply: the values of a JSON object of exactly `keys`, or, without keys, a list of tasks."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"].strip()
        fenced = re.fullmatch("```(?:json)?(.*)```", text, re.DOTALL)
        found = json.loads(fenced[1] if fenced else text)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise Failed("bad: not JSON") from None
    shape = type(found) is dict and found.keys() == {*keys} if keys else type(found) is list and found
    texts = [found[key] for key in keys] if keys and shape else found
    plain = shape and all(isinstance(text, str) and not NOT_TEXT.search(text) for text in texts)
    echo = plain and any(map(PLACEHOLDER.search, texts))
    same = plain and keys and len({text.strip().casefold() for text in texts}) < len(texts)
    reasons = {"wrong keys": not shape, "not text": not plain, "placeholder": echo, "same text": same}
    if any(reasons.values()):
        raise Failed(f"bad: {next(filter(reasons.get, reasons))}")
    return texts


class Journal:
    """Outcomes of all requests: lines [key, texts, or the reason that there are none]. A key is (model, seed,
    kind, number of the brainstorm) or, of a row, these and the place of its task in that answer."""

    def __init__(self, path, args):
        self.args, self.stop, self.outcomes = args, Event(), defaultdict(list)
        self.file = attempt(f"{path}: expected a file to write", open, path, "a+b")
        attempt(f"{path}: in use by another run", fcntl.flock, self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.file.seek(0)
        *lines, half = self.file.read().split(b"\n")
        self.file.truncate(self.file.tell() - len(half))  # what a kill left
        for number, line in enumerate(lines, 1):
            key, outcome = attempt(f"{path}:{number}: expected a key and an outcome", json.loads, line)
            self.outcomes[tuple(key)].append(outcome)

    def ask(self, key, task=""):
        """Texts that answer the key's prompt, from here or the server; None after too many bad ones."""
        outcomes, kind, refused = self.outcomes[key], PROMPTS["kinds"][key[2]], 0
        draw = random.Random(repr(key)).choice
        drawn = {name: draw(values) for name, values in PROMPTS["varied"].items()}
        prompt = kind["example" if task else "brainstorm"].format(task=task, **drawn)
        while not outcomes or isinstance(outcomes[-1], str):
            if self.stop.is_set() or sum(told.startswith("bad") for told in outcomes) > self.args.retries:
                return None
            seed = random.Random(f"{key} {len(outcomes)}").getrandbits(31)
            try:
                outcome = parse(request(self.args, prompt, seed), kind["keys"] if task else ())
            except Failed as error:
                outcome = str(error)
            outcomes.append(outcome)
            self.file.write(json.dumps([key, outcome]).encode() + b"\n")
            self.file.flush()
            if str(outcome).startswith("refused"):
                told = f"{self.args.endpoint}: {outcome}, {refused + 1} times; the same command goes on"
                expect(refused < self.args.retries, told)
                self.stop.wait(min(60, BACKOFF * 2**refused))
                refused += 1
        return outcomes[-1]


def brainstorm(journal, pool, kind):
    """-> {task in lower case: [(key, task) of each time that it came]}, until enough or nothing new comes."""
    args, tasks, start, before = journal.args, {}, 0, -1
    while before < len(tasks) < args.tasks:
        stop, before = start + -(-(args.tasks - len(tasks)) // 20), len(tasks)
        keys = [(args.model, args.seed, kind, number) for number in range(start, stop)]
        for key, texts in zip(keys, pool.map(journal.ask, keys), strict=True):
            for place, task in enumerate(" ".join(text.split()) for text in texts or ()):
                tasks.setdefault(task.casefold(), []).append(((*key, place), task))
        start = stop
    return tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", choices=(*PROMPTS["kinds"], "all"), default="all")
    for name, value in DEFAULTS.items():
        flag = {
            "type": type(value),
            "default": value,
            "required": value == "",
            "help": "default: %(default)s",
        }
        parser.add_argument(f"--{name}", **flag)
    args = parser.parse_args()
    positive = min(args.tasks, args.concurrency, args.timeout, args.max_tokens) > 0 <= args.retries
    expect(positive, "--tasks, --concurrency, --timeout, --max-tokens: expected > 0; --retries: >= 0")
    expect(re.match("https?://", args.endpoint), f"--endpoint: expected a URL, got {args.endpoint!r}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    journal, pool = Journal(Path(f"{args.out}.journal"), args), ThreadPoolExecutor(args.concurrency)
    rows, counts = [], {}
    try:
        for kind in [kind for kind in PROMPTS["kinds"] if args.kind in (kind, "all")]:
            tasks = brainstorm(journal, pool, kind)
            chosen = [times[0] for times in tasks.values()][: args.tasks]
            answers = tqdm(pool.map(journal.ask, *zip(*chosen, strict=True)), desc=kind, total=len(chosen))
            for (_, task), texts in zip(chosen, answers, strict=True):
                if texts:
                    rows.append({"query": texts[0], "pos": [texts[1]], "neg": texts[2:], "prompt": task})
            duplicates = sum(map(len, tasks.values())) - len(tasks)
            counts[kind] = {"tasks": len(chosen), "duplicates": duplicates}
    finally:
        journal.stop.set()
        pool.shutdown(cancel_futures=True)
    expect(rows, f"{args.endpoint}: no usable answer; {args.out}.journal has the reasons")
    ours = (found for key, found in journal.outcomes.items() if key[:2] == (args.model, args.seed))
    told = Counter(o if isinstance(o, str) else "answered" for found in ours for o in found)
    counts = {"rows": len(rows), **counts, "requests": dict(sorted(told.items()))}
    write_rows(args.out, rows)
    write_rows(f"{args.out}.json", [counts])
    print(json.dumps(counts))


if __name__ == "__main__":
    run(main)
