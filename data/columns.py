"""Own rows, --data, from where people have them: other files, the hub, columns of other names.

    --data qa.parquet                               columns of known names, see KNOWN
    --data my.csv --columns query=title,pos=body    columns of any names
    --data sentence-transformers/all-nli:triplet    a data set of the hub, and its config

A .jsonl of our own rows is read as it is. Anything else is converted once, row by row, to a .jsonl
of the cache in which row N is line N. Its folder is named by the content: a file that was changed,
or a data set of the hub that was, is converted anew. No torch here.
"""

import glob
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from data.base import build_once
from data.commands import InputError, one_line
from data.files import as_list, cache, digest, json_lines
from data.rows import HARMLESS, check_row, is_text, is_unicode, progress
from data.tables import FILE_FORMATS, file_ending, get, local_files, read_file, read_table
from data.tables import table_errors

KNOWN = {  # field of a row: the columns that stand for it, also numbered: negative_1, negative_2
    "query": ("query", "question", "anchor"),
    "pos": ("pos", "positive", "positives", "answer", "document", "passage"),
    "neg": ("neg", "negative", "negatives"),
    "prompt": ("prompt",),
    "pos_scores": ("pos_scores",),
    "neg_scores": ("neg_scores",),
}
TEXTS = ("query", "pos", "neg")
SCORES = ("pos_scores", "neg_scores")
ALONE = ("query", "prompt")  # fields of one value; the others are lists
IGNORED = set(HARMLESS) - {"label"}  # which may say that a pair is no positive one
FORMAT = 3  # of what is converted; another number has all converted anew


def data_entry(data, columns=None):
    """The flags --data and --columns -> a data set as in a recipe, or None without --data.

    Its "file" is for read_rows; "shown" is what messages call it.
    """
    if data is None:
        if columns is not None:
            raise InputError("--columns: expected --data with it")
        return None
    file = Path(rows_file(data, columns))
    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    return {"name": name, "file": str(file), "shown": data, "instruction": ""}


def rows_file(data, columns=None):
    """A file, a folder or a data set of the hub -> path of a .jsonl or .jsonl.gz of rows."""
    chosen = read_columns(columns)
    table = read_name(data)
    path = Path(table["path"])
    if chosen is None and is_lines(path) and has_our_rows(path):
        return data
    name = name_of(table)
    local = path.exists() or is_lines(path)
    if not local and file_ending(table["path"]) in FILE_FORMATS:
        raise InputError(f"{data}: no such file")
    what = table | {"path": file_ending(table["path"]) if local else table["path"]}
    stem = f"{name}-{hash_of([FORMAT, what, chosen])}"
    if local:
        version = hash_of_files(table)
    else:
        version = table["revision"] = hub_revision(data, table, stem)
    folder = build_once(f"tables/{stem}-{version}", convert, f"{name}.jsonl", data, table, chosen)
    return folder / f"{name}.jsonl"


def read_name(data):
    """FILE, FOLDER or hub data set, the last two also with :CONFIG:SPLIT -> a table."""
    if Path(data).exists() or file_ending(data) in FILE_FORMATS:
        return {"path": data, "config": None, "split": "train"}
    path, config, split = (data.split(":", 2) + ["", ""])[:3]
    return {"path": path, "config": config or None, "split": split or "train"}


def name_of(table):
    """What a table's rows, and so runs, are called: the file's name without its ending."""
    path = table["path"]
    parts = [os.path.basename(os.path.abspath(path.removesuffix(".gz")))]  # of "." too
    if file_ending(path) in FILE_FORMATS:
        parts = [Path(parts[0]).stem]
    if table["config"]:
        parts.append(table["config"])
    if table["split"] != "train":
        parts.append(table["split"])
    return "-".join(parts).replace("/", "-")


def is_lines(path):
    """Whether a path is one of JSON lines: what has no ending of a table is taken for it."""
    ending = file_ending(str(path))
    return ending == ".jsonl" or (path.is_file() and ending not in FILE_FORMATS)


def has_our_rows(path):
    """Whether the first line has the fields of our rows; read_rows tells what is wrong with it."""
    for _, row in json_lines(path):
        return "query" in row and "pos" in row
    return True


