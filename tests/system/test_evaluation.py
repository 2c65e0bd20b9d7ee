"""Evaluation whole: mteb's own tasks of every type, the shipped sets, peers, several ranks."""

import re
import shutil
import subprocess
import sys

import mteb
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import data.tasks
import eval as evaluation
import nvembed
from data.commands import InputError, run_command
from data.files import read_json, write_json


def table(monkeypatch, capsys, *args):
    """python eval.py ARGS -> its table as {first cell: other cells}."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *[str(arg) for arg in args]])
    capsys.readouterr()
    run_command(evaluation.main)
    return cells(capsys.readouterr().out)


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in rows}


# ---- tasks


@pytest.mark.slow
def test_mteb_mock_tasks_of_every_text_type(released, monkeypatch):
    encoder = evaluation.Encoder(str(released), max_length=128, dtype="float32")
    results = mteb.mock_run(encoder)
    assert results.all_passed, results.to_markdown()
    passed = {name for name, result in results.items() if isinstance(result, mteb.TaskResult)}
    for kind in (
        "Retrieval",
        "Reranking",
        "Clustering",
        "PairClassification",
        "Classification",
        "STS",
        "Summarization",
        "BitextMining",
        "InstructionReranking",
        "MultilabelClassification",
    ):
        assert any(kind in name for name in passed), (kind, passed)
    blind = np.zeros((1, 4))  # control: one vector for all texts
    monkeypatch.setattr(type(encoder.model), "encode", lambda self, *args, **kwargs: blind)
    assert not mteb.mock_run(encoder).all_passed


@pytest.mark.slow
def test_shipped_sets_with_a_released_model(released, tmp_path, monkeypatch, capsys):
    models = ("--model", released, "--model", f"{released}:mean:causal")
    how = ("--limit", 4, "--max-length", 128, "--dtype", "float32", "--out", tmp_path)
    rows = table(monkeypatch, capsys, *models, *how)
    assert {name for name, *_ in data.tasks.TASKS} < set(rows)
    first, last = rows["SQuAD"][1:3]
    assert 0 <= float(first) <= 100 and 0 <= float(last) <= 100 and first != last


# ---- peers


@pytest.fixture
def peer(tmp_path):
    """A tiny random BERT as sentence-transformers saves it."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(vocabulary), intermediate_size=64, **sizes)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert"), max_seq_length=64), Pooling(32)]
    SentenceTransformer(modules=modules).save(str(tmp_path / "peer"))
    return tmp_path / "peer"


