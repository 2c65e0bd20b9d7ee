"""Which rows a step sees, what is held out, the learning rate, where the instruction goes."""

import tracemalloc

import pytest
from helpers import a_batch, settings, some_rows

import train
from data import sampling
from data.commands import InputError
from data.files import write_rows
from data.rows import read_rows, text_id
from nvembed import NVEmbed


@pytest.mark.parametrize("batch", (4, 5))  # 5 does not divide the 21 rows: batches cross epochs
def test_blended_schedule_visits_each_row_once_an_epoch(batch):
    s, sizes = settings(batch=batch), [7, 3, 11]
    every = [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    seen = []
    for step in range(21):  # `batch` epochs
        seen.extend(sampling.schedule(sizes, s, step))
    assert len(seen) == 21 * batch
    orders = [[(d, i) for e, d, i in seen if e == epoch] for epoch in range(batch)]
    assert all(sorted(order) == every for order in orders)
    assert all(order != orders[0] for order in orders[1:])
    assert orders[0] != every
    assert [e for e, _, _ in seen] == sorted(e for e, _, _ in seen)
    sampling.epoch_order.cache_clear()  # of the step alone, not of earlier calls
    assert sampling.schedule(sizes, s, 5) == seen[5 * batch : 6 * batch]
    other = settings(batch=batch, seed=1)
    assert sampling.schedule(sizes, other, 5) != seen[5 * batch : 6 * batch]


def test_task_batches_are_of_one_set():
    sizes, s = [7, 3, 11], settings(batch=3, batching="task")
    batches = [sampling.schedule(sizes, s, step) for step in range(24)]  # 2 + 1 + 3 an epoch
    for batch in batches:
        assert len({d for _, d, _ in batch}) == 1
        assert len(set(batch)) == 3
    for epoch in range(4):
        sets = [batch[0][1] for batch in batches if batch[0][0] == epoch]
        assert sorted(sets) == [0, 0, 1, 2, 2, 2]
    every = {(d, i) for d in range(3) for i in range(sizes[d])}
    assert {(d, i) for batch in batches for _, d, i in batch} == every
    blended = [sampling.schedule(sizes, settings(batch=3), step) for step in range(24)]
    assert any(len({d for _, d, _ in batch}) > 1 for batch in blended)  # control


def test_held_out_rows_and_samples(tmp_path):
    rows, s = some_rows(50), settings()
    write_rows(tmp_path / "rows.jsonl", rows)
    file = str(tmp_path / "rows.jsonl")
    entry = {"name": "rows", "file": file, "instruction": "", "stages": [1]}
    (all_of_it,) = sampling.read_datasets([entry], 1, s)
    (capped,) = sampling.read_datasets([entry | {"samples": 7}], 1, s)
    kept = [row["query"] for row in all_of_it.rows]
    held = [row["query"] for row in all_of_it.held_out]
    assert len(kept) == 46
    assert len(held) == 4
    assert sorted(kept + held) == sorted(row["query"] for row in rows)
    assert len(capped.rows) == 7
    assert list(capped.held_out) == list(all_of_it.held_out)
    assert all(row in all_of_it.rows for row in capped.rows)
    (again,) = sampling.read_datasets([entry], 1, settings(seed=0))
    (other,) = sampling.read_datasets([entry], 1, settings(seed=1))
    assert list(again.rows) == list(all_of_it.rows)
    assert list(other.held_out) != list(all_of_it.held_out)
    (small,) = sampling.read_datasets([entry], 1, settings(held_out=64))
    assert len(small.held_out) == 5  # at most a tenth
    with pytest.raises(InputError, match="expected a data set of stage 2"):
        sampling.read_datasets([entry], 2, s)


def test_learning_rate():
    s = settings(steps=10, warmup=4, lr=2.0)
    rates = [train.learning_rate(s, i) / 2 for i in range(10)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    unwarmed = settings(steps=2, warmup=0)
    rates = [train.learning_rate(unwarmed, i) for i in (0, 1)]
    assert rates == pytest.approx([1e-2, 5e-3])
    long_warmup = settings(steps=2, warmup=500)
    assert train.learning_rate(long_warmup, 1) == pytest.approx(1e-2 * 2 / 500)


def test_instruction_goes_where_it_belongs(base):
    model, s, rows = NVEmbed.from_pretrained(base), settings(), some_rows(2, 1)
    rows[1]["prompt"] = "Other"  # of the row, instead of the data set's
    tasks = ("Find it", "Other")

    def documents(instructed):
        tokens = []
        for row, task in zip(rows, tasks, strict=True):
            for text in row["pos"] + row["neg"]:
                tokens += model.tokenize([text], task if instructed else "", s.max_length)
        return tokens

    queries = []
    for row, task in zip(rows, tasks, strict=True):
        queries += model.tokenize([row["query"]], task)
    assert documents(True) != documents(False)
    assert queries[0].ids[: queries[0].not_pooled] != queries[1].ids
    assert a_batch(model, rows, s).tokens == queries + documents(False)
    assert a_batch(model, rows, s, symmetric=True).tokens == queries + documents(True)


def test_known_positives_are_those_of_all_rows(tmp_path):
    """Of rows that are trained on and held out, whatever their case and white space; and itself."""
    rows = [
        {"query": "A  query", "pos": ["One", "two"]},
        {"query": "a query", "pos": ["ONE ", "three"]},
        {"query": "another", "pos": ["four"]},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    found = read_rows(tmp_path / "rows.jsonl")
    dataset = sampling.Dataset("set", "", False, found.select([0, 2]), found.select([1]))
    positives = sampling.known_positives([dataset])
    expected = {text_id(text) for text in ("a query", "one", "two", "three")}
    assert positives["A QUERY"] == expected
    assert positives["another"] == {text_id("another"), text_id("four")}
    assert positives["unknown"] == {text_id("unknown")}  # control
    assert positives.queries.nbytes + positives.texts.nbytes <= 16 * 5


@pytest.mark.slow
def test_memory_of_training_rows(tmp_path):
    """10,000 rows of 9 texts: at most 200 bytes a row, of 2,000 and more as lists."""
    rows = (
        {"query": f"q {i}", "pos": [f"{i} {'x' * 200}"], "neg": [f"{i} {'y' * 200}"] * 8}
        for i in range(10000)
    )
    write_rows(tmp_path / "rows.jsonl", rows)
    entry = {"name": "a", "file": str(tmp_path / "rows.jsonl"), "instruction": "", "stages": [1]}
    tracemalloc.start()
    datasets = sampling.read_datasets([entry], 1, settings())
    positives = sampling.known_positives(datasets)
    drawn = sampling.rows_of_step(datasets, settings(batch=128), 0)
    _, peak = tracemalloc.get_traced_memory()
    listed = list(datasets[0].rows)
    everything, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn) == 128
    assert len(positives.texts) == 10000
    drawn_bytes = 128 * 9 * 300
    assert peak < 200 * 10000 + drawn_bytes
    assert everything > 1800 * len(listed)  # control
