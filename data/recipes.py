"""Recipes: the JSON files that say what is trained on and with which settings.

    {"base": str, "seed": int, "datasets": [entry, ...], "stages": {"1": {...}, "2": {...}, ...},
     "presets": {NAME: {...}, ...}}

An entry is one data set; data/README.md lists its fields. Its rows are a file beside the recipe
("file") or come from tables of the hub or local files ("source"), which data/prepare.py converts
into the cache.
"""

import hashlib
from pathlib import Path

from data.commands import InputError, check_ranges
from data.files import ROOT, beside, cache, check_fields, read_json
from data.leakage import OVERLAPS
from data.rows import check_prompt
from data.tables import tables_of

KINDS = ("retrieval", "classification", "clustering", "sts", "synthetic")
LABELS = ("examples", "names")  # documents of classes: other texts of the class, or its name

# Field: type or types. The stages' settings are checked by train.py.
RECIPE = {"base": str, "seed": int, "datasets": list, "stages": dict}
RECIPE_OPTIONAL = {"presets": dict}
STAGES = ("1", "2", "3")
PRESET_OPTIONAL = {"base": str, "stages": dict, "without": list, "labels": str}
DATASET = {"name": str, "kind": str, "stages": list, "instruction": str}
DATASET_OPTIONAL = {
    "file": str,
    "names": str,
    "source": dict,
    "leakage": dict,
    "samples": int,
    "symmetric": bool,
    "note": str,
}
LEAKAGE = {"against": dict, "by": str, "threshold": float}

TABLE = {"path": str, "split": str}
TABLE_OPTIONAL = {"config": (str, list), "revision": str, "rows": int}
PAIRS = TABLE | {"query": (str, list), "pos": (str, list)}
PAIRS_OPTIONAL = TABLE_OPTIONAL | {
    "neg": (str, list),
    "route": dict,
    "at_least": dict,
    "group": bool,
    "both": bool,
    "queries": dict,
    "corpus": dict,
}
CLASSES = TABLE | {"text": (str, list), "label": str}
CLASSES_OPTIONAL = TABLE_OPTIONAL | {"names": dict, "documents": str}
TEXTS_BY_ID = TABLE | {"id": str, "text": (str, list)}
LEAKAGE_TEXTS = TABLE | {"text": str}


def read_recipe(path, preset=None, labels=None):
    """Reads and checks a recipe -> dict with its data sets' files absolute.

    `preset`, or a path that ends in :NAME, is one of the recipe's "presets": another base,
    settings over those of the stages, data sets left out, other `labels`. `labels` is "examples"
    or "names" and says what the documents of a set of classes are.
    """
    path, preset = split_preset(path, preset)
    recipe = read_json(path)
    check_fields(recipe, RECIPE, RECIPE_OPTIONAL, path)
    check_ranges({"seed": recipe["seed"]}, f"{path}: ")
    check_fields(recipe["stages"], {}, dict.fromkeys(STAGES, dict), f"{path}: stages")
    presets = recipe.pop("presets", {})
    for name, fields in presets.items():
        check_fields(fields, {}, PRESET_OPTIONAL, f"{path}: presets: {name}")
    if preset is not None and preset not in presets:
        raise InputError(f"{path}: expected a preset of {list(presets)}, got {preset!r}")
    changes = presets.get(preset, {})

    labels = labels or changes.get("labels", "examples")
    if labels not in LABELS:
        raise InputError(f"{path}: labels: expected examples or names, got {labels!r}")
    for number, dataset in enumerate(recipe["datasets"]):
        check_dataset(dataset, f"{path}: datasets[{number}]")
        locate_dataset(dataset, path, labels)
    check_names(recipe["datasets"], path)
    apply_preset(recipe, changes, f"{path}: presets: {preset}")
    return recipe


def split_preset(path, preset):
    """Splits "FILE:NAME" -> (path of FILE, "NAME"), unless a file has that whole name."""
    if ":" in str(path) and not Path(path).exists():
        path, _, preset = str(path).rpartition(":")
    return Path(path), preset


