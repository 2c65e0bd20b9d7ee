"""The documents: README's size, links and names; their commands exist, and README's run.

README's commands run in a copy of the project with a few rows a data set, two steps a stage, eight
test items. What is not run, because it needs a hub, several ranks or pip, is listed in NOT_RUN.
"""

import ast
import contextlib
import functools
import gzip
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

DOCUMENTS = ("README.md", "data/README.md", "experiments/RESULTS.md", "tests/BENCH.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
OTHER_PROGRAMS = ("pip", "tar", "hf")  # in blocks, beside our own commands

NOT_RUN = {  # a part of a command of README.md, and what it needs
    "pip install": "an environment of its own",
    "-m pytest": "would run this test again",
    "--nproc-per-node": "several ranks",
    "nvidia/": "a hub",
    "intfloat/": "a hub",
}
ADDED = {  # flags that make a command of README.md small, by its first words
    "python train.py": "--steps 2 --batch 4 --no-compile --held-out 1",
    "python eval.py": "--limit 8 --max-length 32",
    "python experiments/plot.py": "--limit 8 --max-length 32",
    "python experiments/compress.py": "--calibration 4",
}


# ---- reading Markdown


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text, kind):
    """The contents of a document's fenced blocks of one kind ("sh", "python", "json")."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def block_commands(text):
    """Every command of a document's sh blocks, without comments."""
    commands = []
    for block in blocks(text, "sh"):
        for line in block.splitlines():
            for part in line.split("  #")[0].split(" # ")[0].split("&&"):
                commands.append(part.strip())
    return commands


def inline_commands(text):
    """Every `python ...` and `torchrun ...` between single backticks."""
    commands = []
    for line in re.findall(r"`((?:python|torchrun) [^`]+)`", without_code(text)):
        for part in line.split("&&"):
            commands.append(part.strip())
    return commands


def anchors(text):
    """The anchors that GitHub makes of a document's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


def script_and_flags(command):
    """A command of ours -> its script, the --flags after the script."""
    words = shlex.split(command)
    (place,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    flags = [word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")]
    return words[place], flags


def is_ours(command):
    return re.search(r"\b(python|torchrun) .*\.py\b", command) is not None


# ---- fast: what the documents name exists


def test_readme_is_short():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines) <= 120
    assert len(TEXTS["README.md"].encode()) <= 9000


def broken_links(name, text):
    folder = (ROOT / name).parent
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / name
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    assert broken_links(name, TEXTS[name]) == []


def test_broken_links_are_found():
    """Control."""
    text = "# Set up\n[a](#set-up) [b](#elsewhere) [c](LICENSE) [d](gone.md) [e](README.md#gone)\n"
    assert broken_links("README.md", text) == ["#elsewhere", "gone.md", "README.md#gone"]


def defined_names(path):
    """Functions, classes, methods and dataclass fields of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
    return names


def method_table():
    """The rows of README's table of the method: (the code's cell, its explanation)."""
    (table,) = re.findall(r"\| paper.*?\n\n", TEXTS["README.md"], re.DOTALL)
    rows = [line.split("|")[2:4] for line in table.strip().splitlines()[2:]]
    assert len(rows) >= 12
    return rows


@pytest.mark.parametrize("place, explanation", method_table())
def test_the_method_table_names_what_there_is(place, explanation):
    (file,) = re.findall(r"\[([\w/.]+)\]\(\1\)", place)
    names = defined_names(ROOT / file)
    for name in re.findall(r"`(\w+)`", place):
        assert name in names, f"{file} has no {name}"
    for other, name in re.findall(r"([\w/]+\.py)?#?`(\w+)`", explanation):
        assert name in defined_names(ROOT / (other or file)), f"{other or file} has no {name}"


@functools.cache
def help_of(script):
    """What `python SCRIPT --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code
    return printed.getvalue()


def unknown_flags(command):
    script, flags = script_and_flags(command)
    assert (ROOT / script).exists(), f"{command}: there is no {script}"
    known = re.findall(r"--[a-z][\w-]*", help_of(script))
    return [flag for flag in flags if flag not in known]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_their_flags_exist(name):
    for command in block_commands(TEXTS[name]):
        assert is_ours(command) or command.split()[0] in OTHER_PROGRAMS or "-m pytest" in command
    for command in block_commands(TEXTS[name]) + inline_commands(TEXTS[name]):
        if is_ours(command):
            assert unknown_flags(command) == [], command


def test_an_unknown_flag_is_found():
    """Control."""
    command = "torchrun --nnodes 4 train.py --stage 3 --no-such-flag 1"
    assert unknown_flags(command) == ["--no-such-flag"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_are_python(name):
    for code in blocks(TEXTS[name], "python"):
        ast.parse(code)


# ---- slow: README's commands, one after another


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project whose commands are short: few rows, 8 layers, two cells in a grid."""
    folder = tmp_path_factory.mktemp("readme") / "nvembed"
    ignored = (".git", ".cache", "runs", ".venv", "__pycache__", ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*ignored))
    for path in (folder / "data").glob("*.jsonl.gz"):
        rows = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        path.write_bytes(gzip.compress(b"".join(rows[:60])))

    recipe = json.loads((folder / "data/local.json").read_text())
    recipe["base"] = "smollm2:8"
    for settings in recipe["presets"]["ablation"]["stages"].values():
        settings.update(steps=2, batch=4, warmup=1, dtype="auto")
    (folder / "data/local.json").write_text(json.dumps(recipe))

    path = folder / "experiments/ablations.json"
    grids = json.loads(path.read_text())
    grids.update(seeds=1, evaluation=["--limit=8", "--max-length=32"])
    grids["grids"]["pooling"] = ["mean-bidirectional-stage1", "mean-causal-stage1"]
    path.write_text(json.dumps(grids))

    (row,) = blocks(TEXTS["README.md"], "json")
    with gzip.open(folder / "data/wikipedia_question.jsonl.gz", "rt", encoding="utf-8") as file:
        others = [next(file) for _ in range(3)]
    (folder / "my.jsonl").write_text(row + "".join(others), encoding="utf-8")
    return folder


