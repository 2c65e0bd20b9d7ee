"""How every command begins and ends: flags and their ranges, errors in one line, signals.

Bad input raises InputError, one line that names the file, the line, the field and what was
expected. A command shows that line and exits with status 2; any other exception is a mistake of
ours and keeps its traceback.
"""

import argparse
import importlib
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields

from safetensors import SafetensorError

PARENT = os.getppid()  # torchrun, where it started this process


class InputError(ValueError):
    """Bad input, told in one line: which file or argument, which field, what was expected."""


def one_line(error):
    """What an exception of a library says, as a single line."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else repr(error)


def optional_package(name, user):
    """Imports an optional package -> the module. `user` is the flag or function that needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        message = f"{user}: expected the package {package}: pip install {package}"
        raise InputError(message) from error


# ---- ranges

RANGES = {  # name: its interval, a round bracket leaving out its end
    # training: train.Settings
    "steps": "[1, inf)",
    "batch": "[1, inf)",
    "negatives": "[0, inf)",
    "dims": "[1, inf)",
    "lr": "[0, inf)",
    "warmup": "[0, inf)",
    "weight_decay": "[0, inf)",
    "clip": "(0, inf]",
    "temperature": "(0, inf)",
    "false_negatives": "[0, 2]",
    "max_length": "[1, inf)",
    "micro_tokens": "[0, inf)",
    "lora_rank": "[0, inf)",
    "lora_alpha": "(0, inf)",
    "lora_dropout": "[0, 1)",
    "r": "[1, inf)",
    "shard_ranks": "[0, inf)",
    "distill": "[0, inf)",
    "kd": "[0, inf)",
    "kd_temperature": "(0, inf)",
    "held_out": "[0, inf)",
    "eval_every": "[1, inf)",
    "save_every": "[1, inf)",
    "seed": "[0, 1e18)",
    # recipes
    "samples": "[1, inf)",
    "rows": "[1, inf)",
    # mining
    "top_k": "[1, inf)",
    "bound": "(-inf, inf)",
    "memory": "(0, inf)",
    # evaluation, data, experiments
    "limit": "[2, inf)",
    "threshold": "[0, 1]",
    "tasks": "[1, inf)",
    "concurrency": "[1, inf)",
    "timeout": "(0, inf)",
    "retries": "[0, inf)",
    "max_tokens": "[1, inf)",
    "jobs": "[1, inf)",
    "seeds": "[1, inf)",
    "calibration": "[1, inf)",
    "drop_blocks": "[0, inf)",
}
DTYPES = ("float32", "bfloat16", "float16")  # of saved weights; oracles compute in float64 too
CHOICES = {  # of train.Settings too
    "dtype": ("auto", "float32", "bfloat16"),  # gradients in float16 would need a scaled loss
    "export_dtype": ("auto", *DTYPES),
}


def check_ranges(values, where=""):
    """Checks {name: value} against RANGES and CHOICES; `where` stands before a name.

    A value may be a list of numbers.
    """
    for name, value in values.items():
        if isinstance(value, str) and value not in CHOICES.get(name, [value]):
            raise InputError(f"{where}{name}: expected one of {CHOICES[name]}, got {value!r}")
        for number in value if isinstance(value, list) else [value]:
            if name in RANGES and is_number(number) and not inside(number, RANGES[name]):
                shown = name.replace("_", "-") if where == "--" else name
                expected = f"expected a number in {RANGES[name]}"
                raise InputError(f"{where}{shown}: {expected}, got {number}")


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def inside(value, interval):
    """Whether a number is in an interval, say "[0, 1)"; NaN is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and not math.isnan(value)


# ---- commands


class Flags(argparse.ArgumentParser):
    """The flags of a command. Those that are wrong or out of range are an InputError."""

    def __init__(self, description):
        raw = argparse.RawTextHelpFormatter
        super().__init__(description=description, formatter_class=raw)

    def error(self, message):
        raise InputError(message)

    def add_settings(self, settings):
        """A flag for each field of a dataclass; one that is not given is None."""
        for field in fields(settings):
            kind = {"type": field.type}
            default = field.default
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif field.type is list:
                kind, default = {"type": int, "nargs": "*"}, "none"
            name = "--" + field.name.replace("_", "-")
            shown = f"the recipe's, else {default}"
            self.add_argument(name, **kind, default=None, help=shown)

    def parse_args(self, *args, **kwargs):
        found = super().parse_args(*args, **kwargs)
        check_ranges(vars(found), "--")
        return found


def run_command(main):
    """Runs a command's main().

    Bad input, a full disk and the like become one line on stderr and exit status 2; Ctrl-C and
    SIGTERM become one line and 130. Temporary files are removed in each case.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt as error:
        end(str(error) or "stopped; the same command goes on", 130)
    except InputError as error:
        end(f"error: {error}", 2)
    except (OSError, SafetensorError) as error:
        end(f"error: {one_line(error)}", 2)


def end(line, status):
    """Ends this process with a line on stderr. Of several ranks that stop, one says it."""
    rank = os.environ.get("RANK", "0")
    if status == 2 or rank == "0":
        print(line, file=sys.stderr, flush=True)
    if rank == "0" and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == PARENT:
        say_after_torchrun(line)
    sys.exit(status)


def say_after_torchrun(line):
    """Prints a line when torchrun has ended, below its long report of the ranks that failed."""
    alive = f"ps -o stat= -p {PARENT} | grep -q '^[^Z]'"  # Z: ended, not yet waited for
    wait = f"while {alive}; do sleep 0.1; done"
    say = 'printf "%s\\n" "$0" >&2'
    subprocess.Popen(["sh", "-c", f"{wait}; {say}", line], start_new_session=True)
