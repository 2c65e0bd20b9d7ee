"""What a finished run says of itself: its prompts, and README.md, the model card.

    python data/card.py runs/stage2        writes the card again, with eval.py's scores

A README.md that this file did not write is left alone.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

if not __package__:  # python data/card.py: imports start at the project, not at data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.commands import Flags, InputError, run_command
from data.dialects import content_hash
from data.files import read_json, renamed, write_json

PROMPTS = "config_sentence_transformers.json"
MARK = "<!-- This card was written by nvembed: without this line it is never written over. -->"
SETTINGS = ("pooling", "causal", "steps", "batch", "negatives", "in_batch", "lr", "temperature")
SETTINGS += ("max_length", "lora_rank", "seed")  # of train.py, those that the card shows
SAMPLE = 1000  # rows of a data set whose instructions are looked at

CARD = """---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- nvembed
---

{mark}

# {name}

A text embedder trained from `{base}` by the method of NV-Embed
([arXiv 2405.17428](https://arxiv.org/abs/2405.17428)): texts -> unit vectors of {width} numbers,
whose inner product is their cosine.

## How to load

```python
from nvembed import NVEmbed

model = NVEmbed.from_pretrained("{name}")
queries = model.encode(["a question"], "{task}")
documents = model.encode(["a passage"])
```

In sentence-transformers, where nvembed.py can be imported (the folder holds no code):

```python
from nvembed import SentenceModule
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(modules=[SentenceModule("{name}")])
queries = model.encode_query(["a question"])
documents = model.encode_document(["a passage"])
```

## Instructions

Queries carry one, as `prompt_name` here or as `instruction` of `NVEmbed.encode`. Documents carry
none, but for tasks whose two sides are alike.

{prompts}

## Training

{settings}

{figures}
"""


# ---- prompts


def prompts_of(datasets, template):
    """The instructions of a run's data sets -> {name: prompt}, as sentence-transformers names them.

    "query" is that of the first set whose documents carry none. Of rows that have their own the
    most frequent one counts.
    """
    prompts, queries = {}, []
    for dataset in datasets:
        rows = (dataset.rows[i] for i in range(min(SAMPLE, len(dataset.rows))))
        found = Counter(row.get("prompt", dataset.instruction) for row in rows)
        ((task, _),) = found.most_common(1)
        prompt = template.replace("{instruction}", task) if task else ""
        prompts[dataset.name] = prompt
        if not dataset.symmetric:
            queries.append(prompt)
    first = [*queries, *prompts.values()][0]
    roles = {"query": first, "document": ""}
    return roles | prompts | roles  # a data set of such a name changes neither


def write_prompts(run, datasets, template):
    settings = read_json(run / PROMPTS)
    write_json(run / PROMPTS, settings | {"prompts": prompts_of(datasets, template)})


def copy_prompts(source, out):
    """Gives a model that was saved in `out` the prompts of the folder `source`, if it has some."""
    if (source / PROMPTS).exists():
        prompts = read_json(source / PROMPTS).get("prompts", {})
        write_json(out / PROMPTS, read_json(out / PROMPTS) | {"prompts": prompts})


# ---- card


def is_ours(path):
    """Whether a README.md is a card from here."""
    return MARK in Path(path).read_text("utf-8", errors="replace")


def write_card(run, results="runs"):
    """Writes a finished run's README.md from its own files, unless there is another one.

    -> the number of its scores; None where nothing was written
    """
    run = Path(run)
    path = run / "README.md"
    if path.exists() and not is_ours(path):
        return None
    head, *steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    config = read_json(run / "config.json")
    prompts = read_json(run / PROMPTS)["prompts"]
    template = config["text_config"]["query_template"]
    before, after = template.split("{instruction}")
    task = prompts["query"].removeprefix(before).removesuffix(after)
    settings = [(name, head["settings"][name]) for name in SETTINGS]
    settings.append(("data sets", ", ".join(head["datasets"])))
    named = [(name, f"`{json.dumps(text, ensure_ascii=False)}`") for name, text in prompts.items()]
    found = scores(run, results)
    content = CARD.format(
        mark=MARK,
        name=run.resolve().name,
        base=Path(head["base"]).name,
        width=config["hidden_size"],
        task=json.dumps(task, ensure_ascii=False)[1:-1],
        prompts=table(("name", "prompt"), named),
        settings=table(("setting", "value"), settings),
        figures=figures(steps[-1], found),
    )
    with renamed(path) as temporary:
        temporary.write_text(content, "utf-8")
    return len(found)


def figures(record, scores):
    """The last step's held-out figures and eval.py's scores, as Markdown."""
    parts = []
    if "held_out_loss" in record:
        loss, accuracy = record["held_out_loss"], record["held_out_accuracy"]
        parts.append(f"On held-out rows: loss {loss:.4f}, accuracy {accuracy:.4f}.")
    if scores:
        parts.append(
            "## Scores\n\n" + table(("task", "main score x 100", "evaluated with"), scores)
        )
    return "\n\n".join(parts)


def scores(run, results):
    """What eval.py has stored of these very weights: [(task, score, settings), ...]."""
    name = run.absolute().name.replace(" ", "_")  # as mteb names its folder
    folder = Path(results, "results", f"nvembed__{name}", content_hash(run))
    rows = []
    for path in sorted(folder.glob("experiments/*/*.json")):
        result = read_json(path)
        settings = path.parent.name
        whole = re.fullmatch(r"dtype_[a-z0-9]+__max_length_\d+", settings)  # no --limit, no :mean
        if "scores" in result and whole:
            parts = [part for split in result["scores"].values() for part in split]
            score = 100 * fmean(part["main_score"] for part in parts)
            rows.append((path.stem, f"{score:.2f}", settings.replace("__", ", ")))
    return rows


def table(head, rows):
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        lines.append(" | ".join(str(cell).replace("|", "\\|") for cell in row))
    return "\n".join(f"| {line} |" for line in lines)


def main():
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="a finished run, such as runs/stage2")
    parser.add_argument("--results", default="runs", help="eval.py's --out (default runs)")
    args = parser.parse_args()
    if not (args.run / "finished").exists():
        raise InputError(f"{args.run}: expected a finished run")
    count = write_card(args.run, args.results)
    path = args.run / "README.md"
    if count is None:
        print(f"{path}: not from here, left as it is")
    else:
        print(f"{path}: written, with {count} scores of whole tasks, eval.py's without --limit")


if __name__ == "__main__":
    run_command(main)
