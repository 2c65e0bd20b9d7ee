"""The command mine.py in processes of its own: memory, kills, ranks, and the shipped negatives."""

import signal
import subprocess
import sys
import time

import mine_scale
import pytest
from conftest import ROOT

from data.files import write_rows
from data.rows import read_rows


@pytest.mark.slow
def test_bounded_memory_recall_and_kills():
    found = mine_scale.scale(queries=400, documents=20000, width=1024, mib=24)
    print(found)
    assert found["peak_mib"] <= 24
    assert found["loose_mib"] > 48  # control: vectors in memory
    assert found["recall"] == 1
    assert found["same"]
    assert 2 <= found["shards_kept"] < 6


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signals(tmp_path, number):
    """One line, status 130, nothing half done; the same command goes on with the next shard."""
    mine_scale.write_world(tmp_path, 40, 50000)
    flags = ("out", 64, 1000, ["--negatives", 5])
    process = mine_scale.start(tmp_path, *flags, stderr=subprocess.PIPE)
    while process.poll() is None and len(mine_scale.shard_times(tmp_path)) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "stopped; the same command goes on"
    assert "Traceback" not in err
    before = mine_scale.shard_times(tmp_path)
    assert len(list((tmp_path / "cache/maps").iterdir())) == len(before) < 50
    assert not list((tmp_path / "out").iterdir())
    mine_scale.finish(tmp_path, *flags)
    assert before.items() < mine_scale.shard_times(tmp_path).items()
    assert len(read_rows(tmp_path / "out/rows.jsonl")) == 40


@pytest.mark.slow
def test_ranks_are_one_process(tmp_path):
    mine_scale.write_world(tmp_path, 40, 1000)
    for ranks in (2, 1):
        flags = ["--negatives", 5]
        mine_scale.finish(tmp_path, str(ranks), 64, 100, flags, ranks=ranks)
        maps = list((tmp_path / "cache/maps").iterdir())
        assert len(maps) == 10 + 1
        for path in maps:
            path.unlink()
    one = list(read_rows(tmp_path / "1/rows.jsonl"))
    two = list(read_rows(tmp_path / "2/rows.jsonl"))
    assert one == two
    assert all(len(row["neg"]) == 5 for row in one)


@pytest.mark.slow
def test_planted_false_negatives():
    """What a rule is for: it drops the unlabelled answers and keeps the hard negatives."""
    found = mine_scale.rules(queries=100, documents=3000, width=1024)
    print(found)
    assert found["naive"][:2] == (0, 0)
    false, hard, false_in_rows = found["percpos"]
    assert false > 0.8
    assert hard < 0.1
    assert false_in_rows < 0.2 < found["naive"][2]


@pytest.mark.slow
def test_shipped_negatives_are_reproduced(tmp_path):
    """data/README.md's command on some rows: what was best of all documents is best of these."""
    shipped = read_rows(ROOT / "data/wikipedia_sentence.jsonl.gz")[:60]
    bare = [
        {"query": row["query"], "pos": row["pos"], "neg": sorted(row["neg"])} for row in shipped
    ]
    write_rows(tmp_path / "rows.jsonl", bare)
    flags = "--model minilm --dtype float32 --negatives 4 --top-k 1000 --data rows.jsonl --out out"
    command = [sys.executable, ROOT / "mine.py", *flags.split()]
    subprocess.run(command, check=True, cwd=tmp_path)
    again = read_rows(tmp_path / "out/rows.jsonl")
    wanted = sum(len(row["neg"]) for row in shipped)
    same = [len({*a["neg"]} & {*b["neg"]}) for a, b in zip(shipped, again, strict=True)]
    assert sum(same) >= 0.99 * wanted > 200
