"""CUDA graphs of small batches, such as single queries: one launch in place of hundreds.

The kernels of one query are done before the program has launched the next ones: a 7B model takes
26 ms for 64 tokens on an H100, which needs 5 to read the weights.

Also: copies off a GPU that do not wait for what comes after.
"""

import functools
import sys
import threading
from collections import OrderedDict

import torch

MOST_TOKENS = 256  # of a batch that is replayed; a larger one keeps a GPU busy without
MOST_GRAPHS = 64
CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


class Replay:
    """A decoder's `states` that replays a batch whose texts' lengths it has seen before.

    Equal to the plain function: the same kernels in the same order, on the weights' present values.
    A graph holds the addresses of the weights and the mask. Its key names both, so a model that was
    moved or changed gets another graph; old ones go when there are too many. Large batches,
    training and whatever cannot be captured take the plain function.

    constants(lengths, device): a tensor that attention reads and that has to outlive the graph.
    """

    def __init__(self, decoder, constants):
        self.decoder = decoder
        self.constants = constants
        self.forget()

    def forget(self):
        self.graphs = OrderedDict()  # what determines a graph: its replay; the latest is last
        self.lock = threading.Lock()  # of the memory that a graph reads and writes
        self.works = True

    def __getstate__(self):
        """Copies and pickles have no graphs."""
        return {"decoder": self.decoder, "constants": self.constants}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.forget()

    def plain(self, x, rope, lengths):
        return type(self.decoder).states(self.decoder, x, rope, lengths)

    def __call__(self, x, rope, lengths):
        """x (S, D), rope tables, lengths of the texts -> (S, D)."""
        if not self.works or not is_small(x) or self.decoder.training:
            return self.plain(x, rope, lengths)
        kind = (x.dtype, x.device, x.is_inference(), self.decoder.config.causal)
        key = (lengths, kind, places(self.decoder))
        with self.lock:
            if key not in self.graphs:
                try:
                    self.graphs[key] = self.make(x, rope, lengths)
                except RuntimeError as error:
                    self.works = False
                    reason = str(error).partition("\n")[0]
                    print(f"CUDA graphs are off: {reason}", file=sys.stderr)
                    return self.plain(x, rope, lengths)
            self.graphs.move_to_end(key)
            if len(self.graphs) > MOST_GRAPHS:
                self.graphs.popitem(last=False)
            return self.graphs[key](x)

    def make(self, x, rope, lengths):
        kept = (rope, self.constants(lengths, x.device))

        def states(x):
            return self.plain(x, kept[0], lengths)

        return capture(states, x)


def is_small(x):
    return x.is_cuda and len(x) <= MOST_TOKENS and not torch.is_grad_enabled()


def places(module):
    """Where the weights are; a quantised one, which has no address of its own, by its identity."""
    found = []
    for weight in module.parameters():
        plain = type(weight.data) is torch.Tensor
        found.append(weight.data_ptr() if plain else id(weight))
    return tuple(found)


@functools.cache
def side_stream(device):
    """One for all captures: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(device)


def capture(function, x):
    """A function of one CUDA tensor like x, as a graph -> what computes it by replay."""
    held = x.clone()
    graph = torch.cuda.CUDAGraph()
    aside, present = side_stream(x.device), torch.cuda.current_stream(x.device)
    aside.wait_stream(present)
    with CAPTURING, torch.cuda.stream(aside):  # its device too; left again after an error
        for _ in range(3):  # compiles, and chooses kernels
            function(held)
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            out = function(held)
    present.wait_stream(aside)

    def replay(x):
        held.copy_(x)
        graph.replay()
        return out.clone()

    replay.function = function  # the graph reads tensors that this one keeps
    return replay


def begin_copy(vectors, rows, places):
    """Begins to copy vectors (n, D) off a GPU -> a function that waits for it and stores them.

    It does not wait for the batch that was launched after them.
    """
    copy = vectors.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event() if vectors.is_cuda else None
    if copied is not None:
        copied.record(torch.cuda.current_stream(vectors.device))  # not of the current device

    def store():
        if copied is not None:
            copied.synchronize()
        rows[places] = copy

    return store
