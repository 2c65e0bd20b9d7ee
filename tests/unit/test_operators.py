"""How many operators a block's training step has, and how many bytes they move: not by the clock.

What a GPU has one kernel for counts as one: attention, RMSNorm, dropout. Views count nothing.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nvembed

VERSION_1 = {"operators": 219, "bytes": 14.52e9}  # counted in the same way, at commit ea0e53e
VIEWS = set(
    "t view _unsafe_view transpose expand unsqueeze squeeze slice split detach alias select permute"
    " as_strided split_with_sizes unbind reshape flatten unflatten".split()
)
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "eos_token_id": 2,
}
TOKENS = 4096


class Counter(TorchDispatchMode):
    """Counts operators, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] not in VIEWS:
            self.operators += 1
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


class OneKernel(torch.autograd.Function):
    """Stands for what a GPU computes in one kernel, and its gradient in another."""

    @staticmethod
    def forward(ctx, first, *others):
        ctx.shapes = [other.shape for other in others]
        return first * 1

    @staticmethod
    def backward(ctx, grad):
        grad = grad * 1
        return grad, *[grad[:, : shape[1]] for shape in ctx.shapes]


def step(block):
    """A block's forward and backward pass on the meta device -> Counter."""
    x = torch.zeros(TOKENS, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rope = nvembed.rope_tables(block.self_attn.config, (512,) * 8, "cpu", torch.bfloat16)
    rope = [table.to("meta") for table in rope]
    with Counter() as counter:
        block(x, rope, (512,) * 8).sum().backward()
    return counter


@pytest.fixture
def block(monkeypatch):
    monkeypatch.setattr(nvembed, "attend", lambda q, k, v, *_: OneKernel.apply(q, k, v))
    monkeypatch.setattr(F, "rms_norm", lambda x, *_: OneKernel.apply(x))
    monkeypatch.setattr(nvembed.LoraDropout, "forward", lambda self, x: OneKernel.apply(x))
    with torch.device("meta"):
        model = nvembed.Decoder(nvembed.Config(**SHAPE)).to(torch.bfloat16).requires_grad_(False)
        holder = torch.nn.Module()
        holder.embedding_model = model
        nvembed.add_lora(holder, 16, 32, 0.1)
    return model.layers[0].train()


def test_a_block_has_few_operators(block):
    counter = step(block)
    assert counter.operators <= 0.6 * VERSION_1["operators"], counter.operators
    assert counter.operators > 80  # control: they were counted
    print(f"{counter.operators} operators, {counter.bytes / 1e9:.2f} GB")


def test_a_block_moves_few_bytes(block):
    counter = step(block)
    assert counter.bytes <= 0.65 * VERSION_1["bytes"], counter.bytes


def test_an_operator_more_is_seen(block, monkeypatch):
    """The control: the adapter's sum as an operator of its own."""
    few = step(block)
    linear = nvembed.Linear.forward

    def apart(self, x, low=None):
        return linear(self, x) + F.linear(low, self.lora_B.to(x.dtype))

    monkeypatch.setattr(nvembed.Linear, "forward", apart)
    more = step(block)
    assert more.operators >= few.operators + 7
    assert more.bytes > 1.05 * few.bytes
