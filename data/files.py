"""Files of JSON and of JSON lines, read or refused with their place; written whole or not at all.

No torch here. data/rows.py knows the rows of training.
"""

import codecs
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from dataclasses import fields
from pathlib import Path

from data.commands import InputError, one_line

ROOT = Path(__file__).resolve().parent.parent
UMASK = os.umask(0)  # there is no other way to read it
os.umask(UMASK)
YOUNG = 60  # seconds


def cache():
    """Folder of what is fetched or computed once: .cache in the project, or $NVEMBED_CACHE."""
    return Path(os.environ.get("NVEMBED_CACHE") or ROOT / ".cache")


@contextlib.contextmanager
def renamed(path):
    """Yields a temporary path that becomes `path` if the block succeeds; else nothing does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    remove_abandoned(path.parent, prefix)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder, locked(folder):
        temporary = Path(folder, path.name)
        yield temporary
        if temporary.is_file():
            share(temporary)
        os.replace(temporary, path)


def remove_abandoned(parent, prefix):
    """Removes the temporary folders of `renamed` whose process was killed."""
    for folder in parent.glob(glob.escape(prefix) + "*"):
        with contextlib.suppress(InputError, OSError):  # its own process may remove it meanwhile
            young = time.time() - folder.lstat().st_mtime < YOUNG  # perhaps not locked yet
            if folder.is_dir() and not young:
                with locked(folder):
                    shutil.rmtree(folder)


def share(path):
    """Gives a file the mode of any new one; safetensors writes files for their owner alone."""
    os.chmod(path, 0o666 & ~UMASK)


@contextlib.contextmanager
def locked(path):
    """Locks a file or folder; if another process has it locked, that is an InputError.

    The lock ends with the process, however that ends.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: in use by another process") from error
        yield
    finally:
        os.close(descriptor)


def beside(path, ending):
    """rows/NAME.jsonl.gz -> rows/NAME.ENDING"""
    stem = Path(path).name.split(".jsonl")[0]
    return Path(path).with_name(f"{stem}.{ending}")


def sha256(path):
    """A file's SHA-256 in 64 hexadecimal digits."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(functools.partial(file.read, 2**20), b""):
            content.update(block)
    return content.hexdigest()


def digest(path):
    """First 16 digits of a file's SHA-256."""
    return sha256(path)[:16]


def check_outputs(outputs, inputs):
    """Refuses to write a file twice, or one that is also read, whatever it is called."""
    for number, output in enumerate(outputs):
        if output in outputs[:number]:
            raise InputError(f"{output}: would be written twice; name the inputs otherwise")
        for source in inputs:
            one, other = os.path.realpath(output), os.path.realpath(source)
            both = os.path.exists(one) and os.path.exists(other)
            if one == other or (both and os.path.samefile(one, other)):
                raise InputError(f"{output}: would overwrite the input {source}; use another --out")


def finished(path, report, plan, others=()):
    """The content of `report` if it says that `path` was made by `plan`, else None.

    `others` are further files made with it: None if one is gone. A file in the place of any of them
    that no command of ours wrote is an InputError: it stays.
    """
    earlier = read_json(report) if report.exists() else {}
    if "plan" not in earlier:
        for file in (path, report, *others):
            if Path(file).exists():
                raise InputError(f"{file}: is in the way, not from this command")
        return None
    whole = all(Path(file).exists() for file in (path, *others))
    return earlier if whole and earlier["plan"] == plan else None


def check_unchanged(path, report, source):
    """Refuses to use or replace a file that was changed, or made of another file than `source`."""
    earlier = read_json(report) if report.exists() else {}
    if "of" not in earlier or not path.exists():
        return
    if digest(path) != earlier["sha256"]:
        raise InputError(f"{path}: was changed since it was made; move it, or use another --out")
    if os.path.abspath(source) != earlier["of"] and os.path.exists(earlier["of"]):
        raise InputError(f"{path}: was made of {earlier['of']}; use another --out for {source}")


def begin(report):
    """Writes a report that stands for unfinished files, which may be overwritten."""
    write_json(report, {"plan": None})


def as_list(value):
    """A list as it is, any other value as the list of it alone."""
    return value if isinstance(value, list) else [value]


# ---- JSON


def read_json(path):
    """A JSON object from a file -> dict."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON
        raise InputError(f"{path}: expected a JSON file: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def write_json(path, content):
    """Writes a JSON object, whole or not at all."""
    with renamed(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def check_fields(found, required, optional, where):
    """Checks a JSON object against {field: type or types}; an unknown field is an error."""
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected an object, got {type(found).__name__}")
    known = required | optional
    for name, value in found.items():
        if name not in known:
            raise InputError(f"{where}: unknown field '{name}': expected one of {list(known)}")
        types = known[name] if isinstance(known[name], tuple) else (known[name],)
        if type(value) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            raise InputError(f"{where}: field '{name}': expected {expected}, got {value!r}")
    for name in required:
        if name not in found:
            raise InputError(f"{where}: field '{name}': missing")


def check_types(settings):
    """Checks the fields of a dataclass against their types; an int will do for a float."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        kind = int | float if field.type is float else field.type
        if not isinstance(value, kind):
            raise InputError(f"field '{field.name}': expected {field.type}, got {value!r}")


# ---- JSON lines


def open_lines(path):
    """A .jsonl or .jsonl.gz file whose lines are read as bytes."""
    return gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb")


@contextlib.contextmanager
def reading(path):
    """Turns what goes wrong with a file of lines, damaged ones too, into an InputError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        message = f"{path}: expected a .jsonl or .jsonl.gz file: {one_line(error)}"
        raise InputError(message + how_to_make(Path(path))) from error


def json_lines(path, **fields):
    """Yields ("FILE:LINE", object) for each line of a .jsonl or .jsonl.gz file that is not blank.

    `fields` gives the types that some of an object's fields must have: json_lines(path, text=str).
    """
    with reading(path), open_lines(path) as file:
        for number, line in enumerate(file, 1):
            line = bare(line)
            if not line:
                continue
            where = f"{path}:{number}"
            row = parse_object(line, where)
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind):
                    raise InputError(f"{where}: field '{name}': expected {kind.__name__}")
            yield where, row


def bare(line):
    """A line (bytes) without its end, and without the mark that some editors begin a file with."""
    return line.strip().removeprefix(codecs.BOM_UTF8)


def parse_object(line, where):
    """One JSON object from a line (bytes) of UTF-8."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InputError(f"{where}: expected a JSON object: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def how_to_make(path):
    """A hint at the command that makes a missing file of a recipe's sources."""
    if path.exists() or path.parent.parent != cache() / "recipes":
        return ""
    shipped = Path("data", f"{path.parent.name}.json")
    recipe = shipped if (ROOT / shipped).exists() else "RECIPE"
    return f"; python data/prepare.py --recipe {recipe} makes it"


def write_rows(path, rows):
    """One JSON object a line, gzipped if the name ends in .gz; `rows` may be a generator.

    Equal rows give equal bytes: no file name and no time is stored.
    """
    packer = zlib.compressobj(9, wbits=31) if Path(path).suffix == ".gz" else None
    with renamed(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            try:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair
                raise InputError(f"{path}: no text: {one_line(error)}, in {row!r:.60}") from error
            file.write(packer.compress(line) if packer else line)
        if packer:
            file.write(packer.flush())
