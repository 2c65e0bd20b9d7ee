"""A run in sentence-transformers, and so in what is built on it.

    from nvembed import SentenceModule
    SentenceTransformer(modules=[SentenceModule("runs/stage2")])

A folder that this project saves names the class in its modules.json, and holds no code. So the
following loads it too, where nvembed.py can be imported:

    SentenceTransformer("runs/stage2", trust_remote_code=True)

sentence-transformers asks for that flag for any class that is not its own.
"""

import functools
from pathlib import Path

import torch

from data import folders, peers
from data.commands import InputError
from data.files import read_json, write_json
from data.texts import check_length

PEER_SETTINGS = "config_sentence_transformers.json"


@functools.cache
def sentence_module(embedder):
    """The class `nvembed.SentenceModule`; embedder is NVEmbed, which this file does not import."""
    peers.check_sentence_transformers("SentenceModule")
    from sentence_transformers.base.modules import InputModule

    class SentenceModule(InputModule):
        """NVEmbed as the only module of a SentenceTransformer: texts -> unit vectors (B, D).

        `model` is an NVEmbed or what `from_pretrained` loads, with its settings.
        """

        def __init__(self, model, **settings):
            super().__init__()
            self.prompts = {}
            if not isinstance(model, embedder):
                self.prompts = peer_settings(folders.local_folder(model)).get("prompts", {})
                model = embedder.from_pretrained(model, **settings)
            self.model = model

        def preprocess(self, inputs, prompt=None, **ignored):
            return {"texts": inputs, "task": instruction_of(prompt, self.model.config)}

        def forward(self, features):
            embeddings = self.model.encode(features["texts"], features["task"])
            embeddings = torch.from_numpy(embeddings).to(self.model.device)
            return features | {"sentence_embedding": embeddings}

        def get_embedding_dimension(self):
            return self.model.config.hidden_size

        def on_model_ready(self, model):
            add_prompts(model, self.prompts)

        def save(self, path, *args, **kind):
            settings = peer_settings(path)  # SentenceTransformer has written its own
            self.model.save_pretrained(path, None)
            if settings:
                write_json(Path(path, PEER_SETTINGS), settings)

        @classmethod
        def load(cls, path, model_kwargs=None, **place):
            names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
            place = {name: place[name] for name in names if name in place}
            module = cls(cls.load_dir_path(path, **place), **(model_kwargs or {}))
            module.prompts = {}  # SentenceTransformer has read them
            return module

    return finished(SentenceModule)


def finished(cls):
    """Adds what is plain access, and the name by which modules.json and pickle find the class."""
    cls.tokenizer = property(lambda self: self.model.tokenizer)
    cls.max_seq_length = property(lambda self: self.model.config.max_seq_length, set_max_length)
    cls.__module__, cls.__qualname__ = "nvembed", "SentenceModule"
    return cls


def add_prompts(model, prompts):
    """Gives a SentenceTransformer made of modules the prompts that it lacks, or has empty."""
    for name, prompt in prompts.items():
        if not model.prompts.get(name):
            model.prompts[name] = prompt


def set_max_length(module, length):
    module.model.config.max_seq_length = check_length(length, module.model.config)


def peer_settings(folder):
    """A folder's config_sentence_transformers.json, {} where there is none."""
    path = Path(folder, PEER_SETTINGS)
    return read_json(path) if path.exists() else {}


def instruction_of(prompt, c):
    """The bare task of a prompt, "" where there is none; c is the model's Config.

    Other prompts are refused: the model was not trained with them, and a text that begins with its
    prompt would have it pooled.
    """
    if not prompt:
        return ""
    before, after = c.query_template.split("{instruction}")
    if not prompt.startswith(before) or not prompt.endswith(after):
        raise InputError(f"prompt: expected {c.query_template!r}, got {prompt!r}")
    return prompt[len(before) : len(prompt) - len(after)]
