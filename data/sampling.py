"""Which rows a step sees: data sets, sampled and split by seed, then a schedule of batches.

No torch here.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.commands import InputError
from data.files import digest
from data.recipes import check_prepared, plan_in
from data.rows import KnownPositives, Rows, read_rows

TEMPLATE = 24  # tokens, at most, of what an instruction stands in


@dataclass
class Dataset:
    name: str
    instruction: str
    symmetric: bool  # documents carry the instruction too (STS, clustering)
    rows: Rows | list
    held_out: Rows | list
    file: str = ""
    digest: str = ""  # of the rows in the file

    def summary(self):
        return f"{self.name}: {len(self.rows)} rows of {self.file}, {len(self.held_out)} held out"


def read_datasets(entries, stage, s, mined=None):
    """A recipe's entries -> list of Dataset: those of the stage, sampled and split by seed.

    `s` are train.py's Settings. A file of the same name in the folder `mined` takes the place of an
    entry's own.
    """
    if mined and not Path(mined).is_dir():
        raise InputError(f"--mined {mined}: no such folder")
    datasets = []
    for entry in entries:
        if stage not in entry["stages"]:
            continue
        check_prepared(entry)
        path, shown = Path(entry["file"]), entry.get("shown")
        if mined and Path(mined, path.name).exists():
            check_mined(Path(mined, path.name), path)
            path, shown = Path(mined, path.name), None
        rows = read_rows(path, shown=shown)
        order = np.random.default_rng(s.seed).permutation(len(rows))
        held = min(s.held_out, len(rows) // 10)
        kept = order[held:][: entry.get("samples")]
        dataset = Dataset(
            name=entry["name"],
            instruction=entry["instruction"],
            symmetric=entry.get("symmetric", False),
            rows=rows.select(kept),
            held_out=rows.select(order[:held]),
            file=str(shown or path),
            digest=rows.digest,
        )
        datasets.append(dataset)
    if not datasets:
        raise InputError(f"recipe: expected a data set of stage {stage}, got none")
    if mined and not any(Path(dataset.file).parent == Path(mined) for dataset in datasets):
        raise InputError(f"--mined {mined}: expected a file of a data set's name in it, found none")
    if not s.in_batch and s.negatives == 0:
        raise InputError("negatives: expected 1 or more, as in_batch is off, got 0")
    if not s.in_batch and not any(row["neg"] for data in datasets for row in data.rows):
        raise InputError(
            "in_batch is off: expected rows with negatives, got none; mine.py finds some"
        )
    if s.kd and not any(has_scores(row) for dataset in datasets for row in dataset.rows):
        raise InputError("kd: expected rows with pos_scores and neg_scores, got none")
    return datasets


def check_mined(path, source):
    """Refuses rows that mine.py made of other rows than those of `source`, or has not finished."""
    plan = plan_in(Path(f"{path}.json"))
    if plan is None:
        raise InputError(f"{path}: is half made; mine again")
    made_from = plan.get("sha256")
    if source.exists() and made_from not in (None, digest(source)):
        raise InputError(f"{path}: was mined from other rows than those of {source}; mine again")


def check_prompts(datasets, tokenize, max_length):
    """Refuses an instruction that leaves no room for a text, and names its row.

    Rows are read only if a prompt has so many bytes that it could fill max_length: a token has at
    least one byte.
    """
    for dataset in datasets:
        longest = max(len(dataset.instruction.encode()), dataset.rows.longest_prompt)
        if longest + TEMPLATE < max_length:
            continue
        fitting = set()
        for rows in (dataset.rows, dataset.held_out):
            for i, row in enumerate(rows):
                prompt = row.get("prompt", dataset.instruction)
                if prompt in fitting:
                    continue
                try:
                    tokenize([row["query"]], prompt, max_length)
                except InputError as error:
                    where = rows.where(i)
                    raise InputError(f"{where}: field 'prompt': {error}") from error
                fitting.add(prompt)


def check_batch(datasets, s, ranks):
    """Refuses a batch that cannot be drawn from the data sets or shared out to the ranks."""
    batch = s.batch
    rows = sum(len(dataset.rows) for dataset in datasets)
    if not 1 <= batch <= rows:
        raise InputError(f"batch: expected at most {rows}, the rows there are, got {batch}")
    if batch % ranks != 0:
        raise InputError(f"batch: expected a multiple of the {ranks} ranks, got {batch}")
    schedule([len(dataset.rows) for dataset in datasets], s, 0)  # refuses what it cannot draw


@functools.lru_cache(maxsize=4)
def epoch_order(sizes, batch, batching, seed, epoch):
    """The order of an epoch, as numbers of rows counted through all data sets.

    "blended" is one permutation of all rows. With "task" each batch is of one set, the batches are
    shuffled, and rows that do not fill a batch wait for another epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = np.cumsum([0, *sizes])
    if batching == "blended":
        return rng.permutation(starts[-1])
    if batching != "task":
        raise InputError(f"batching: expected blended or task, got {batching!r}")
    if max(sizes) < batch:
        raise InputError(f"batch: expected at most {max(sizes)}, the largest set's, got {batch}")
    orders = [rng.permutation(size) for size in sizes]
    batches = []
    for start, order in zip(starts, orders, strict=False):
        for i in range(0, len(order) - batch + 1, batch):
            batches.append(start + order[i : i + batch])
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def schedule(sizes, s, step):
    """The rows of a step -> list of (epoch, data set, row). Epochs follow each other without a gap.

    It depends on nothing but its arguments: a resumed run needs only the step, and any number of
    ranks sees the same batches.
    """
    sizes = tuple(sizes)
    starts = np.cumsum([0, *sizes])
    epoch_rows = len(epoch_order(sizes, s.batch, s.batching, s.seed, 0))
    places = []
    for position in range(step * s.batch, (step + 1) * s.batch):
        epoch, place = divmod(position, epoch_rows)
        row = epoch_order(sizes, s.batch, s.batching, s.seed, epoch)[place]
        dataset = int(np.searchsorted(starts, row, side="right")) - 1
        places.append((epoch, dataset, int(row - starts[dataset])))
    return places


