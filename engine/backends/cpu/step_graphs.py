"""CpuGraphs: runs decodes of few sequences from graphs of their launches, without Python in between."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.kernels.cpu.launch_graph import GraphMemory, LaunchGraph, NotCapturable, capture
from moray.kernels.cpu.paged_attention import CpuAttentionMetadata

logger = logging.getLogger(__name__)

MAX_SEQS = 16  # of a graph: in larger steps the kernels run for much longer than Python takes between them
CAPTURE_AFTER = 4  # steps of so many sequences, which run kernel by kernel; a capture takes as long as two of them


class DecodeInputs:
    """Holds the inputs of decodes of a number of sequences, always in the same memory.

    inputs: what the model reads; there is room for more cache blocks than a step has
    """

    def __init__(self, num_seqs: int, max_blocks: int) -> None:
        """Allocate the memory. max_blocks: cache blocks of all sequences together"""
        numbers = torch.zeros(4, num_seqs, dtype=torch.int64)
        tiles, tables = torch.zeros(num_seqs, 4, dtype=torch.int64), torch.zeros(max_blocks, dtype=torch.int32)
        tiles[:, 1], tiles[:, 3] = torch.arange(num_seqs), 1
        input_ids, positions, rope_sets, slots = numbers
        attention = CpuAttentionMetadata(slots, tiles, tables)
        self.inputs = ModelInputs(input_ids, positions, rope_sets, attention)
        self._numbers, self._tiles, self._tables = numbers.numpy(), tiles.numpy(), tables.numpy()

    def load(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None) -> None:
        """Write a step; see Backend.build_inputs."""
        self._numbers[:] = plan.input_ids, plan.positions, plan.rope_sets, plan.slots(block_size)
        self._tiles[:, 0] = plan.num_blocks.cumsum() - plan.num_blocks
        self._tiles[:, 2] = plan.positions
        self._tables[: len(plan.blocks)] = plan.blocks
        if last_token_ids is not None and plan.num_pending:
            tokens, rows = map(torch.from_numpy, plan.pending())
            self.inputs.input_ids[tokens] = last_token_ids[rows].clamp(min=0)


@dataclass(frozen=True)
class _Captured:
    """Holds a captured graph, and what it writes."""

    graph: LaunchGraph
    hidden_states: Tensor
    logits: Tensor


class CpuGraphs:
    """Runs decodes from graphs that compute the logits too, and all other steps as they are.

    A number of sequences gets a graph when it has been needed often enough. Where one cannot be captured, these steps
    go on as they are.
    """

    def __init__(
        self,
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        build_inputs: Callable[[StepPlan, int, Tensor | None], ModelInputs],
        counters: Tensor,
        *,
        max_blocks: int,
    ) -> None:
        """Make no graph yet.

        build_inputs:  of a step without a graph
        counters:      what `forward` adds to in each step
        max_blocks:    cache blocks of a sequence, at most
        """
        self._forward, self._compute_logits, self._build_inputs = forward, compute_logits, build_inputs
        self._counters = counters
        self._max_blocks = max_blocks
        self._memory = GraphMemory()
        self._inputs: dict[int, DecodeInputs] = {}  # by the number of sequences
        self._graphs: dict[int, _Captured | None] = {}  # None = there cannot be one
        self._num_missed: Counter[int] = Counter()  # steps that had no graph
        self._logits: Tensor | None = None  # of the last step

    def warm_up(self) -> bool:
        """Capture a step of one sequence, which compiles what captures need, and drop it; return whether that worked.

        It writes the cache's first key. A graph to keep has to be captured later: what is called between layers is not
        known yet.
        """
        return self._capture(DecodeInputs(1, self._max_blocks).inputs) is not None

    def replays(self, plan: StepPlan) -> bool:
        """Return whether run() would replay a graph for this step."""
        return plan.is_decode and self._find(plan.num_seqs) is not None

    def build_inputs(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> ModelInputs:
        """Build the inputs of a step, where its graph reads them if there is one or one is to be captured."""
        n = plan.num_seqs
        if not plan.is_decode or not self._wants_graph(n):
            return self._build_inputs(plan, block_size, last_token_ids)
        if n not in self._inputs:
            self._inputs[n] = DecodeInputs(n, n * self._max_blocks)
        self._inputs[n].load(plan, block_size, last_token_ids)
        return self._inputs[n].inputs

    def run(self, plan: StepPlan, inputs: ModelInputs) -> Tensor:
        """Run a step; return its hidden states, [num_tokens, hidden_size], which are valid until the next run."""
        self._logits = None
        n = plan.num_seqs
        if n not in self._inputs or inputs is not self._inputs[n].inputs:
            return self._forward(inputs)
        captured = self._find(n)
        if captured is not None:
            captured.graph.replay()
        else:
            captured = self._graphs[n] = self._capture(inputs)
            if captured is None:
                return self._forward(inputs)
        self._logits = captured.logits
        return captured.hidden_states

    def find_logits(self) -> Tensor | None:
        """Return the logits of the last step, if its graph has computed them; see StepGraphs."""
        return self._logits

    def _wants_graph(self, num_seqs: int) -> bool:
        """Return whether a decode of so many sequences has a graph, or is to be captured."""
        if num_seqs > MAX_SEQS:
            return False
        if num_seqs in self._graphs:
            return self._graphs[num_seqs] is not None
        self._num_missed[num_seqs] += 1
        return self._num_missed[num_seqs] > CAPTURE_AFTER

    def _find(self, num_seqs: int) -> _Captured | None:
        captured = self._graphs.get(num_seqs)
        return captured if captured is not None and captured.graph.fits_cores else None

    def _capture(self, inputs: ModelInputs) -> _Captured | None:
        """Run a step and capture it; return None, with nothing added to the counters, if that is not possible."""

        def run() -> tuple[Tensor, Tensor]:
            hidden_states = self._forward(inputs)
            return hidden_states, self._compute_logits(hidden_states)

        before = self._counters.clone()
        try:
            (hidden_states, logits), graph = capture(run, self._memory)
        except NotCapturable as reason:
            logger.info("No graph for decodes of %d at once: %s", len(inputs.input_ids), reason)
            self._counters.copy_(before)
            return None
        self._counters.copy_((self._counters + before) // 2)  # the step ran twice
        return _Captured(graph, hidden_states, logits)
