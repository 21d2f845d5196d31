"""DecodeGraphs: runs decode steps as CUDA graphs, each captured once for a number of sequences and then replayed.

A step of one token per sequence takes some 400 kernel launches; replaying them as one graph leaves the GPU no gaps. A
graph has fixed shapes: a step runs in the next larger graph, whose other rows are padding that goes to no expert,
reads no keys and writes none.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moray.engine.backends.cuda.attention import CudaAttentionMetadata
from moray.engine.backends.inputs import ModelInputs
from moray.engine.core.graph_shapes import MAX_GRAPHS, graph_sizes, round_up, table_widths


@dataclass(frozen=True)
class _Graph:
    """Holds a captured graph with its fixed tensors.

    inputs:         the tensors that the graph reads; a step is copied into them
    hidden_states:  the tensor that the graph writes
    """

    graph: torch.cuda.CUDAGraph
    inputs: ModelInputs
    hidden_states: Tensor


class DecodeGraphs:
    """Captures and replays graphs of `forward`, at most MAX_GRAPHS at once.

    With several ranks each has graphs of its own, which contain the gathers. Which graph a step needs, and which one it
    replaces, follows from the shapes of the steps so far: all ranks capture and replay alike.

    max_num_seqs:  most sequences in a step
    max_blocks:    most cache blocks of a sequence
    wait:          waits for the device as long as no rank has failed
    """

    def __init__(
        self,
        forward: Callable[[ModelInputs], Tensor],
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._forward = forward
        self._sizes = graph_sizes(max_num_seqs)
        self._widths = table_widths(max_blocks)
        self._device = device
        self._wait = wait
        self._pool = torch.cuda.graph_pool_handle()  # shared by all graphs: no two of them run at the same time
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()  # least recently used first

    def capture(self) -> None:
        """Capture all graphs if they are at most MAX_GRAPHS, else only those of short contexts.

        A graph that is captured later, during a job, delays a step. The largest graph is captured first, because the
        smaller graphs then share its memory.
        """
        for width in self._widths if len(self._sizes) * len(self._widths) <= MAX_GRAPHS else self._widths[:1]:
            for size in reversed(self._sizes):
                self._get(size, width)

    def run(self, inputs: ModelInputs) -> Tensor:
        """Run a step of one token per sequence.

        Returns its hidden states, [num_seqs, hidden_size], which are valid until the next run.
        """
        assert isinstance(inputs.attention, CudaAttentionMetadata)
        num_seqs, width = inputs.attention.block_tables.shape
        captured = self._get(round_up(num_seqs, self._sizes), round_up(width, self._widths))
        fill(captured.inputs, inputs)
        captured.graph.replay()
        return captured.hidden_states[:num_seqs]

    def _get(self, size: int, width: int) -> _Graph:
        key = size, width
        if key not in self._graphs:
            self._graphs[key] = self._capture(padding(size, width, self._device))
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(self, inputs: ModelInputs) -> _Graph:
        self._forward(inputs)  # compiles the kernels, which is not possible during a capture
        self._wait()
        torch.cuda.synchronize(self._device)
        while len(self._graphs) >= MAX_GRAPHS:  # safe: no graph runs any more
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        # thread_local: CUDA calls of other threads during the capture, like a query of free memory, must not end it.
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_states = self._forward(inputs)
        return _Graph(graph, inputs, hidden_states)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable the garbage collector: it might free a tensor or a graph, which breaks a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def padding(num_seqs: int, width: int, device: torch.device) -> ModelInputs:
    """Return a decode step of `num_seqs` rows that are all padding, with block tables of `width` blocks."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    int32 = torch.int32
    attention = CudaAttentionMetadata(
        zeros(num_seqs, width, dtype=int32),
        zeros(num_seqs + 1, dtype=int32),
        zeros(num_seqs, dtype=int32),
        zeros(num_seqs) - 1,
    )
    return ModelInputs(zeros(num_seqs), zeros(num_seqs), zeros(num_seqs), attention, zeros(1, dtype=int32))


def fill(fixed: ModelInputs, inputs: ModelInputs) -> None:
    """Copy a decode step into the inputs of a larger one, in place; the other rows become padding."""
    to, source = fixed.attention, inputs.attention
    assert isinstance(to, CudaAttentionMetadata) and isinstance(source, CudaAttentionMetadata)
    assert fixed.num_tokens is not None
    num_seqs = len(source.slots)
    for name in ("input_ids", "positions", "rope_sets"):
        getattr(fixed, name)[:num_seqs].copy_(getattr(inputs, name))
    for field in fields(CudaAttentionMetadata):
        values = getattr(source, field.name)
        target = getattr(to, field.name)
        target[tuple(slice(size) for size in values.shape)].copy_(values)
    to.query_starts[num_seqs + 1 :] = num_seqs
    to.context_lens[num_seqs:] = 0
    to.slots[num_seqs:] = -1
    fixed.num_tokens.fill_(num_seqs)