def shuffled_places(rows, seed):
    """All rows of lists of rows, once each, as places in a shuffled order."""
    places = []
    for dataset, found in enumerate(rows):
        places.extend((0, dataset, i) for i in range(len(found)))
    order = np.random.default_rng(seed).permutation(len(places))
    return [places[i] for i in order]


def draw_rows(rows, datasets, places, s):
    """The rows at places of `schedule` -> list of (Dataset, row, the row's own random generator).

    `rows` has a list for each data set: its training rows, or its held-out ones.
    """
    drawn = []
    for epoch, dataset, i in places:
        rng = np.random.default_rng([s.seed, epoch, dataset, i])
        drawn.append((datasets[dataset], rows[dataset][i], rng))
    return drawn


def rows_of_step(datasets, s, step):
    """The rows of a step -> list of B (Dataset, row, random generator)."""
    rows = [dataset.rows for dataset in datasets]
    places = schedule([len(found) for found in rows], s, step)
    return draw_rows(rows, datasets, places, s)


def draw_documents(row, negatives, rng):
    """One of the row's positives, then its negatives, at most so many -> texts, their scores.

    The scores are all -inf in a row that has none.
    """
    positive = rng.integers(len(row["pos"]))
    order = range(len(row["neg"]))
    if len(row["neg"]) > negatives:
        order = rng.permutation(len(row["neg"]))[:negatives]
    texts = [row["pos"][positive], *(row["neg"][i] for i in order)]
    if not has_scores(row):
        return texts, [-math.inf] * len(texts)
    scores = [row["pos_scores"][positive], *(row["neg_scores"][i] for i in order)]
    return texts, [float(score) for score in scores]


def has_scores(row):
    """Whether a row has a score for each of its documents."""
    scores = row.get("pos_scores", []) + row.get("neg_scores", [])
    return len(scores) == len(row["pos"]) + len(row["neg"])


def known_positives(datasets):
    """The positives of all rows that are trained on or held out -> KnownPositives."""
    parts = []
    for dataset in datasets:
        parts += [dataset.rows, dataset.held_out]
    return KnownPositives(parts)
