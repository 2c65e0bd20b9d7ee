"""How near two texts are, by hand; planted leaks are dropped and honest rows are kept."""

import numpy as np
import pytest

from data import leakage
from data.commands import InputError
from data.files import ROOT, json_lines, write_rows
from data.recipes import read_recipe
from data.rows import read_rows

OWN = "The quick brown fox jumps over the lazy dog near the old river bank at dawn."
UNRELATED = [f"Something about number {i} and its uses in trade" for i in range(30)]


@pytest.fixture(scope="module")
def held_out():
    """Every evaluated text; WordSim-353's single words are no texts."""
    texts = []
    for path in sorted((ROOT / "data/eval").glob("*.jsonl.gz")):
        if path.name != "sts.jsonl.gz":
            for _, row in json_lines(path):
                texts += leakage.strings(row)
    return texts


@pytest.mark.parametrize(
    "text, least_bm25, most_bm25, least_runs, most_runs",
    [
        (OWN, 0.98, 1.02, 1, 1),
        (OWN.upper() + "!!", 0.98, 1.02, 1, 1),
        (OWN.replace("lazy", "sleepy"), 0.8, 0.999, 0.5, 0.999),  # 5 of the 12 runs have the word
        (" ".join(reversed(OWN.split())), 0.98, 1.02, 0, 0),
        ("A treatise on the mating habits of river fish.", 0, 0.3, 0, 0),
        ("the the the the the", 0, 0.3, 0, 0),
    ],
)
def test_overlap(text, least_bm25, most_bm25, least_runs, most_runs):
    against = [OWN, *UNRELATED]
    assert least_bm25 <= leakage.bm25_overlap([text], against)[0] <= most_bm25
    assert least_runs <= leakage.run_overlap([text], against)[0] <= most_runs


def test_bm25_by_hand():
    """Two short texts, written out."""
    idf = np.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    idf_of_unknown = np.log(1 + 2.5 / 0.5)
    mean_length = 2

    def weight(tf, length):
        return tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean_length))

    shared = idf * weight(1, 3)
    document = idf * (weight(1, 3) + weight(2, 3))
    query = idf * weight(1, 2) + idf_of_unknown * weight(1, 2)
    overlap = leakage.bm25_overlap(["a x"], ["a b b", "c"])[0]
    assert overlap == pytest.approx(shared / max(document, query))


def test_runs_by_hand():
    against = ["one two three four five six"]
    texts = ["two three four five six seven", "one two", "ONE, two three four five six!"]
    assert leakage.run_overlap(texts, against).tolist() == [0.5, 0, 1]
    assert leakage.runs("a b c d", 3) == {"a b c", "b c d"}
    assert leakage.runs("a b", 3) == {"a b"}


def test_one_chunk_or_several():
    """More texts than are scored at once give the same shares one by one."""
    rng = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(50)]
    texts = [" ".join(rng.choice(vocabulary, 8)) for _ in range(600)]
    against = [" ".join(rng.choice(vocabulary, 8)) for _ in range(40)]
    whole = leakage.bm25_overlap(texts, against)
    for place in (0, 255, 256, 599):
        assert leakage.bm25_overlap([texts[place]], against)[0] == pytest.approx(whole[place])


def test_the_recipes_measures():
    """Every leakage filter of the paper's recipe names a measure that there is."""
    datasets = read_recipe(ROOT / "data/paper.json")["datasets"]
    measures = {entry["leakage"]["by"] for entry in datasets if "leakage" in entry}
    assert measures == set(leakage.OVERLAPS)


@pytest.mark.parametrize("by, threshold", [("bm25", 0.8), ("runs", 0.5)])
def test_planted_leaks(by, threshold, held_out):
    """20 rows whose text is a held-out one in other dress, and 20 honest ones."""
    long = [text for text in held_out if len(set(leakage.words(text))) > 14]
    chosen = long[:: len(long) // 20][:20]
    planted = [{"query": f"{text.lower()} zzyzx", "pos": ["zzyzx"]} for text in chosen]
    honest = list(read_rows(ROOT / "data/wikipedia_sentence.jsonl.gz")[-20:])
    kept, dropped = leakage.drop_leaks(planted + honest, held_out, by, threshold)
    assert len(planted) == 20
    assert kept == honest
    assert [row["query"] for row in dropped] == [row["query"] for row in planted]
    assert all(row["overlap"] >= threshold for row in dropped)


def test_no_texts():
    for items, against in (([], ["a"]), ([{"text": "a"}], []), ([{"text": "..."}], ["a"])):
        with pytest.raises(InputError, match="^leakage: expected texts on both sides$"):
            leakage.drop_leaks(items, against, "bm25", 0.8)


@pytest.mark.parametrize("by", ["bm25", "runs"])
def test_what_is_ignored_is_not_compared(by):
    """Ids and the like, which two unrelated files may share."""
    ignored = {"source": "wikipedia", "language": "en", "dataset": "a set", "_id": "doc 7"}
    row = {"query": "one lake", "pos": ["deep water"]} | ignored
    assert leakage.strings(row) == ["one lake", "deep water"]
    against = leakage.strings({"query": "two stones", "pos": ["hard rock"]} | ignored)
    assert leakage.drop_leaks([row], against, by, 0.8) == ([row], [])


# rows of which any text has 0.8 of a held-out text's BM25 score, and half their runs of 5 words
NEAR = {
    "sentiment": (0, 1),
    "spam": (0, 4),
    "topics": (0, 72),
    "topics_names": (0, 12),
    "trec": (9, 454),
    "trec_names": (1, 52),
    "wikipedia_description": (0, 7),
    "wikipedia_question": (0, 12),
    "wikipedia_sentence": (0, 2),
    "wikipedia_title": (2, 4),
}


def test_shipped_sets_are_listed():
    shipped = (ROOT / "data").glob("*.jsonl.gz")
    assert set(NEAR) == {path.name.split(".")[0] for path in shipped}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR)
def test_shipped_sets(name, held_out):
    """The shipped training rows against data/eval; of label-based sets the queries."""
    rows = read_rows(ROOT / f"data/{name}.jsonl.gz")
    if name.endswith("_names"):
        rows = [{"query": row["query"]} for row in rows]
    _, by_bm25 = leakage.drop_leaks(rows, held_out, "bm25", 0.8)
    _, by_runs = leakage.drop_leaks(rows, held_out, "runs", 0.5)
    assert (len(by_bm25), len(by_runs)) == NEAR[name]


def test_no_file_is_replaced(tmp_path):
    """Neither the output nor what is written beside it, if either is there already."""
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    write_rows(rows, [{"query": "a lake", "pos": ["deep water"]}])
    write_rows(held, [{"query": "a stone", "pos": ["hard rock"]}])
    for name in ("mine.jsonl", "kept.dropped.jsonl"):
        (tmp_path / name).write_text("mine\n")
        out = tmp_path / name.replace("kept.dropped", "kept")
        with pytest.raises(InputError, match=f"{name}: is there already; use another --out"):
            leakage.check_files(rows, held, "bm25", 0.8, out)
        assert (tmp_path / name).read_text() == "mine\n"
    counts = leakage.check_files(rows, held, "bm25", 0.8, tmp_path / "new.jsonl")
    assert counts["kept"] == 1  # control
