"""The house stays walkable: one format, short functions, arrows that point one way, a small core.

A line of code is one that is not blank, not a comment and not of a docstring: explaining and
spacing cost nothing.
"""

import ast
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

COLUMNS = 100
LONGEST_FUNCTION = 50
CORE = ("nvembed.py", "train.py")
CORE_LINES = 1000  # the README promises it
FOUR = ("nvembed.py", "train.py", "mine.py", "eval.py")
MEDIAN_LINE = 52
CATCH_ALLS = {"data/folders.py": 1}  # tokenizers raises nothing narrower than Exception

PYTHON = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
CODE = [path for path in PYTHON if path.relative_to(ROOT).parts[0] != "tests"]


def name_of(path):
    return str(path.relative_to(ROOT))


def tree_of(path):
    return ast.parse(path.read_text("utf-8"))


def test_every_file_is_looked_at():
    names = {name_of(path) for path in PYTHON}
    wanted = {*FOUR, "data/files.py", "experiments/compress.py", "tests/bench.py"}
    assert wanted <= names
    assert "tests/unit/test_layout.py" in names
    assert {name_of(path) for path in CODE} < names


# ---- format


def ruff(*args, **kind):
    program = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", str(COLUMNS)]
    line = [*program, *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **kind)


def test_one_format():
    done = ruff("--check", *PYTHON)
    assert done.returncode == 0, re.findall(r"--> (\S+?):", done.stdout)


def test_ruff_does_format(tmp_path):
    assert ruff("-", input="x=1\n").stdout == "x = 1\n"
    (tmp_path / "odd.py").write_text("x=1\n")
    assert ruff("--check", tmp_path / "odd.py").returncode == 1


def long_lines(text):
    """Numbers of the lines over COLUMNS: ruff leaves long strings and comments."""
    return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_long_lines(path):
    numbers = long_lines(path.read_text("utf-8"))
    assert not numbers


def test_a_long_comment_is_a_long_line():
    assert long_lines("# " + "x" * 98 + "\n# " + "x" * 99 + "\n") == [2]


# ---- functions


def long_functions(tree):
    """Functions over LONGEST_FUNCTION lines, decorators and docstring included -> {name: lines}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            size = node.end_lineno - first + 1
            if size > LONGEST_FUNCTION:
                found[node.name] = size
    return found


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_long_functions(path):
    assert not long_functions(tree_of(path))


def test_a_long_function_is_seen():
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert long_functions(ast.parse(f"def f():\n{body}")) == {"f": LONGEST_FUNCTION + 1}
    decorated = f"@d\ndef f():\n{body[: -len('    x = 1') - 1]}"
    assert long_functions(ast.parse(decorated)) == {"f": LONGEST_FUNCTION + 1}
    assert not long_functions(ast.parse(decorated.removeprefix("@d\n")))


def catch_alls(tree):
    """Lines of `except:`, `except Exception` and `except BaseException`."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = (
                [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else []
            )
            if node.type is None or {"Exception", "BaseException"} & set(names):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_error_of_ours_is_hidden(path):
    assert len(catch_alls(tree_of(path))) == CATCH_ALLS.get(name_of(path), 0)


@pytest.mark.parametrize("kind", ["", " Exception", " BaseException as e", " (OSError, Exception)"])
def test_a_catch_all_is_seen(kind):
    assert catch_alls(ast.parse(f"try:\n    f()\nexcept{kind}:\n    pass\n")) == [3]
    assert not catch_alls(ast.parse("try:\n    f()\nexcept (OSError, ValueError):\n    pass\n"))


# ---- size


def code_lines(source):
    """The lines of code of a file."""
    told = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line for n, line in enumerate(source.splitlines(), 1) if n not in told]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def test_what_a_line_of_code_is():
    source = (
        '"""Doc\n\nstring."""\n\n# comment\nx = """text\n# text"""  # 1\n\n\n'
        'def f():\n    """Doc."""\n    y = 2\n'
    )
    # "# text" counts as a comment: there is no such text in the code
    assert code_lines(source) == ['x = """text', "def f():", "    y = 2"]


