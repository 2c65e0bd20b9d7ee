"""Tables, which a recipe's sources name: streamed from the hub or from a local file, row by row.

    {"path": hub id, folder or file, "config": str or list, "split": str, "revision": str,
     "rows": read at most so many of each config}

The same object holds the names of the fields to read. A field is a text or a list of texts.
"""

import csv
import gzip
import itertools
import json
import math
import zlib
from pathlib import Path

from data.commands import InputError, one_line
from data.files import as_list, bare, json_lines, open_lines, reading

MARKS = {".csv": ",", ".tsv": "\t"}  # what stands between two cells
CONVERTED = "refs/convert/parquet"  # a branch that the hub makes, with a folder for each config
FILE_FORMATS = (".json", ".jsonl", ".parquet", *MARKS)  # endings of files' names


def read_table(table):
    """Yields ("PATH:CONFIG:NUMBER", row as a dict), the config's name in the row's "config"."""
    path = table["path"]
    if Path(path).is_file():
        for where, row in itertools.islice(read_file(path), table.get("rows")):
            yield where, {"config": None} | row
        return
    errors = table_errors()
    for config in as_list(table.get("config")):
        where = path if config is None else f"{path}:{config}"
        try:
            rows = iter(open_table(table, config))
        except errors as error:
            raise InputError(f"{where}: {told(error)}") from error
        number = 0
        while number < table.get("rows", math.inf):
            number += 1
            try:
                row = next(rows, None)
            except errors as error:
                raise InputError(f"{where}:{number}: {one_line(error)}") from error
            if row is None:
                break
            yield f"{where}:{number}", {"config": config} | row


def local_files(table):
    """The files of a table that are on this machine, none of one of the hub; no hidden ones.

    Of a folder they are all: `datasets` reads more formats than those named here.
    """
    path = Path(table["path"])
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in files if not is_hidden(file.relative_to(path))]


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def tables_of(dataset):
    """The tables that an entry of a recipe is made from."""
    source = dataset["source"]
    tables = [source, source.get("queries"), source.get("corpus")]
    tables.append(dataset.get("leakage", {}).get("against"))
    return [table for table in tables if table]


def file_ending(path):
    """rows.tsv.gz -> .tsv"""
    return Path(path.removesuffix(".gz")).suffix


def open_table(table, config):
    """The rows of one configuration of a table, as an iterable."""
    from datasets import load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # its errors repeat what it would log
    options = {"split": table["split"], "revision": table.get("revision")}
    if config is not None and table.get("revision") == CONVERTED:
        options["data_dir"], config = config, None
    files = [file for file in local_files(table) if file_ending(str(file)) in FILE_FORMATS]
    if files and all(file_ending(str(file)) in MARKS for file in files):
        options |= text_cells(files)
    return load_dataset(table["path"], config, streaming=True, **options)


def text_cells(files):
    """Options of load_dataset by which the cells of .csv files are what read_csv makes of them."""
    columns = set()
    for file in files:
        with reading(file), open_lines(file) as lines:
            header = bare(lines.readline()).decode(errors="replace")
        columns.update(*csv.reader([header], delimiter=MARKS[file_ending(str(file))]))
    converters = dict.fromkeys(columns, str)
    return {"converters": converters, "keep_default_na": False, "na_values": [""]}


