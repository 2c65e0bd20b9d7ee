"""What --help shows can be typed: every example is a command of ours with flags that it knows.

Those of README.md, most of them the same, are run by tests/system/test_readme.py.
"""

import argparse
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT

from data import commands

SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in (".", "data", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text("utf-8")
]


class Parsed(Exception):
    """Raised in place of a command's work."""


def help_of(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code
    return capsys.readouterr().out


def examples(text):
    """The commands in a help text, without the remarks beside them."""
    found = re.findall(r"^    ((?:python|torchrun) .+)$", text, re.MULTILINE)
    return [re.split(r"   +|  ?#|  ?->", line)[0].strip() for line in found]


def parse(command, monkeypatch):
    """Runs a command up to its flags -> InputError, SystemExit or Parsed is raised."""
    words = shlex.split(command)
    (place,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    monkeypatch.setattr(sys, "argv", words[place:])
    runpy.run_path(str(ROOT / words[place]), run_name="__main__")


@pytest.fixture
def only_parsing(monkeypatch):
    plain = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **kwargs):
        if isinstance(parser, commands.Flags):
            commands.check_ranges(vars(plain(parser, *args, **kwargs)), "--")
        else:
            plain(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(commands.Flags, "parse_args", parse_args)


def test_every_command_is_looked_at():
    wanted = {"nvembed.py", "train.py", "mine.py", "eval.py", "data/prepare.py"}
    assert wanted | {"data/synthesize.py", "experiments/compress.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_of_help(script, monkeypatch, capsys, only_parsing):
    found = examples(help_of(script, monkeypatch, capsys))
    assert any(script in command for command in found)
    for command in found:
        with pytest.raises(Parsed):
            parse(command, monkeypatch)


def test_a_wrong_example_is_seen(monkeypatch, only_parsing):
    text = "    python mine.py --modle x   remark\n    python mine.py --top-k 0  # remark\n"
    wrong = examples(text)
    assert wrong == ["python mine.py --modle x", "python mine.py --top-k 0"]
    for command in wrong:
        with pytest.raises(SystemExit) as end:
            parse(command, monkeypatch)
        assert end.value.code == 2
