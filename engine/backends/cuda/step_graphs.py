"""CudaGraphs: runs steps as CUDA graphs, each captured once for a shape and then replayed.

A step takes some 400 kernel launches; replaying them as one graph leaves the GPU no gaps, and the host no work. A graph
has a fixed number of tokens and sequences: a step of decodes, prompts or both runs in the next larger one. What is left
of the tokens is padding that goes to no expert, reads no keys and writes none, and what is left of the sequences has no
tokens. All launches follow from the shapes alone, see kernels/gpu.
"""

import gc
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.backends.cuda.attention import CudaAttentionMetadata
from moray.engine.backends.inputs import ModelInputs
from moray.engine.core.graph_shapes import GraphShape, GraphShapes

logger = logging.getLogger(__name__)

# A shape without a graph is captured when this many steps have needed it: shapes that are needed once stay eager, and
# where more shapes than graphs take turns, at most one step in so many captures one.
CAPTURE_AFTER = 4


@dataclass(frozen=True)
class _Captured:
    """Holds a captured graph, and the part of the fixed inputs that it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: ModelInputs


class FixedInputs:
    """Holds the tensors that all graphs read: each graph has views of their beginnings.

    No two graphs run at the same time, and a step is copied into them in the order of the GPU's work.
    """

    def __init__(self, shapes: GraphShapes, device: torch.device) -> None:
        def zeros(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        most_tokens, most_seqs = shapes.max_tokens, shapes.max_seqs
        self._of_tokens = [zeros(most_tokens) for _ in range(4)]
        self._block_tables = zeros(most_seqs * shapes.widths[-1], torch.int32)
        self._query_starts = zeros(most_seqs + 1, torch.int32)
        self._context_lens = zeros(most_seqs, torch.int32)
        self._num_tokens = zeros(1, torch.int32)

    def of(self, shape: GraphShape) -> ModelInputs:
        """Return the inputs of a shape; fill() makes them a step."""
        input_ids, positions, rope_sets, slots = (of_tokens[: shape.tokens] for of_tokens in self._of_tokens)
        attention = CudaAttentionMetadata(
            self._block_tables[: shape.seqs * shape.width].view(shape.seqs, shape.width),
            self._query_starts[: shape.seqs + 1],
            self._context_lens[: shape.seqs],
            slots,
        )
        return ModelInputs(input_ids, positions, rope_sets, attention, self._num_tokens)


class CudaGraphs:
    """Runs steps from graphs of `forward`, and those without a graph as they are.

    With several ranks each has graphs of its own, which contain the gathers. What is captured and replayed, and which
    graph a new one replaces, follows from the shapes of the steps so far: all ranks do alike.

    shapes:    which steps run from graphs, and how many graphs there may be
    wait:      waits for the device as long as no rank has failed
    is_alone:  there are no other ranks: where the memory ends, this one may go on with the graphs that it has
    """

    def __init__(
        self,
        forward: Callable[[ModelInputs], Tensor],
        shapes: GraphShapes,
        device: torch.device,
        wait: Callable[[], None] = lambda: None,
        *,
        is_alone: bool = True,
    ) -> None:
        self._forward = forward
        self._shapes = shapes
        self._device = device
        self._wait = wait
        self._is_alone = is_alone
        self._is_full = False  # a capture found no memory
        self._inputs = FixedInputs(shapes, device)
        self._hidden_states: Tensor | None = None  # what all graphs write
        self._pool = torch.cuda.graph_pool_handle()  # shared by all graphs: no two of them run at the same time
        self._stream = torch.cuda.Stream(device)
        self._graphs: OrderedDict[GraphShape, _Captured] = OrderedDict()  # least recently used first
        self._num_missed: Counter[GraphShape] = Counter()  # steps that had no graph

    def capture_at_start(self) -> None:
        """Capture the graphs that have to be there before the first step; see GraphShapes.at_start."""
        for shape in self._shapes.at_start:
            inputs = self._inputs.of(shape)
            clear(inputs)
            hidden_states = self._forward(inputs)  # compiles the kernels, which is not possible during a capture
            self._wait()
            self._capture(shape, hidden_states)

    def replays(self, inputs: ModelInputs) -> bool:
        """Return whether run() would replay a graph for this step."""
        return self._find(inputs) in self._graphs

    def run(self, inputs: ModelInputs) -> Tensor:
        """Run a step; return its hidden states, [num_tokens, hidden_size], which are valid until the next run.

        A step whose shape has no graph runs kernel by kernel. When that has happened often enough, the step is padded
        to the shape, which compiles its kernels, and the graph is captured while the GPU computes the step.
        """
        shape, num_tokens = self._find(inputs), len(inputs.input_ids)
        if shape is None:
            return self._forward(inputs)
        if captured := self._graphs.get(shape):
            self._graphs.move_to_end(shape)
            fill(captured.inputs, inputs)
            captured.graph.replay()
            assert self._hidden_states is not None
            return self._hidden_states[:num_tokens]
        self._num_missed[shape] += 1
        if self._num_missed[shape] < CAPTURE_AFTER or self._is_full:
            return self._forward(inputs)
        fixed = self._inputs.of(shape)
        fill(fixed, inputs)
        hidden_states = self._forward(fixed)
        self._capture(shape, hidden_states)
        return hidden_states[:num_tokens]

    def _find(self, inputs: ModelInputs) -> GraphShape | None:
        assert isinstance(inputs.attention, CudaAttentionMetadata)
        return self._shapes.find(len(inputs.input_ids), *inputs.attention.block_tables.shape)

    def _capture(self, shape: GraphShape, hidden_states: Tensor) -> None:
        """Capture a shape, which computes nothing. Where the memory ends, it gets no graph.

        hidden_states: those of a step in this shape, which has compiled the kernels
        """
        if self._is_full:
            return
        if self._hidden_states is None:
            self._hidden_states = hidden_states.new_empty(self._shapes.max_tokens, hidden_states.shape[1])
        if len(self._graphs) >= self._shapes.max_graphs:
            self._wait()
            torch.cuda.synchronize(self._device)  # the graph that is dropped may still run
            self._graphs.popitem(last=False)
        del self._num_missed[shape]
        inputs, graph = self._inputs.of(shape), torch.cuda.CUDAGraph()
        try:
            # Not torch.cuda.graph, which waits for the GPU and gives all cached memory back, before every capture.
            # thread_local: CUDA calls of other threads during the capture, like a query of free memory, must not end
            # it.
            with _no_collection(), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._write(self._forward(inputs))
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError as error:
            if not self._is_alone:  # the others have captured it, and would replay it
                raise
            self._is_full = True
            reason = str(error).splitlines()[0]
            logger.warning("%s; other steps than those of %d shapes run without a graph", reason, len(self._graphs))
            return
        self._graphs[shape] = _Captured(graph, inputs)

    def _write(self, hidden_states: Tensor) -> None:
        """Copy hidden states to where all graphs write them: results of their own would take as much for each graph."""
        assert self._hidden_states is not None
        self._hidden_states[: len(hidden_states)].copy_(hidden_states)


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


def clear(fixed: ModelInputs) -> None:
    """Make fixed inputs a step of nothing but padding."""
    attention, num_tokens = fixed.attention, fixed.num_tokens
    assert isinstance(attention, CudaAttentionMetadata) and num_tokens is not None
    num_tokens.zero_()
    attention.query_starts.zero_()
    attention.context_lens.zero_()
    attention.slots.fill_(-1)


def fill(fixed: ModelInputs, inputs: ModelInputs) -> None:
    """Copy a step into fixed inputs of at least its size, in place; the rest becomes padding.

    Ids, positions and block tables of the padding stay those of earlier steps: they are valid, and nobody reads them.
    """
    to, source = fixed.attention, inputs.attention
    assert isinstance(to, CudaAttentionMetadata) and isinstance(source, CudaAttentionMetadata)
    assert fixed.num_tokens is not None
    num_tokens, (num_seqs, width) = len(source.slots), source.block_tables.shape
    for name in ("input_ids", "positions", "rope_sets"):
        getattr(fixed, name)[:num_tokens].copy_(getattr(inputs, name))
    to.slots[:num_tokens].copy_(source.slots)
    to.slots[num_tokens:] = -1
    to.block_tables[:num_seqs, :width].copy_(source.block_tables)
    to.query_starts[: num_seqs + 1].copy_(source.query_starts)
    to.query_starts[num_seqs + 1 :] = num_tokens
    to.context_lens[:num_seqs].copy_(source.context_lens)
    to.context_lens[num_seqs:] = 0
    fixed.num_tokens.fill_(num_tokens)
