"""Fetches the models that everything starts from, builds the shipped sets and the rows of recipes.

    python data/prepare.py                                # base and teacher -> cache, shipped sets
    python data/prepare.py --only base                    # one of base, minilm, sets
    python data/prepare.py --recipe data/paper.json       # rows of a recipe's sources -> cache
    python data/prepare.py --leakage ROWS --against FILE  # drop rows too near to a text of FILE

Sources are tables of the hub or local files; data/README.md describes them.
"""

import sys
from pathlib import Path

if not __package__:  # python data/prepare.py: imports start at the project, not at data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data import convert, sets
from data.base import base, minilm
from data.commands import Flags, InputError, run_command
from data.leakage import OVERLAPS, check_files
from data.recipes import LABELS, read_recipe

BUILDERS = {"base": base, "minilm": minilm, "sets": sets.build}
FLAGS = {  # by what the command is to do
    "with --leakage": ("leakage", "against", "by", "threshold", "out"),
    "with --recipe": ("recipe", "only", "labels", "out"),
    "without --recipe and --leakage": ("only",),
}


def main():
    parser = Flags(__doc__)
    flag = parser.add_argument
    flag("--only", nargs="+", help="base, minilm, sets; with --recipe names of its data sets")
    flag("--recipe", help="make the rows of this recipe's sources")
    flag(
        "--out",
        help="folder of the rows instead of the cache's; with --leakage file of the rows kept",
    )
    flag("--labels", choices=LABELS, help="documents of multi-class and clustering sets")
    flag("--leakage", metavar="ROWS", help="drop the rows too near to a text of --against")
    flag("--against", metavar="FILE")
    flag("--by", choices=OVERLAPS, help="BM25 score (default), or runs of 5 words")
    flag("--threshold", type=float, help="least overlap, 0 to 1, that is dropped (default 0.8)")
    args = parser.parse_args()
    if args.leakage:
        check_flags(args, "with --leakage")
        check_leakage(args)
    elif args.recipe:
        check_flags(args, "with --recipe")
        prepare_recipe(args)
    else:
        check_flags(args, "without --recipe and --leakage")
        build(args.only or list(BUILDERS))


def check_flags(args, doing):
    """Refuses flags that would be ignored."""
    for name, value in vars(args).items():
        if value is not None and name not in FLAGS[doing]:
            raise InputError(f"--{name}: expected none {doing}")


def check_leakage(args):
    if not args.against:
        raise InputError("--leakage: expected --against too")
    by = args.by or "bm25"
    threshold = 0.8 if args.threshold is None else args.threshold
    print(check_files(args.leakage, args.against, by, threshold, args.out))


def prepare_recipe(args):
    recipe = read_recipe(args.recipe, labels=args.labels)
    entries = {entry["name"]: entry for entry in recipe["datasets"]}
    chosen = args.only or list(entries)
    for name in chosen:
        if name not in entries:
            raise InputError(f"--only: expected one of {list(entries)}, got {name!r}")
    failed = []
    for name, entry in entries.items():
        if name not in chosen:
            continue
        if "source" not in entry:
            found = "as it is" if Path(entry["file"]).exists() else "missing"
            print(f"{entry['file']}: {found}. {entry.get('note', '')}")
            continue
        if args.out:
            for key in ("file", "corpus"):
                if key in entry:
                    entry[key] = str(Path(args.out, Path(entry[key]).name))
        try:
            print(convert.prepare(entry, recipe["seed"]))
        except InputError as error:  # the other sets are made all the same
            print(f"error: {name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise InputError(f"not made: {', '.join(failed)}; the reasons are above")


def build(names):
    for name in names:
        if name not in BUILDERS:
            raise InputError(f"--only: expected one of {list(BUILDERS)}, got {name!r}")
        print(f"{name}: {BUILDERS[name]()}")


if __name__ == "__main__":
    run_command(main)
