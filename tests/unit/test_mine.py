"""Each mining rule on planted scores, search against brute force, the command on planted teachers, in bounded memory
and after a kill, with controls that fail; mine_scale.py does the last at full size."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import mine
import mine_scale
import numpy as np
import pytest
import torch
from conftest import ROOT
from nvembed import InputError

from data.prepare import read_rows, write_rows

SCORES = np.array([[0.90, 0.80, 0.76, 0.75, 0.70, 0.10], [-0.05, -0.099, -0.1, -0.104, -0.106, -0.3]])
LOWEST = np.array([0.80, -0.1])  # lowest positive's score of each query
KNOWN = np.zeros_like(SCORES, bool)


def options(**changes):
    found = {"rule": "percpos", "top_k": 100, "negatives": 2, "seed": 0, "dtype": "float32", "memory": 1.0}
    found |= {"max_length": 64, "index": None, "distinct": False} | changes
    return argparse.Namespace(**({"bound": mine.RULES[found["rule"]]} | found))


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("naive", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ("shifted", [2, 3, 4, 5], [2, 3, 4, 5]),
        ("abs", [5], [0, 1, 2, 3, 4, 5]),  # 0.70 is not < 0.70
        ("margin", [4, 5], [5]),  # < 0.75, < -0.15
        ("percpos", [3, 4, 5], [4, 5]),  # < 0.76, < -0.105: further below where the score is negative
        ("sampled", [3, 4, 5], [4, 5]),
        ("top1", [3, 4, 5], [4, 5]),
    ],
)
def test_rules_on_planted_scores(rule, first, second):
    bound = 2 if rule == "shifted" else mine.RULES[rule]
    passed = mine.allowed(SCORES, LOWEST, KNOWN, rule, bound)
    assert [list(np.flatnonzero(line)) for line in passed] == [first, second]
    if rule == "percpos":  # control: 0.95 x the score would let -0.099 through
        assert not passed[1][2] and SCORES[1][2] < 0.95 * LOWEST[1]


def test_shift_counts_after_positives():
    known = KNOWN.copy()
    known[0, 0] = True
    assert list(np.flatnonzero(mine.allowed(SCORES, LOWEST, known, "shifted", 2)[0])) == [3, 4, 5]


def test_choose_first_and_random():
    usable = np.array([[False, True, True, False, True, True], [False] * 6])
    choose = lambda rule, i=0: [c.tolist() for c in mine.choose(usable, 2, rule, [(i, 0), (i, 1)])]
    assert choose("percpos") == [[1, 2], []]
    for rule, shares in (("sampled", [0, 0.5, 0.5, 0, 0.5, 0.5]), ("top1", [0, 1, 1 / 3, 0, 1 / 3, 1 / 3])):
        draws = [choose(rule, i) for i in range(300)]
        assert all(len(set(one)) == 2 and not none for one, none in draws) and choose(rule, 7) == draws[7]
        share = np.mean([np.isin(np.arange(6), one) for one, _ in draws], axis=0)
        assert np.abs(share - shares).max() < 0.1
        assert rule == "sampled" or all(one[0] == 1 for one, _ in draws)


# ---- search


def brute_force(queries, shards, k):
    """By products of the vectors as they are stored, in fp64; ties by row."""
    d = torch.cat(shards)
    scores = queries.to(d.dtype).double() @ d.double().T
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores.numpy(), order, axis=1), order


def random_vectors(n, width, seed=0):
    v = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [2**30, 2**19])
def test_search_is_brute_force(width, dtype, memory):
    """faiss, product and rescoring, one shard and several, blocks of any size: the same scores to the last bit."""
    q, d = random_vectors(40, width), random_vectors(1500, width, 1).to(dtype)
    d[700:750] = d[100:150]  # exact ties
    shards = list(d.split(400))
    scores, ids = mine.search(q, shards, 50, memory)
    true_scores, true = brute_force(q, shards, 50)
    assert (ids == true).all() and np.abs(scores - true_scores).max() < 1e-6
    both = (ids[:, :-1] + 600 == ids[:, 1:]).any()
    assert both and (np.diff(scores, axis=1) <= 0).all()  # a tie: the lower row first
    whole = mine.search(q, [d], 50)
    assert (whole[0] == scores).all() and (whole[1] == ids).all()
    every, _ = mine.search(q, shards, 5000, memory)
    assert every.shape == (40, 1500)


def test_products_in_bf16_alone_are_not_enough(monkeypatch):
    """Without rescoring the order is wrong; without the second search documents are lost, where scores crowd."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    q, common = random_vectors(30, 1024), random_vectors(1, 1024, 5)
    q, crowd = 0.9 * common + 0.1 * q, 0.9 * common + 0.03 * random_vectors(3000, 1024, 1)
    shards, seen = [crowd.bfloat16()], []
    scan = mine.scan
    monkeypatch.setattr(mine, "scan", lambda q, *args: seen.append(q.dtype) or scan(q, *args))
    scores, ids = mine.search(q, shards, 10)
    assert (ids == brute_force(q, shards, 10)[1]).all() and seen == [torch.bfloat16, torch.float32]
    raw = scan(q.bfloat16(), shards, 20, 2**30)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(raw[1].tolist(), ids.tolist(), strict=True)]) < 0.5
    seen.clear()
    mine.search(random_vectors(30, 1024), [random_vectors(3000, 1024, 1).bfloat16()], 10)
    assert seen == [torch.bfloat16]  # where they do not, nothing is searched twice