def table_errors():
    """What load_dataset raises over a table that is missing, out of reach, damaged or no table."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from yaml import YAMLError

    return (
        DatasetsError,
        HTTPError,  # the connection fails on the way
        OSError,  # no such file or data set, no network, not gzipped
        EOFError,  # a .gz that is cut off
        zlib.error,  # a .gz that is damaged
        ValueError,  # neither JSON nor Parquet nor CSV; no such split or config; other columns
        TypeError,  # a column whose type changes
        RuntimeError,  # a repository that holds code in place of data
        YAMLError,  # the header of the data set's card
    )


def told(error):
    """What an error says, in one line: where a config has to be named, those that there are."""
    for line in str(error).splitlines():
        if "available configs" in line:
            return line.strip()
    return one_line(error)


# ---- a file


def read_file(path):
    """Yields ("PATH:NUMBER", row as a dict) of a local file."""
    ending = file_ending(str(path))
    if ending not in FILE_FORMATS:
        known = list(FILE_FORMATS)
        raise InputError(f"{path}: expected a file of {known}, or one of them with .gz")
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path}: expected at least one row")
    if ending in MARKS:
        yield from read_csv(path)
    elif ending == ".parquet":
        yield from read_parquet(path)
    else:
        names = {}
        for _, row in read_objects(path):
            names |= dict.fromkeys(row)
        for where, row in read_objects(path):
            yield where, names | row  # a field that a row lacks is null


def read_csv(path):
    """Rows of a .csv or .tsv file; number 1 is below the header.

    Each cell is a text, also what looks like a number or like NA; an empty one is null.
    """
    csv.field_size_limit(2**30)
    mark = MARKS[file_ending(str(path))]
    open_text = gzip.open if Path(path).suffix == ".gz" else open
    number = 0
    try:
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=mark, strict=True)
            header = next(lines, [])
            if not header:
                raise InputError(f"{path}: expected the columns' names in the first line")
            if len(set(header)) != len(header):
                raise InputError(f"{path}: expected columns of different names, got {header}")
            for cells in lines:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    expected = f"expected the {len(header)} columns of the first line"
                    raise InputError(f"{path}:{number}: {expected}, got {len(cells)}")
                yield f"{path}:{number}", {n: c or None for n, c in zip(header, cells)}
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}:{number + 1}: {one_line(error)}") from error


def read_parquet(path):
    """Rows of a .parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (OSError, ArrowException, OverflowError) as error:  # the last: a date after year 9999
        raise InputError(f"{path}: {one_line(error)}") from error


def read_objects(path):
    """Objects of a .json file, which may be one list, or of a .jsonl file."""
    if file_ending(str(path)) == ".jsonl":
        yield from json_lines(path)
        return
    with reading(path), open_lines(path) as file:
        content = bare(file.read())
    if not content.startswith(b"["):
        yield from json_lines(path)
        return
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InputError(f"{path}: expected JSON: {one_line(error)}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            got = type(row).__name__
            raise InputError(f"{path}:{number}: expected a JSON object, got {got}")
        yield f"{path}:{number}", row


# ---- fields of a row


def get(row, name, where):
    """A field's value; "a.b" is field b of object a, or of every object of list a.

    A field of the row that is itself called "a.b" comes first. An object that is null has no fields
    and is missing.
    """
    if name in row:
        return row[name]
    value = row
    for part in name.split("."):
        items = [item for item in as_list(value) if item is not None]
        for item in items:
            fields = list(item) if isinstance(item, dict) else []
            if part not in fields:
                raise InputError(f"{where}: field '{name}': missing, found {fields}")
        values = [item[part] for item in items]
        value = values if isinstance(value, list) else (values or [None])[0]
    return value


def texts_of(row, names, where):
    """A field's texts, one or those of a list; several fields give one text, joined by spaces."""
    if isinstance(names, list):
        parts = []
        for name in names:
            parts += texts_of(row, name, where)
        return [" ".join(part for part in parts if part)]
    texts = []
    for value in as_list(get(row, names, where)):
        if value is not None and not isinstance(value, str):
            message = f"expected a string or strings, got {[value]!r:.60}"
            raise InputError(f"{where}: field '{names}': {message}")
        texts.append((value or "").strip())
    return texts


def ids_of(row, name, where):
    """A field's ids or labels, which are names or numbers, as strings; null ones are missing."""
    if isinstance(name, list):
        return texts_of(row, name, where)
    ids = []
    for value in as_list(get(row, name, where)):
        if value is None:
            continue
        if not isinstance(value, (str, int)):
            message = f"expected names or numbers, got {[value]!r:.60}"
            raise InputError(f"{where}: field '{name}': {message}")
        ids.append(str(value))
    return ids


def texts_of_table(table):
    """All texts of a table's field "text"."""
    texts = []
    for where, row in read_table(table):
        texts += texts_of(row, table["text"], where)
    return texts