def test_the_core_is_small():
    sizes = {name: len(code_lines((ROOT / name).read_text("utf-8"))) for name in CORE}
    assert sum(sizes.values()) <= CORE_LINES, sizes
    assert min(sizes.values()) > 100  # control: something was counted


def promises(readme):
    """Sentences of the README that name the core's files and its number of lines."""
    text = " ".join(readme.split())
    sentences = re.split(r"(?<=[.!?]) ", text)
    number = re.compile(f"({CORE_LINES:,}|a thousand) lines of code")
    return [s for s in sentences if all(name in s for name in CORE) and number.search(s)]


def test_the_readme_promises_it():
    found = promises((ROOT / "README.md").read_text("utf-8"))
    assert found, "expected a sentence: nvembed.py + train.py ... 1,000 lines of code"
    assert promises("A model. nvembed.py and train.py\nhave 1,000 lines of code. More.")
    assert not promises("See nvembed.py. And train.py has 1,000 lines of code.")  # control
    assert not promises("nvembed.py and train.py have 1,200 lines of code.")


@pytest.mark.parametrize("name", FOUR)
def test_lines_are_short(name):
    lines = code_lines((ROOT / name).read_text("utf-8"))
    assert statistics.median(len(line) for line in lines) <= MEDIAN_LINE


# ---- arrows

HOUSE = {path.stem for path in ROOT.glob("*.py")} | {"data", "experiments", "tests"}
BASIC = ("data.commands", "data.files")
ALLOWED = {  # file: what it may import of ours beside data.commands and data.files
    "nvembed.py": "data.adapters data.dialects data.folders data.graphs data.peers data.quantize"
    " data.sentence data.texts",
    "train.py": "nvembed data.base data.columns data.machine data.ranks data.recipes data.rows"
    " data.runs data.sampling",
    "mine.py": "nvembed data.base data.columns data.corpus data.dialects data.folders data.machine"
    " data.recipes data.rows",
    "eval.py": "nvembed data.adapters data.base data.dialects data.folders data.machine"
    " data.quantize data.tasks data.texts",
    "data/__init__.py": "",
    "data/folders.py": "",
    "data/adapters.py": "data.folders",
    "data/peers.py": "data.folders",
    "data/dialects.py": "data.adapters data.folders data.peers",
    "data/leakage.py": "data.rows",
    "data/tables.py": "",
    "data/base.py": "",
    "data/graphs.py": "",
    "data/quantize.py": "",
    "data/rows.py": "",
    "data/columns.py": "data.base data.rows data.tables",
    "data/corpus.py": "data.rows",
    "data/sampling.py": "data.recipes data.rows",
    "data/tasks.py": "",
    "data/synthesize.py": "data.rows",
    "data/recipes.py": "data.leakage data.rows data.tables",
    "data/card.py": "data.dialects",
    "data/sentence.py": "data.folders data.peers data.texts",
    "data/runs.py": "data.base data.card data.folders data.ranks data.sampling",
    "data/ranks.py": "",
    "data/threads.py": "",
    "data/machine.py": "data.ranks",
    "data/texts.py": "",
    "data/convert.py": "data.leakage data.tables",
    "data/sets.py": "data.base data.convert data.leakage",
    "data/prepare.py": "data.base data.convert data.leakage data.recipes data.sets",
}
FIRST = "data.threads"  # of the four files, before torch
ALLOWED = {name: {*modules.split(), *BASIC} for name, modules in ALLOWED.items()}
ALLOWED |= {name: ALLOWED[name] | {FIRST} for name in FOUR}
ALLOWED["data/commands.py"] = set()
ALLOWED["data/files.py"] = {"data.commands"}
IN_MAIN = {"nvembed.py": {"data.base", "data.machine"}}  # inside main() only
WITHOUT_TORCH = (
    "data/commands.py",
    "data/files.py",
    "data/recipes.py",
    "data/rows.py",
    "data/corpus.py",
    "data/sampling.py",
    "data/base.py",
    "data/texts.py",
)
ORACLES = {"transformers", "peft", "sentence_transformers"}
MAY_USE_AN_ORACLE = {"mine.py": {"sentence_transformers"}}  # a folder of it as teacher