def test_approximate_index():
    q, shards = random_vectors(40, 32), list(random_vectors(4000, 32, 1).split(1000))
    true = brute_force(q, shards, 20)[1]
    recall = {}
    for text in ("Flat", "IVF32,Flat nprobe=32", "IVF32,Flat nprobe=2"):
        scores, ids = mine.search(q, shards, 20, index=mine.build_index(shards, text))
        recall[text] = np.mean([len({*a} & {*b}) / 20 for a, b in zip(ids, true, strict=True)])
        assert (
            np.abs(scores - (q @ torch.cat(shards).T).gather(1, torch.from_numpy(ids)).numpy()).max() < 1e-5
        )
    exact, all_lists, few = recall.values()
    assert exact == all_lists == 1 and 0.1 < few < 0.9
    scores, ids = mine.search(q[:1], shards, 2000, index=mine.build_index(shards, "IVF64,Flat nprobe=1"))
    assert np.isneginf(scores[0, -1])  # fewer found than asked for


# ---- rows

VECTORS = {"q": [1, 0], "true": [0.8, 0.6], "near": [0.79, 0.613], "fair": [0.7, 0.714], "far": [0, 1]}
OTHER = VECTORS | {"fair": [0, 1], "far": [0.7, 0.714]}  # another teacher's
CALLS = []
ROWS = [
    {"query": "q one", "pos": ["true 1"], "neg": ["near copy", "fair a", "far b", "FAR   b"]},
    # the same query: its positive is none of the first's negatives
    {"query": "Q  ONE", "pos": ["far other"], "neg": []},
    {"query": "q two", "pos": ["true 2", "fair positive"], "neg": [], "prompt": "Own task"},
]