def hash_of(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def hash_of_files(table):
    folder = Path(table["path"])
    files = local_files(table)
    return hash_of([(str(file.relative_to(folder)), digest(file)) for file in files])


def hub_revision(data, table, stem):
    """The newest revision of a data set of the hub.

    Where the hub is out of reach, it is the one that was converted last.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(table["path"], timeout=30).sha
    except table_errors() as error:
        message = f"not to be had from the hub: {one_line(error)}"
        earlier = list((cache() / "tables").glob(f"{glob.escape(stem)}-*"))
        if not earlier:
            raise InputError(f"{data}: neither a file nor a folder, and {message}") from error
    newest = max(earlier, key=lambda folder: folder.stat().st_mtime)
    print(f"{data}: {message}; it is read as it was converted before", file=sys.stderr)
    return newest.name.rpartition("-")[2]


# ---- columns


def read_columns(text):
    """ "query=a,pos=b,neg=c,neg=d" -> {field: its columns}, None of None."""
    if text is None:
        return None
    chosen = {}
    for part in text.split(","):
        field, _, column = part.partition("=")
        field, column = field.strip(), column.strip()
        if field not in KNOWN or not column:
            raise InputError(f"--columns: expected FIELD=COLUMN of {list(KNOWN)}, got {part!r}")
        chosen.setdefault(field, []).append(column)
    for field in ("query", "pos"):
        if field not in chosen:
            raise InputError(f"--columns: expected {field}=COLUMN too, got {text!r}")
    check_alone(chosen, "--columns")
    return chosen


def known_columns(found, where):
    """Names of columns -> {field: its columns}, by KNOWN. What is not clear is an InputError."""
    expected = [f"{field}: {' or '.join(KNOWN[field])}" for field in TEXTS]
    expected = f"expected {'; '.join(expected)}; or --columns query=NAME,pos=NAME"
    chosen, families = {}, {}
    for column in found:
        family = re.sub(r"_\d+$", "", column)
        fields = [field for field, names in KNOWN.items() if family in names]
        if fields:
            chosen.setdefault(fields[0], []).append(column)
            families.setdefault(fields[0], set()).add(family)
        elif column not in IGNORED:
            raise InputError(f"{where}: unknown column '{column}' of {found}: {expected}")
    for field in ("query", "pos"):
        if field not in chosen:
            raise InputError(f"{where}: no column for {field} in {found}: {expected}")
    for field in chosen:
        if len(families[field]) > 1:
            columns = chosen[field]
            raise InputError(f"{where}: {columns} could each be {field} in {found}: {expected}")
    check_alone(chosen, where)
    return chosen


def check_alone(chosen, where):
    for field in ALONE:
        if len(chosen.get(field, [])) > 1:
            raise InputError(f"{where}: expected one column for {field}, got {chosen[field]}")


# ---- rows


def convert(folder, name, data, table, chosen):
    """Writes FOLDER/NAME: row N of the table is line N, and prints how many there are."""
    folder.mkdir()
    rows, lines, names = 0, 0, None
    with open(folder / name, "w", encoding="utf-8") as file:
        for where, found in progress(read(table), data):
            if list(found) != names:
                names = list(found)
                columns = chosen or known_columns(names, where)
            row = make_row(found, columns, where)
            number = int(where.rpartition(":")[2])
            file.write("\n" * (number - 1 - lines))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows, lines = rows + 1, number
    if rows == 0:
        raise InputError(f"{data}: expected at least one row")
    taken = [f"{field} = {' + '.join(shortened(columns[field]))}" for field in columns]
    used = {column for field in columns for column in columns[field]}
    used |= {column.split(".")[0] for column in used}
    unused = [column for column in names if column not in used]
    rest = f"; not used: {', '.join(unused)}" if unused else ""
    print(f"{data}: {rows:,} rows; {', '.join(taken)}{rest}", flush=True)


def shortened(columns):
    return columns if len(columns) < 4 else [columns[0], "...", columns[-1]]


def make_row(found, columns, where):
    """A row of a table -> one of ours, checked; errors name the table's columns."""
    row = {}
    for field, names in columns.items():
        values = []
        for name in names:
            values += values_of(found, name, field, where)
        if field not in ALONE:
            row[field] = values
        elif len(values) == 1:
            row[field] = values[0]
        elif values or field == "query":
            raise InputError(f"{where}: column '{names[0]}': expected one text, got {len(values)}")
    try:
        return check_row(row, where)
    except InputError as error:
        message = str(error)
        for field, names in columns.items():
            message = message.replace(f"field '{field}'", f"column '{' + '.join(names)}'")
        raise InputError(message) from error


def values_of(found, name, field, where):
    """The values of a column in a row, one or a list; what is null is missing."""
    values = [value for value in as_list(get(found, name, where)) if value is not None]
    for value in values:
        if field in TEXTS and not (is_text(value) and is_unicode(value)):
            got = f"expected text, got {value!r:.60}"
            raise InputError(f"{where}: column '{name}': {got}")
    return [number(value) for value in values] if field in SCORES else values


def number(value):
    """A cell of a .csv, which is a text, as a number; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read(table):
    """Yields ("FILE:NUMBER", {column: value}) of each row."""
    path = Path(table["path"])
    if is_lines(path):
        yield from json_lines(path)
    elif path.is_file():
        yield from read_file(path)
    else:
        for where, row in read_table(table):
            if row["config"] == table["config"]:  # which read_table added
                del row["config"]
            yield where, row
