"""The README's commands, in their order, in a copy of the project with a few rows of each set; --steps 2, --limit."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from nvembed import NVEmbed

from data import prepare

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {  # what is added to a command, by its first words
    "torchrun train.py --stage": "--steps 2 --batch 4 --no-compile --held-out 1",
    "torchrun train.py --data": "--steps 2 --batch 4 --no-compile --held-out 1",
    "python eval.py": "--limit 8",
}


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """Every command of the README's shell blocks that runs the project."""
    lines = [line.split("  #")[0] for block in blocks("sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(torchrun|python) \w+\.py", part)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "nvembed"
    ignored = shutil.ignore_patterns(".git", ".cache", "runs", ".venv", "__pycache__", ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for path in (folder / "data").glob("*.jsonl.gz"):
        rows = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        path.write_bytes(gzip.compress(b"".join(rows[:60])))
    (row,) = [line for block in blocks("json") for line in block.splitlines()]
    others = prepare.read_rows(folder / "data/wikipedia_question.jsonl.gz")[:3]
    (folder / "my.jsonl").write_text("\n".join([row, *map(json.dumps, others)]) + "\n")
    return folder


def test_commands(project):
    prepare.base(), prepare.minilm()  # fetched once, outside of the copy
    environment = {"NVEMBED_CACHE": str(prepare.cache()), "OMP_NUM_THREADS": "2"}
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    ran, said = [], ""
    for command in commands():
        if (
            "nvidia/" in command
            or "MTEB(" in command
            or "--nproc-per-node" in command
            or "--nnodes" in command
        ):
            continue  # no hub, no ranks here
        flags = [added for start, added in SMALL.items() if command.startswith(start)]
        done = subprocess.run(
            " ".join([command, *flags]),
            shell=True,
            cwd=project,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        ran.append(command)
        said += done.stdout
    for wanted in ("--stage 1", "--stage 2", "mine.py", "eval.py --task all", "--data mined/my.jsonl"):
        assert any(wanted in command for command in ran), ran
    for run in ("stage1", "stage2", "my"):
        steps = [
            json.loads(line) for line in (project / "runs" / run / "log.jsonl").read_text().splitlines()[1:]
        ]
        assert [step["step"] for step in steps] == [0, 1, 2] and all(step["loss"] > 0 for step in steps[1:])
    mined = prepare.read_rows(project / "runs/mined/wikipedia_question.jsonl.gz")
    assert len(mined) == 60 and np.mean([len(row["neg"]) for row in mined]) > 1
    table = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in said.splitlines() if "| " in line
    }
    assert {"SQuAD", "TREC", "WikipediaTopics", "mean"} <= table.keys() and float(table["SQuAD"]) > 1


def test_python(project, monkeypatch):
    code, *_ = blocks("python")
    monkeypatch.chdir(project)
    (project / "runs" / "stage2").mkdir(parents=True, exist_ok=True)
    if not (project / "runs/stage2/config.json").exists():
        NVEmbed.from_pretrained(prepare.base()).save_pretrained("runs/stage2")
    found = {}
    exec(code, found)
    assert found["emb"].shape == (1, 576) and abs(np.linalg.norm(found["emb"]) - 1) < 1e-3