def run_in(project, command, status=0):
    """Runs a command in the copy -> what it printed."""
    environment = os.environ | {"PYTHONPATH": str(project)}
    environment["NVEMBED_CACHE"] = os.environ.get("NVEMBED_CACHE", str(ROOT / ".cache"))
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        command, shell=True, cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_python(project, code):
    (project / "block.py").write_text(code, encoding="utf-8")
    return run_in(project, "python block.py")


def small(command):
    """A command of README.md with the flags that make it short."""
    added = [flags for start, flags in ADDED.items() if command.startswith(start)]
    if "--micro-tokens" in command:
        added.append("--out runs/less-memory")  # stage 1 is there already, with other settings
    return " ".join([command, *added])


def readme_commands():
    """README's commands in their order; those of a run that is trained further down come last."""
    commands = block_commands(TEXTS["README.md"])
    commands += [command for command in inline_commands(TEXTS["README.md"]) if is_ours(command)]
    commands = [command for command in commands if not any(part in command for part in NOT_RUN)]
    return sorted(commands, key=lambda command: command.startswith("python nvembed.py runs/"))


def losses(project, run):
    lines = (project / "runs" / run / "log.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [0, 1, 2]
    return [record["loss"] for record in records[1:]]


@pytest.mark.slow
def test_readme_commands_run(project):
    printed = {}
    for command in readme_commands():
        quantized = ":int8" in command and find_spec("torchao") is None
        printed[command] = run_in(project, small(command), status=2 if quantized else 0)
        if quantized:
            assert "pip install torchao" in printed[command]
    for wanted in ("train.py --stage 1", "train.py --stage 2", "train.py --stage 3", "mine.py"):
        assert any(wanted in command for command in printed)

    for run in ("stage1", "stage2", "stage3", "my"):
        assert all(loss > 0 for loss in losses(project, run))
    with gzip.open(project / "runs/mined/wikipedia_question.jsonl.gz", "rt") as file:
        mined = [json.loads(line) for line in file]
    counts = json.loads((project / "runs/mined/wikipedia_question.jsonl.gz.json").read_text())
    counts = counts["counts"]
    kept = sum(len(row["neg"]) for row in mined)
    assert len(mined) == counts["rows"] == 60
    assert kept == counts["kept"] > 0  # few: the teacher has learnt for two steps
    dropped = counts["positive"] + counts["rule"] + counts["surplus"]
    assert counts["candidates"] == kept + dropped

    table = printed["python eval.py --limit 500"]
    scores = {}
    for line in table.splitlines():
        if line.startswith("| "):
            scores[line.split("|")[1].strip()] = line.split("|")[3].strip()
    assert {"SQuAD", "TREC", "WikipediaTopics", "mean"} <= scores.keys()
    assert float(scores["SQuAD"]) > 1

    for command in ("python nvembed.py", "python nvembed.py runs/stage2"):
        numbers = re.findall(r"^ *(-?[\d.]+) +(-?[\d.]+)$", printed[command], re.MULTILINE)
        assert len(numbers) == 2
    assert (project / "runs/plot.png").exists()


@pytest.mark.slow
def test_python_blocks_run(project):
    """README's and RESULTS.md's lines, with the runs of the commands above."""
    if not (project / "runs/my/config.json").exists():
        test_readme_commands_run(project)
    (code,) = blocks(TEXTS["README.md"], "python")
    check = "assert ids.shape == scores.shape == (1, 2)\nassert 0.1 < abs(scores).max() < 1.001\n"
    run_python(project, code + check)

    search, elsewhere = blocks(TEXTS["experiments/RESULTS.md"], "python")
    printed = run_python(project, search)
    ranked = re.findall(r"^ *(-?[\d.]+)  \S", printed, re.MULTILINE)
    assert len(ranked) == 10
    assert ranked == sorted(ranked, key=float, reverse=True)
    check = "assert -1 <= results.task_results[0].get_score() <= 1\nassert ids.shape == (1, 1)\n"
    run_python(project, elsewhere + check + "assert decoder.peft_config\n")


def test_the_script_of_the_debian_set(tmp_path):
    """data/README.md's script on three packages, of which one has too short a description."""
    long = " ".join(f"word{i}" for i in range(30))
    packages, translations = "", ""
    for name, text in (("one", long), ("two", long + " more"), ("three", "short")):
        packages += f"Package: {name}\nSection: text\n\n"
        short = f"Description-en: a tool named {name}"
        translations += f"Package: {name}\n{short}\n {text}\n .\n Another paragraph.\n\n"
    (tmp_path / "Packages").write_text(packages)
    (tmp_path / "Translation-en").write_text(translations)
    (tmp_path / "data/eval").mkdir(parents=True)
    (code,) = [code for code in blocks(TEXTS["data/README.md"], "python") if "by_hash" in code]

    command = [sys.executable, "-c", code, "Packages", "Translation-en"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    with gzip.open(tmp_path / "data/eval/debian.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert {row.get("query") for row in rows} == {"a tool named one", "a tool named two", None}
    assert {row["package"] for row in rows} == {"one", "two"}
    assert {row["doc"] for row in rows if "doc" in row} == {long, long + " more"}
