"""The code stays small: lines of code of each file in one format, lines of each function, one-way imports.

A line of code is one that is not blank, not a comment and not of a docstring: explaining and spacing cost nothing.
"""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

BUDGET = {"nvembed.py": 604, "train.py": 533, "mine.py": 200, "eval.py": 313}
DATA = 972  # data/*.py together
LONGEST = 60
ALLOWED = {"nvembed.py": set(), "data": {"nvembed", "data"}} | dict.fromkeys(
    ("train.py", "mine.py", "eval.py"), {"nvembed", "data"}
)
CODE = [*(ROOT / name for name in BUDGET), *sorted((ROOT / "data").glob("*.py"))]


def lines(path):
    """Number of lines of code."""
    source = path.read_text(encoding="utf-8")
    told = set()
    for node in ast.walk(ast.parse(source)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [line.strip() for n, line in enumerate(source.splitlines(), 1) if n not in told]
    return sum(bool(line) and not line.startswith("#") for line in code)


def test_what_a_line_of_code_is(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(
        '"""Doc\n\nstring."""\n\n# comment\nx = """text\n# text"""  # 1\n\n\ndef f():\n    """Doc."""\n    y = 2\n'
    )
    assert lines(path) == 3  # "# text" counts as a comment: there is no such text in the code


def ruff(*args, **kind):
    line = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "110", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **kind)


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def test_formatted():
    """Line counts mean something only in one format."""
    done = ruff("--check", *CODE, ROOT / "tests")
    assert done.returncode == 0, re.findall("^.*would be reformatted|Would reformat.*", done.stdout, re.M)
    assert ruff("-", input="x=1\n").stdout == "x = 1\n"  # control: it does format


@pytest.mark.parametrize("name", BUDGET)
def test_lines_of_a_file(name):
    assert lines(ROOT / name) <= BUDGET[name]


def test_lines_of_data():
    files = sorted((ROOT / "data").glob("*.py"))
    assert files and sum(map(lines, files)) <= DATA, {path.name: lines(path) for path in files}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_lines_of_a_function(path):
    long = {f.name: f.end_lineno - first_line(f) + 1 for f in functions(path)}
    assert not {name: size for name, size in long.items() if size > LONGEST}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_no_compound_lines(path):
    """One statement a line: none after another's ';', none on the line of its 'if' or 'for'."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                starts = [getattr(node, "lineno", 0), *(statement.lineno for statement in block)]
                first_of_module = isinstance(node, ast.Module)
                assert len(set(starts)) == len(starts) or first_of_module, f"{path.name}:{block[0].lineno}"
    longest = max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0)
    assert longest <= 120  # ruff leaves long strings and comments


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_imports_point_one_way(path):
    ours = {"nvembed", "train", "mine", "eval", "data", "tests"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "data").split(".")[0] if node.level == 0 else path.parent.name)
    allowed = ALLOWED["data" if path.parent.name == "data" else path.name]
    assert imported & ours <= allowed, f"{path.name} imports {imported & ours - allowed}"
    oracles = {"transformers", "peft"} | ({"sentence_transformers"} if path.name != "mine.py" else set())
    assert not imported & oracles, f"{path.name} imports {imported & oracles}"