def apply_preset(recipe, changes, where):
    """Changes a recipe in place as a preset says."""
    recipe["base"] = changes.get("base", recipe["base"])

    stages = recipe["stages"]
    for stage, settings in changes.get("stages", {}).items():
        if stage not in stages or not isinstance(settings, dict):
            known = list(stages)
            raise InputError(f"{where}: stage {stage}: expected an object of one of {known}")
        stages[stage] = stages[stage] | settings

    left_out = changes.get("without", [])
    names = [dataset["name"] for dataset in recipe["datasets"]]
    for name in left_out:
        if name not in names:
            raise InputError(f"{where}: without: expected one of {names}, got {name!r}")
    recipe["datasets"] = [
        dataset for dataset in recipe["datasets"] if dataset["name"] not in left_out
    ]


def check_dataset(dataset, where):
    """Checks an entry of a recipe's "datasets"."""
    check_fields(dataset, DATASET, DATASET_OPTIONAL, where)
    check_ranges({"samples": dataset.get("samples", 1)}, f"{where}: ")
    check_prompt(dataset["instruction"], where, "instruction")
    name = dataset["name"]
    if name in ("", "..") or Path(name).name != name:
        raise InputError(f"{where}: field 'name': expected the name of a file, got {name!r}")
    kind = dataset["kind"]
    if kind not in KINDS:
        raise InputError(f"{where}: field 'kind': expected one of {KINDS}, got {kind!r}")
    stages = dataset["stages"]
    if stages not in ([1], [2], [1, 2]):
        raise InputError(f"{where}: field 'stages': expected [1], [2] or [1, 2], got {stages}")
    if ("file" in dataset) == ("source" in dataset):
        raise InputError(f"{where}: expected either 'file' or 'source'")
    if "source" in dataset:
        check_source(dataset["source"], f"{where}: source")
    if "leakage" in dataset:
        check_leakage(dataset["leakage"], f"{where}: leakage")


def check_names(datasets, where):
    """Refuses data sets of one name, and files of one name: mined rows have their files' names."""
    names = [dataset["name"] for dataset in datasets]
    files = [Path(dataset["file"]).name for dataset in datasets]
    files += [Path(dataset["corpus"]).name for dataset in datasets if "corpus" in dataset]
    for found in (names, files):
        for name in found:
            if found.count(name) > 1:
                raise InputError(f"{where}: datasets: expected one of the name {name}, got several")


def check_source(source, where):
    """Checks an entry's "source": rows of pairs, or of texts with labels."""
    if "label" in source:
        check_table(source, CLASSES, CLASSES_OPTIONAL, where)
    else:
        check_table(source, PAIRS, PAIRS_OPTIONAL, where)
    for name, sides in source.get("route", {}).items():
        known = isinstance(sides, dict) and all(side in ("pos", "neg") for side in sides.values())
        if not known:
            message = f"field '{name}': expected pos or neg by value, got {sides!r}"
            raise InputError(f"{where}: route: {message}")
    if len(source.get("route", {})) > 1:
        raise InputError(f"{where}: field 'route': expected one field, got {list(source['route'])}")
    names = source.get("names", {})
    check_fields(names, dict.fromkeys(names, str), {}, f"{where}: names")
    documents = source.get("documents", "names")
    if documents != "names":
        raise InputError(f"{where}: field 'documents': expected names, got {documents!r}")
    thresholds = source.get("at_least", {})
    check_fields(thresholds, dict.fromkeys(thresholds, (int, float)), {}, f"{where}: at_least")
    for name in ("queries", "corpus"):
        if name in source:
            check_table(source[name], TEXTS_BY_ID, TABLE_OPTIONAL, f"{where}: {name}")