def planted(folder, *_):
    """A planted encoder: a text's first word names its vector."""

    def encode(texts, tasks):
        CALLS.extend(zip(tasks, texts, strict=True))
        vectors = OTHER if folder.name == "other" else VECTORS
        v = np.array([vectors[mine.same(text).split()[0]] for text in texts], np.float32)
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    return encode


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with two planted teachers and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mine, "load_teacher", planted)
    CALLS.clear()
    for name in ("teacher", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    return tmp_path


def run_mine(args, teachers=("teacher",), corpus=(), symmetric=False):
    entry = {"instruction": "Task", "symmetric": symmetric}
    return mine.mine(ROWS, [(Path(name), name) for name in teachers], entry, args, corpus)


def sums(counts):
    return counts["candidates"] == sum(counts[name] for name in ("positive", "rule", "surplus", "kept"))


def test_false_negatives_counts_and_prompts(here):
    out, counts = run_mine(options(negatives=9))
    # not: near copy, true 2, far other, a duplicate
    assert out[0]["neg"] == ["fair a", "fair positive", "far b"] and out[0]["pos_scores"] == [0.8]
    assert out[0]["neg_scores"] == sorted(out[0]["neg_scores"], reverse=True)
    naive, _ = run_mine(options(negatives=9, rule="naive"))
    assert {"near copy", "true 2"} <= set(naive[0]["neg"]) and "far other" not in naive[0]["neg"]
    assert out[2]["pos_scores"] == [0.8, pytest.approx(0.7, abs=1e-3)]
    assert out[2]["neg"] == ["far b", "far other"]  # the lowest positive decides: fair a is too near to it
    assert (
        counts["documents"] == 7 and counts["candidates"] == 21 and counts["rows_short"] == 3 and sums(counts)
    )
    few, counts = run_mine(options(negatives=1))
    assert [len(row["neg"]) for row in few] == [1, 0, 1]  # nothing scores below the second's positive, 0
    assert counts["surplus"] > 0 and counts["rows_short"] == 1 and sums(counts)
    assert {task for task, text in CALLS if text == "q two"} == {"Own task"}
    assert {task for task, text in CALLS if text == "true 1"} == {""}
    CALLS.clear()
    run_mine(options(), symmetric=True)
    assert {task for task, text in CALLS if text == "true 1"} == {"Task"}


def test_several_teachers(here):
    one, other = (run_mine(options(negatives=2), [name])[0][0]["neg"] for name in ("teacher", "other"))
    assert one == ["fair a", "fair positive"] and other == ["far b", "fair a"]
    both = run_mine(options(negatives=4), ["teacher", "other"])[0][0]
    assert both["neg"] == [*one, *other] and len(both["neg_scores"]) == 4  # fair a is there twice
    distinct, counts = run_mine(options(negatives=4, distinct=True), ["teacher", "other"])
    assert distinct[0]["neg"] == [*one, "far b"] and sums(counts)
    assert len(run_mine(options(negatives=3), ["teacher", "other"])[0][0]["neg"]) == 3  # shares of 2 and 1
    assert ROWS[0]["neg"] == ["near copy", "fair a", "far b", "FAR   b"]


def test_maps_are_encoded_once_and_only_for_what_they_are(here, monkeypatch):
    monkeypatch.setattr(mine, "SHARD", 2)
    first = run_mine(options())
    assert len(CALLS) == 7 + 3 and len(list((here / "cache/maps").iterdir())) == 4 + 2
    assert run_mine(options(rule="sampled", negatives=1)) and len(CALLS) == 10
    sorted((here / "cache/maps").iterdir())[0].unlink()
    assert run_mine(options()) == first and 10 < len(CALLS) <= 12  # one shard only
    for changed in (options(max_length=32), options(dtype="bfloat16")):
        CALLS.clear()
        run_mine(changed)
        assert len(CALLS) == 10
    (here / "more.jsonl").write_text('{"text": "far more"}\n{"text": "fair more"}\n')
    CALLS.clear()
    assert run_mine(options(negatives=9), corpus=["more.jsonl"])[0][0]["neg"][0] == "fair more"
    assert len(CALLS) == 2  # a shard of its own, before those of the rows


def test_bad_vectors_and_corpora(here, monkeypatch):
    def check(text, message):
        (here / "more.jsonl").write_text(text)
        with pytest.raises(InputError, match=message):
            run_mine(options(), corpus=["more.jsonl"])

    check('{"text": "far"}\n{"text": 3}\n', r"more.jsonl:2: field 'pos': expected a list of non-empty")
    check('{"text": "far"}\n{"query": "q"}\n', r"more.jsonl:2: field 'pos'")
    check("far\n", r"more.jsonl:1: expected a JSON object")
    with pytest.raises(InputError, match=r"--memory 1e-07: expected 0.0000\d+ GiB or more"):
        run_mine(options(memory=1e-7))
    with pytest.raises(InputError, match="--index odd: .*could not parse"):
        run_mine(options(index="odd"))
    monkeypatch.setattr(mine, "load_teacher", lambda *_: lambda texts, _: np.full((len(texts), 2), np.nan))
    with pytest.raises(InputError, match="teacher: a vector that is not finite"):
        run_mine(options(max_length=5))


def test_command(here, monkeypatch, capsys):
    write_rows(here / "rows.jsonl.gz", ROWS)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["mine.py", "--data", "rows.jsonl.gz", *flags])
        mine.main()
        return capsys.readouterr().out

    teacher = ("--model", "teacher", "--dtype", "float32")
    assert "kept 4" in run(*teacher, "--out", "one", "--negatives", "2")
    assert "already mined so" in run(*teacher, "--out", "one", "--negatives", "2")
    assert "kept 2" in run(*teacher, "--out", "one", "--negatives", "1")  # other settings: mined again
    run(*teacher, "--out", "two", "--negatives", "1", "--memory", "0.001")
    files = [here / out / "rows.jsonl.gz" for out in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [len(row["neg"]) for row in read_rows(files[0])] == [1, 0, 1]
    assert json.loads((here / "one" / "rows.jsonl.gz.json").read_text())["counts"]["kept"] == 2
    (here / "teacher/config.json").write_text("{}")  # another teacher: mined again
    assert "kept 2" in run(*teacher, "--out", "one", "--negatives", "1")
    with pytest.raises(InputError, match="runs/stage1: no finished run"):
        run()
    with pytest.raises(InputError, match="none.jsonl"):
        run(*teacher, "--corpus", "none.jsonl")
    with pytest.raises(SystemExit) as stop:
        run("--rule", "odd")
    assert stop.value.code == 2


# ---- at scale, small


def test_bounded_memory_recall_and_kills():
    found = mine_scale.scale(queries=400, documents=20000, width=1024, mib=16)
    print(found)
    assert found["peak_mib"] <= 16 < 32 < found["loose_mib"]  # control: vectors in memory
    assert found["recall"] == 1 and found["same"] and 2 <= found["shards_kept"] < 6


def test_ranks_are_one_process(tmp_path):
    mine_scale.write_world(tmp_path, 40, 1000)
    for ranks in (2, 1):
        mine_scale.finished(tmp_path, str(ranks), 64, 100, ["--negatives", 5], ranks=ranks)
        maps = list((tmp_path / "cache/maps").iterdir())
        assert len(maps) == 10 + 1
        for path in maps:
            path.unlink()
    one, two = (read_rows(tmp_path / str(ranks) / "rows.jsonl") for ranks in (1, 2))
    assert one == two and all(len(row["neg"]) == 5 for row in one)


def test_planted_false_negatives():
    """What a rule is for: it drops the unlabelled answers and keeps the hard negatives."""
    found = mine_scale.rules(queries=100, documents=3000, width=1024)
    print(found)
    assert found["naive"][:2] == (0, 0) and found["percpos"][0] > 0.8 > 0.1 > found["percpos"][1]
    assert found["percpos"][2] < 0.2 < found["naive"][2]


def test_shipped_negatives_are_reproduced(tmp_path):
    """data/README.md's command on some rows: what was best of all documents is best of the shipped ones."""
    shipped = read_rows(ROOT / "data/wikipedia_sentence.jsonl.gz")[:60]
    bare = [{"query": row["query"], "pos": row["pos"], "neg": sorted(row["neg"])} for row in shipped]
    write_rows(tmp_path / "rows.jsonl", bare)
    flags = "--model minilm --dtype float32 --negatives 4 --top-k 1000 --data rows.jsonl --out out"
    subprocess.run([sys.executable, ROOT / "mine.py", *flags.split()], check=True, cwd=tmp_path)
    again = read_rows(tmp_path / "out/rows.jsonl")
    same = [len({*a["neg"]} & {*b["neg"]}) for a, b in zip(shipped, again, strict=True)]
    assert sum(same) >= 0.99 * sum(len(row["neg"]) for row in shipped) > 200
