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

import numpy as np
import torch
from torch import Tensor

from moray.engine.backends.cuda.step_buffer import StepBuffer, StepShape
from moray.engine.backends.inputs import COLUMNS, ModelInputs, StepPlan
from moray.engine.core.graph_shapes import GraphShape, GraphShapes

logger = logging.getLogger(__name__)

# A shape without a graph is captured when this many steps have needed it: shapes that are needed once stay eager, and
# where more shapes than graphs take turns, at most one step in so many captures one.
CAPTURE_AFTER = 4
# A step of nothing but padding.
NOTHING = StepPlan(np.zeros(0, np.int64), np.zeros((0, len(COLUMNS)), np.int64), np.zeros(0, np.int32))


@dataclass(frozen=True)
class _Captured:
    """Holds a captured graph, and the inputs that it reads."""

    graph: torch.cuda.CUDAGraph
    buffer: StepBuffer


class CudaGraphs:
    """Runs steps from graphs of `forward`, and those without a graph as they are.

    The graphs of decodes of few sequences compute logits too.

    With several ranks each has graphs of its own, which contain the gathers. What is captured and replayed, and which
    graph a new one replaces, follows from the shapes of the steps so far: all ranks do alike.

    build_inputs:  of a step without a graph
    shapes:        which steps run from graphs, and how many graphs there may be
    wait:          waits for the device as long as no rank has failed
    is_alone:      there are no other ranks: where the memory ends, this one may go on with the graphs that it has
    """

    def __init__(
        self,
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        build_inputs: Callable[[StepPlan, int, Tensor | None], ModelInputs],
        shapes: GraphShapes,
        device: torch.device,
        wait: Callable[[], None] = lambda: None,
        *,
        is_alone: bool = True,
    ) -> None:
        self._forward = forward
        self._compute_logits = compute_logits
        self._build_inputs = build_inputs
        self._shapes = shapes
        self._device = device
        self._wait = wait
        self._is_alone = is_alone
        self._is_full = False  # a capture found no memory
        # The inputs of all graphs, each of which reads the beginning: a step is copied there in the order of the GPU's
        # work, and no two graphs run at the same time.
        self._memory = torch.empty(_most_bytes(shapes), dtype=torch.uint8, device=device)
        self._hidden_states: Tensor | None = None  # what all graphs write
        self._logits: Tensor | None = None  # what all graphs with logits write
        self._num_logits = 0  # rows of the last step; 0 = its graph has none, or it had no graph
        self._pool = torch.cuda.graph_pool_handle()  # shared by all graphs: no two of them run at the same time
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: OrderedDict[GraphShape, _Captured] = OrderedDict()  # least recently used first
        self._found: tuple[StepPlan, GraphShape | None] = NOTHING, None  # the last step and its shape
        self._num_missed: Counter[GraphShape] = Counter()  # steps that had no graph

    def capture_at_start(self) -> None:
        """Capture the graphs that have to be there before the first step; see GraphShapes.at_start."""
        for shape in self._shapes.at_start:
            buffer = self._buffer(shape)
            buffer.load(NOTHING, block_size=1)
            self._capture(shape, buffer, *self._run(shape, buffer.inputs))

    def replays(self, plan: StepPlan) -> bool:
        """Return whether run() would replay a graph for this step."""
        return self._find(plan) in self._graphs

    def build_inputs(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> ModelInputs:
        """Build the inputs of a step, once: padded to its shape where there is a graph or one is to be captured."""
        shape = self._find(plan)
        if shape is None:
            return self._build_inputs(plan, block_size, last_token_ids)
        if captured := self._graphs.get(shape):
            buffer = captured.buffer
        else:
            self._num_missed[shape] += 1
            if self._num_missed[shape] < CAPTURE_AFTER or self._is_full:
                return self._build_inputs(plan, block_size, last_token_ids)
            buffer = self._buffer(shape)
        buffer.load(plan, block_size, last_token_ids)
        return buffer.inputs

    def run(self, plan: StepPlan, inputs: ModelInputs) -> Tensor:
        """Run a step; return its hidden states, [num_tokens, hidden_size], which are valid until the next run.

        A step whose shape has no graph runs kernel by kernel. When that has happened often enough, the step is padded
        to the shape, which compiles its kernels, and the graph is captured while the GPU computes the step.
        """
        self._num_logits = 0
        shape = self._find(plan)
        if shape is None or inputs.num_tokens is None:
            return self._forward(inputs)
        if captured := self._graphs.get(shape):
            self._graphs.move_to_end(shape)
            captured.graph.replay()
            self._num_logits = plan.num_tokens if shape.has_logits else 0
            assert self._hidden_states is not None
            return self._hidden_states[: plan.num_tokens]
        hidden_states, logits = self._run(shape, inputs)
        self._capture(shape, self._buffer(shape), hidden_states, logits)
        return hidden_states[: plan.num_tokens]

    def find_logits(self) -> Tensor | None:
        """Return the logits of all tokens of the last step, if its graph has computed them; see StepGraphs."""
        if not self._num_logits:
            return None
        assert self._logits is not None
        return self._logits[: self._num_logits]

    def _run(self, shape: GraphShape, inputs: ModelInputs) -> tuple[Tensor, Tensor | None]:
        """Run all that the graph of a shape computes: hidden states, and logits if it has them.

        Before a capture, this compiles the kernels, which no capture can do.
        """
        hidden_states = self._forward(inputs)
        return hidden_states, self._compute_logits(hidden_states) if shape.has_logits else None

    def _find(self, plan: StepPlan) -> GraphShape | None:
        if self._found[0] is not plan:
            self._found = plan, self._shapes.find(plan.num_tokens, plan.num_seqs, plan.max_blocks)
        return self._found[1]

    def _buffer(self, shape: GraphShape) -> StepBuffer:
        step_shape = StepShape(*shape)
        return StepBuffer(step_shape, self._memory[: step_shape.num_bytes])

    def _capture(self, shape: GraphShape, buffer: StepBuffer, hidden_states: Tensor, logits: Tensor | None) -> None:
        """Capture a shape, which computes nothing. Where the memory ends, it gets no graph.

        hidden_states, logits: from _run() of this shape
        """
        if self._is_full:
            return
        if self._hidden_states is None:
            self._hidden_states = hidden_states.new_empty(self._shapes.max_tokens, hidden_states.shape[1])
        if self._logits is None and logits is not None:
            self._logits = logits.new_empty(self._shapes.max_logits, logits.shape[1])
        is_one_dropped = len(self._graphs) >= self._shapes.max_graphs
        if is_one_dropped or not self._is_alone:  # which may still run; NCCL captures best what nothing runs beside
            self._wait()
            torch.cuda.synchronize(self._device)
        if is_one_dropped:
            self._graphs.popitem(last=False)
        del self._num_missed[shape]
        graph = torch.cuda.CUDAGraph()
        try:
            # Not torch.cuda.graph, which waits for the GPU and gives all cached memory back, before every capture.
            # thread_local: CUDA calls of other threads during the capture, like a query of free memory, must not end
            # it.
            with _no_collection(), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._write(*self._run(shape, buffer.inputs))
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError as error:
            if not self._is_alone:  # the others have captured it, and would replay it
                raise
            self._is_full = True
            reason = str(error).splitlines()[0]
            logger.warning("%s; other steps than those of %d shapes run without a graph", reason, len(self._graphs))
            return
        self._graphs[shape] = _Captured(graph, buffer)

    def _write(self, hidden_states: Tensor, logits: Tensor | None) -> None:
        """Copy results to where all graphs write them: results of their own would take as much for each graph."""
        assert self._hidden_states is not None
        self._hidden_states[: len(hidden_states)].copy_(hidden_states)
        if logits is not None:
            assert self._logits is not None
            self._logits[: len(logits)].copy_(logits)


def _most_bytes(shapes: GraphShapes) -> int:
    return max(StepShape(*shape).num_bytes for width in shapes.widths for shape in shapes.of_width(width))


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
