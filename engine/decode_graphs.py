"""DecodeGraphs: decode steps as CUDA graphs, each captured once for a number of sequences and replayed.

A step of one token a sequence takes some 400 kernel launches; replaying them as one graph leaves the GPU no gaps. A
graph has fixed shapes: a step runs in the next larger one, where the rest of its rows are padding that goes to no
expert, reads no keys and writes none.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.inputs import ModelInputs, PagedBatch

FIRST_WIDTH = 64  # blocks of the narrowest block table; each wider one has 4 times as many


@dataclass(frozen=True)
class _Graph:
    """inputs: what the graph reads, always in the same place; hidden_states: what it leaves"""

    graph: torch.cuda.CUDAGraph
    inputs: ModelInputs
    hidden_states: Tensor


class DecodeGraphs:
    """Graphs of `forward` for up to max_num_seqs sequences of up to max_blocks blocks."""

    def __init__(
        self, forward: Callable[[ModelInputs], Tensor], max_num_seqs: int, max_blocks: int, device: torch.device
    ) -> None:
        self._forward = forward
        self._sizes = graph_sizes(max_num_seqs)
        self._widths = table_widths(max_blocks)
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()  # one for all: no two of them run at the same time
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def capture(self) -> None:
        """Capture the graphs of short contexts, the largest first, whose memory the others then share."""
        for size in reversed(self._sizes):
            self._find(size, self._widths[0])

    def run(self, inputs: ModelInputs) -> Tensor:
        """Hidden states [num_seqs, hidden_size] of a step of one token a sequence; valid until the next run."""
        assert isinstance(inputs.attention, PagedBatch)
        num_seqs, width = inputs.attention.block_tables.shape
        found = self._find(round_up(num_seqs, self._sizes), round_up(width, self._widths))
        fill(found.inputs, inputs)
        found.graph.replay()
        return found.hidden_states[:num_seqs]

    def _find(self, size: int, width: int) -> _Graph:
        if (size, width) not in self._graphs:
            self._graphs[size, width] = self._capture(padding(size, width, self._device))
        return self._graphs[size, width]

    def _capture(self, inputs: ModelInputs) -> _Graph:
        self._forward(inputs)  # what is not compiled yet cannot be compiled while capturing
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_states = self._forward(inputs)
        return _Graph(graph, inputs, hidden_states)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Ascending; at most 7 rows or a quarter of a step are padding, which reads no experts and no keys."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1 << 16, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def table_widths(max_blocks: int) -> list[int]:
    """Ascending; narrow tables let attention share the keys of short contexts among more programs."""
    widths = [FIRST_WIDTH]
    while widths[-1] < max_blocks:
        widths.append(widths[-1] * 4)
    return [*widths[:-1], min(widths[-1], max_blocks)]


def round_up(n: int, to: list[int]) -> int:
    return to[bisect_left(to, n)]


def padding(num_seqs: int, width: int, device: torch.device) -> ModelInputs:
    """A decode step of nothing but padding."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    int32 = torch.int32
    attention = PagedBatch(
        zeros(num_seqs, width, dtype=int32),
        zeros(num_seqs + 1, dtype=int32),
        zeros(num_seqs, dtype=int32),
        zeros(num_seqs) - 1,
    )
    return ModelInputs(zeros(num_seqs), zeros(num_seqs), zeros(num_seqs), attention, zeros(1, dtype=int32))


def fill(fixed: ModelInputs, inputs: ModelInputs) -> None:
    """Write a decode step into the inputs of a larger one, in place; the rest becomes padding."""
    to, of = fixed.attention, inputs.attention
    assert isinstance(to, PagedBatch) and isinstance(of, PagedBatch) and fixed.num_tokens is not None
    num_seqs = len(of.slots)
    for name in ("input_ids", "positions", "rope_sets"):
        getattr(fixed, name)[:num_seqs].copy_(getattr(inputs, name))
    for field in fields(PagedBatch):
        source = getattr(of, field.name)
        target = getattr(to, field.name)
        target[tuple(slice(size) for size in source.shape)].copy_(source)
    to.query_starts[num_seqs + 1 :] = num_seqs
    to.context_lens[num_seqs:] = 0
    to.slots[num_seqs:] = -1
    fixed.num_tokens.fill_(num_seqs)
