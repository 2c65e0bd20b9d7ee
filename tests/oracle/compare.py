"""What the comparisons of a model share: distances, random ids and states, texts, families."""

import pytest
import references as ref
import torch
import torch.nn.functional as F

from nvembed import InputError

TASK = "Given a question, retrieve passages that answer the question"
TEXTS = [
    "the sun",
    "",
    "how do plants make food?",
    "x" * 40,
    "(7) 苹果 🍎\nend",
    "the sun",
    " a b",
]
LATENT = "latent_attention_model."
FAMILIES = {
    "mistral": ("mistral", {}),
    "mistral-wide-heads": ("mistral", {"head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "llama3-scaling": ("llama", {"rope_parameters": ref.LLAMA3}),
    "qwen2-bias": ("qwen2", {"bos_token_id": None}),
    "qwen3-norms": ("qwen3", {"bos_token_id": None, "head_dim": 24}),
}


def gap(a, b):
    """Largest absolute difference."""
    a, b = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    return float((a - b).abs().max())


def cosine(a, b):
    """Smallest cosine between rows of equal index."""
    a, b = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    return float(F.cosine_similarity(a, b, dim=-1).min())


def random_ids(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


def random_states(*lengths, seed=1):
    return torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(seed))


def states(model, ids):
    """The decoder's hidden states of one text: list of ids -> (T, D)."""
    with torch.no_grad():
        return model.embedding_model(torch.tensor(ids), (len(ids),), model.dtype)


def error_of(function, *args, **settings):
    """The message of the InputError that a call must raise: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **settings)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