def imports(tree):
    """Every module that is imported, anywhere in a file: "data.files", "nvembed", "torch.nn"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if node.module == "data":  # from data import files
                found |= {f"data.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def ours(modules):
    return {module for module in modules if module.split(".")[0] in HOUSE}


def main_of(tree):
    """The function main of a file, as a tree."""
    mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    return ast.Module(mains, [])


def test_every_file_has_its_arrows():
    outside = {name for name in map(name_of, CODE) if not name.startswith("experiments/")}
    assert outside == ALLOWED.keys()


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows(name):
    tree = tree_of(ROOT / name)
    in_main = IN_MAIN.get(name, set())
    assert ours(imports(tree)) <= ALLOWED[name] | in_main
    if in_main:
        assert ours(imports(main_of(tree))) == in_main
        rest = [node for node in tree.body if node not in main_of(tree).body]
        assert ours(imports(ast.Module(rest, []))) <= ALLOWED[name]


def test_arrows_go_in_no_circle():
    """Take away what imports nothing that is left, until nothing is left."""
    assert not circles(arrows())
    assert circles(arrows() | {"data.files": {"data.prepare"}})  # control
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def arrows():
    """Module -> modules of ours that it imports, as the files are."""
    found = {}
    for path in CODE:
        module = name_of(path).removesuffix(".py").replace("/", ".")
        found[module] = ours(imports(tree_of(path)))
    return found


def circles(graph):
    """Modules in a circle, or above one."""
    left = dict(graph)
    while True:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        if not free:
            return set(left)
        for module in free:
            del left[module]


def test_nothing_imports_experiments():
    """But experiments themselves, and tests."""
    for module, needs in arrows().items():
        if not module.startswith("experiments."):
            assert not any(need.startswith("experiments") for need in needs), module
    assert "experiments.compress" in arrows()


def packages(tree):
    """Top names of what a file imports."""
    return {module.split(".")[0] for module in imports(tree)}


@pytest.mark.parametrize("name", FOUR)
def test_oracles_stay_outside(name):
    refused = ORACLES - MAY_USE_AN_ORACLE.get(name, set())
    assert not packages(tree_of(ROOT / name)) & refused


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_plain_files_need_no_torch(name):
    assert not packages(tree_of(ROOT / name)) & {"torch", "faiss"}
    assert "torch" in packages(tree_of(ROOT / "nvembed.py"))  # control


@pytest.mark.parametrize("name", FOUR)
def test_threads_are_set_before_torch(name):
    (first, *_) = [
        node for node in tree_of(ROOT / name).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert [alias.name for alias in first.names] == [FIRST]


def test_imports_are_seen():
    """Control of all of the above: at the top, in a function, by each of the three forms."""
    source = (
        "import nvembed, torch.nn\nfrom data import files, base\n"
        "def main():\n    from data.sets import build\n    import transformers as t\n"
    )
    tree = ast.parse(source)
    modules = {"nvembed", "torch.nn", "data.files", "data.base", "data.sets", "transformers"}
    assert imports(tree) == modules
    assert ours(modules) == {"nvembed", "data.files", "data.base", "data.sets"}
    assert ours(imports(main_of(tree))) == {"data.sets"}
    assert packages(tree) == {"nvembed", "torch", "data", "transformers"}
    with pytest.raises(AssertionError, match="relative"):
        imports(ast.parse("from . import files"))