def test_a_sentence_transformers_folder_is_loaded_by_mteb(peer):
    from sentence_transformers import SentenceTransformer

    metadata = mteb.get_task("STS17").metadata
    how = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    batches = [{"text": ["a cat", "two dogs"]}, {"text": ["a bird"]}]
    encoder = evaluation.Encoder(str(peer))
    texts = ["a cat", "two dogs", "a bird"]
    theirs = SentenceTransformer(str(peer), device="cpu").encode(texts)
    np.testing.assert_allclose(encoder.encode(batches, **how), theirs, atol=1e-6)
    assert np.abs(theirs - theirs[::-1]).max() > 1e-3  # an order that is lost shows
    assert encoder.mteb_model_meta.experiment_kwargs == {}  # our settings are not its own

    capitals = evaluation.Encoder(str(peer), perturb="case", limit=3)
    found = capitals.encode([{"text": ["a cat"]}], **how)
    expected = SentenceTransformer(str(peer), device="cpu").encode(["A CAT"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert capitals.mteb_model_meta.experiment_kwargs == {"limit": 3, "perturb": "case"}
    short = evaluation.Encoder(str(peer), dims=8).encode(batches, **how)
    np.testing.assert_allclose(short, theirs[:, :8], atol=1e-6)
    with pytest.raises(InputError, match=r"expected .*peer, then none or some of \[\]"):
        evaluation.Encoder(f"{peer}:mean")


def test_a_peer_compares_as_its_folder_says(peer):
    """Some are trained for the inner product of vectors that are no unit vectors."""
    path = peer / "config_sentence_transformers.json"
    a, b = np.eye(32, dtype=np.float32)[:2] * 2, np.ones((2, 32), np.float32)
    for name, expected in (("cosine", 32**-0.5), ("dot", 2)):
        write_json(path, read_json(path) | {"similarity_fn_name": name})
        encoder = evaluation.Encoder(str(peer))
        np.testing.assert_allclose(encoder.similarity(a, b), np.full((2, 2), expected), rtol=1e-6)
        pairs = encoder.similarity_pairwise(a, b)
        np.testing.assert_allclose(pairs, np.full(2, expected), rtol=1e-6)


def test_a_released_folder_is_no_peer(released, tmp_path):
    """NV-Embed-v2 comes with a modules.json: remote code for sentence-transformers."""
    folder = tmp_path / "NV-Embed-v2"
    shutil.copytree(released, folder)
    (folder / "modules.json").write_text("[]")
    encoder = evaluation.Encoder(str(folder))
    assert not encoder.is_peer and isinstance(encoder.model, nvembed.NVEmbed)


# ---- ranks


@pytest.mark.slow
def test_equal_scores_on_one_and_two_ranks(released, tmp_path, monkeypatch, capsys):
    how = ["--limit", "6", "--max-length", "128", "--dtype", "float32", "--task", "wikipedia"]
    alone = table(monkeypatch, capsys, *how, "--model", released, "--out", tmp_path / "alone")
    assert 0 < float(alone["Wikipedia"][1]) < 100
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = []
    for model in (released, "none"):
        line = [*launcher, ROOT / "eval.py", *how, "--model", model, "--out", tmp_path / "two"]
        line = [str(argument) for argument in line]
        done.append(subprocess.run(line, capture_output=True, text=True, timeout=300, check=False))
    two, failed = done
    assert two.returncode == 0, two.stderr
    assert cells(two.stdout)["Wikipedia"] == alone["Wikipedia"]
    # an error on rank 0 ends all ranks
    assert failed.returncode != 0 and "error: model 'none': not a folder" in failed.stderr


RANK_1 = """
import sys
sys.path.insert(0, {root!r})
import eval as evaluation

evaluation.dist.init_process_group("gloo", init_method="file://{meet}", rank=1, world_size=2)
encode_share = evaluation.Encoder.encode_share

def counted(self, texts, task):
    print(len(texts), task, flush=True)
    return encode_share(self, texts, task)

evaluation.Encoder.encode_share = counted
evaluation.serve()
"""


@pytest.mark.slow
def test_two_ranks_share_texts_and_keep_their_order(released, tmp_path, monkeypatch):
    """Rank 0 encodes in this process; rank 1, in another one, prints what it is asked for."""
    meet = tmp_path / "meet"
    code = RANK_1.format(root=str(ROOT), meet=meet)
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    monkeypatch.setattr(evaluation, "instruction", lambda metadata, prompt_type: metadata)
    encoder = evaluation.Encoder(str(released), 64, "float32", dims=24)
    texts = [f"{'word ' * (i % 5)}{i}" for i in range(9)]
    lengths = []
    encode = encoder.model.encode

    def counted(texts, *args, **kwargs):
        lengths.append(len(texts))
        return encode(texts, *args, **kwargs)

    def embed(texts, task):
        return encoder.encode([{"text": texts}], task_metadata=task)

    alone = embed(texts, "Find it")
    assert alone.shape == (9, 24)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=2)
    try:
        encoder.model.encode = counted
        np.testing.assert_allclose(embed(texts, "Find it"), alone, atol=1e-5)
        assert embed(texts[:1], "").shape == alone[:1].shape and lengths == [5, 1]
    finally:
        dist.broadcast_object_list([None])
        dist.destroy_process_group()
    told = other.communicate(timeout=60)[0].splitlines()
    assert told[:2] == ["9 Find it", "1 "] and other.returncode == 0
    assert np.abs(alone - alone[::-1]).max() > 1e-2  # an order that is lost shows


# ---- from elsewhere


def test_use_from_other_libraries(base, tmp_path, monkeypatch):
    """mteb, FAISS and PEFT with a run of ours, by the lines of experiments/RESULTS.md."""
    document = (ROOT / "experiments/RESULTS.md").read_text()
    (code,) = re.findall(r"```python\n(import mteb.*?)```", document, re.DOTALL)
    model = nvembed.NVEmbed.from_pretrained(base)
    nvembed.add_lora(model, r=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "runs/stage2", torch.float32)
    nvembed.save_adapter(model.eval(), tmp_path / "runs/stage2/adapter", base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.base.base", {24: base}.get)
    found = {}
    exec(code, found)
    assert -1 <= found["results"].task_results[0].get_score() <= 1
    query = found["model"].encode(["how deep is the Baikal?"], found["task"])
    documents = found["index"].reconstruct_n(0, 2)
    assert found["ids"][0, 0] == (query @ documents.T).argmax()
    assert found["scores"][0, 0] == pytest.approx((query @ documents.T).max(), abs=1e-5)

    # the adapter in PEFT's hands: the decoder without pooling, with its causal mask
    causal = nvembed.NVEmbed.from_pretrained(tmp_path / "runs/stage2", causal=True)
    ids = torch.tensor(causal.tokenize(["cat 1"])[0].ids)
    with torch.no_grad():
        theirs = found["decoder"](ids[None]).last_hidden_state[0]
        ours = causal.embedding_model(ids, (len(ids),), torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