def check_table(table, required, optional, where):
    """Checks what names a table and its fields."""
    check_fields(table, required, optional, where)
    check_ranges({"rows": table.get("rows", 1)}, f"{where}: ")
    if not table["path"].strip():
        raise InputError(f"{where}: field 'path': expected a hub id, folder or file")
    for name, value in table.items():
        if isinstance(value, list) and not all(isinstance(part, str) for part in value):
            raise InputError(f"{where}: field '{name}': expected a list of str, got {value!r}")


def check_leakage(leakage, where):
    """Checks an entry's "leakage": the texts not to train on, and what is too near to one."""
    check_fields(leakage, LEAKAGE, {}, where)
    by = leakage["by"]
    if by not in OVERLAPS:
        raise InputError(f"{where}: field 'by': expected {' or '.join(OVERLAPS)}, got {by!r}")
    check_ranges({"threshold": leakage["threshold"]}, f"{where}: ")
    check_table(leakage["against"], LEAKAGE_TEXTS, TABLE_OPTIONAL, f"{where}: against")


def locate_dataset(dataset, path, labels):
    """Fills in where a data set's rows are: "file", and the "corpus" that mining searches.

    Its sources' paths are made whole where they stand beside the recipe. With `labels` "names", the
    rows are the data set's label-based form if it has one.
    """
    source = dataset.get("source")
    here = path.resolve().parent
    if source is None:
        by_names = labels == "names" and "names" in dataset
        file = dataset["names"] if by_names else dataset["file"]
        dataset["file"] = str(here / file)
    else:
        for table in tables_of(dataset):
            local = here / table["path"]
            if local.exists():  # else it is of the hub
                table["path"] = str(local)
        by_names = labels == "names" and "label" in source and "documents" not in source
        stem = dataset["name"]
        if by_names:
            source["documents"] = "names"
            stem += "_names"
        folder = made_rows(path.resolve())
        dataset["file"] = str(folder / f"{stem}.jsonl.gz")
        if dataset["kind"] in ("retrieval", "sts"):
            dataset["corpus"] = str(folder / f"{dataset['name']}.corpus.jsonl.gz")
    if by_names:
        dataset["symmetric"] = False  # a label's name is no query


def made_rows(path):
    """The folder of the rows that a recipe's sources give: its own, however many have its name."""
    name = path.stem
    if path.parent != ROOT / "data":
        name += "-" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return cache() / "recipes" / name


def check_prepared(entry):
    """Refuses an entry's rows if prepare.py made them from another one, or has not finished."""
    path = Path(entry["file"])
    if "source" not in entry or not path.exists():
        return
    made_by = (plan_in(beside(path, "json")) or {}).get("dataset", {})
    for field in ("source", "leakage", "samples"):
        if made_by.get(field) != entry.get(field):
            message = f"was not made by the recipe's '{field}'; data/prepare.py makes it anew"
            raise InputError(f"{path}: {message}")


def plan_in(report):
    """What a report says that its rows were made by; {} without one, None if they are half made."""
    return read_json(report).get("plan", {}) if report.exists() else {}


def stage_settings(recipe, path, stage, types):
    """What a recipe sets for a stage -> {name: value}, checked against train.py's {name: type}."""
    where = f"{path}: stages.{stage}"
    if str(stage) not in recipe["stages"]:
        raise InputError(f"{path}: stages: expected '{stage}', got {list(recipe['stages'])}")
    settings = recipe["stages"][str(stage)]
    for name, value in settings.items():
        if name not in types:
            raise InputError(f"{where}: unknown setting '{name}'")
        if not has_type(value, types[name]):
            expected = "a list of int" if types[name] is list else types[name].__name__
            raise InputError(f"{where}.{name}: expected {expected}, got {value!r}")
    check_ranges(settings, f"{where}.")
    return settings


def has_type(value, kind):
    """Whether a setting has its type; an int will do for a float, a list is one of int."""
    if kind is list:
        return isinstance(value, list) and all(type(number) is int for number in value)
    return type(value) in ((int, float) if kind is float else (kind,))
