"""Tables, which a recipe's sources name: streamed from the hub or from a local file, row by row.

    {"path": hub id, folder or file, "config": str or list, "split": str, "revision": str,
     "rows": read at most so many of each config}

The same object holds the names of the fields to read. A field is a text or a list of texts.
"""

import math
import zlib
from pathlib import Path

from data.commands import InputError, one_line
from data.files import as_list

FILE_FORMATS = {  # ending of a file's name: its name in load_dataset
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tsv": "csv",
    ".csv": "csv",
}


def read_table(table):
    """Yields ("PATH:CONFIG:NUMBER", row as a dict), the config's name in the row's "config"."""
    path = table["path"]
    configs = as_list(table.get("config"))
    if Path(path).is_file():
        check_file(path)
        configs = [None]
    errors = table_errors()
    for config in configs:
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


def check_file(path):
    """Checks that a local file is one that load_dataset reads."""
    if file_ending(path) not in FILE_FORMATS:
        known = list(FILE_FORMATS)
        raise InputError(f"{path}: expected a file of {known}, or one of them with .gz")
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path}: expected at least one row")


def local_files(table):
    """The files of a table that are on this machine, none of one of the hub."""
    path = Path(table["path"])
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in files if file_ending(str(file)) in FILE_FORMATS]


def file_ending(path):
    """rows.tsv.gz -> .tsv"""
    return Path(path.removesuffix(".gz")).suffix


def open_table(table, config):
    """The rows of one configuration of a table, as an iterable."""
    from datasets import load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # its errors repeat what it would log
    path = table["path"]
    if not Path(path).is_file():
        where = {"split": table["split"], "revision": table.get("revision")}
        return load_dataset(path, config, streaming=True, **where)
    ending = file_ending(path)
    options = {}
    if ending == ".tsv":
        options["sep"] = "\t"
    kind = FILE_FORMATS[ending]
    # a file by itself is always the split "train"
    return load_dataset(kind, data_files=path, split="train", streaming=True, **options)


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


def get(row, name, where):
    """A field's value; "a.b" is field b of object a, or of every object of list a."""
    value = row
    for part in name.split("."):
        for item in as_list(value):
            fields = list(item) if isinstance(item, dict) else []
            if part not in fields:
                raise InputError(f"{where}: field '{name}': missing, found {fields}")
        if isinstance(value, list):
            value = [item[part] for item in value]
        else:
            value = value[part]
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
    """A field's ids or labels, which are names or numbers, as strings."""
    if isinstance(name, list):
        return texts_of(row, name, where)
    ids = []
    for value in as_list(get(row, name, where)):
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
