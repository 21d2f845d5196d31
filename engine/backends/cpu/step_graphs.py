"""CpuGraphs: runs decodes of few sequences from graphs of their launches, without Python in between."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.kernels.cpu.launch_graph import GraphMemory, LaunchGraph, NotCapturable, capture
from moray.kernels.cpu.paged_attention import CpuAttentionMetadata

logger = logging.getLogger(__name__)

MAX_SEQS = 16  # of a graph: in larger steps the kernels run for much longer than Python takes between them
CAPTURE_AFTER = 4  # steps of so many sequences, which run kernel by kernel
# A new graph is compared with so many steps that run kernel by kernel as well: they have other tokens and positions
# than the captured one, and what the graph does not see would differ.
NUM_CHECKS = 3


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
        plan.write_pending(self.inputs.input_ids, last_token_ids)


@dataclass
class _Captured:
    """Holds a captured graph, what it writes, and how many comparisons it has still to pass."""

    graph: LaunchGraph
    results: tuple[Tensor, Tensor]
    num_checks: int = NUM_CHECKS


class CpuGraphs:
    """Runs decodes from graphs that compute the logits too, and all other steps as they are.

    A number of sequences gets a graph when it has been needed often enough. When a graph cannot be captured, or does
    not give the bits of a step that runs kernel by kernel, there are none any more.
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
        self._graphs: dict[int, _Captured] = {}
        self._num_missed: Counter[int] = Counter()  # steps that had no graph
        self._is_refused = False
        self._logits: Tensor | None = None  # of the last step

    def warm_up(self) -> bool:
        """Capture a step of one sequence, which compiles what captures need, and drop it; return whether that worked.

        It writes the cache's first key. A graph to keep has to be captured later: what is called between layers is not
        known yet.
        """
        inputs = DecodeInputs(1, self._max_blocks).inputs
        self._run(inputs)  # a first step computes numbers that are kept, which no graph repeats
        with suppress(_Refused):
            self._capture(inputs)
        return not self._is_refused

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
        if n not in self._inputs or inputs is not self._inputs[n].inputs or self._is_refused:
            return self._forward(inputs)
        try:
            captured = self._find(n)
            if captured is None:
                captured = self._graphs[n] = self._capture(inputs)
            elif captured.num_checks:
                self._check(captured, inputs)
            else:
                captured.graph.replay()
        except _Refused:
            return self._forward(inputs)
        hidden_states, self._logits = captured.results
        return hidden_states

    def find_logits(self) -> Tensor | None:
        """Return the logits of the last step, if its graph has computed them; see StepGraphs."""
        return self._logits

    def _wants_graph(self, num_seqs: int) -> bool:
        """Return whether a decode of so many sequences has a graph, or is to be captured."""
        if num_seqs > MAX_SEQS or self._is_refused:
            return False
        self._num_missed[num_seqs] += num_seqs not in self._graphs
        return num_seqs in self._graphs or self._num_missed[num_seqs] > CAPTURE_AFTER

    def _find(self, num_seqs: int) -> _Captured | None:
        captured = self._graphs.get(num_seqs)
        return captured if captured is not None and captured.graph.fits_cores else None

    def _run(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        hidden_states = self._forward(inputs)
        return hidden_states, self._compute_logits(hidden_states)

    def _capture(self, inputs: ModelInputs) -> _Captured:
        """Run a step and capture it."""
        with self._refused_if_it_fails(len(inputs.input_ids)):
            results, graph = capture(lambda: self._run(inputs), self._memory)
            return _Captured(graph, (results[0], results[1]))

    def _check(self, captured: _Captured, inputs: ModelInputs) -> None:
        """Run a step both ways, first from the graph: what it does not write is not there, in the KV cache either."""
        with self._refused_if_it_fails(len(inputs.input_ids)) as before:
            captured.graph.spoil()
            captured.graph.replay()
            got = [result.clone() for result in captured.results]
            self._counters.copy_(before)
            if not all(map(_have_equal_bits, got, self._run(inputs))):
                raise RuntimeError("a replay gave other numbers; is a kernel not launched by kernels/cpu/launch.py?")
            captured.num_checks -= 1

    @contextmanager
    def _refused_if_it_fails(self, num_seqs: int) -> Iterator[Tensor]:
        """Raise _Refused, with nothing added to the counters, where the block fails: the step then has to run.

        Yields a copy of the counters.
        """
        before = self._counters.clone()
        try:
            yield before
        except (NotCapturable, RuntimeError, MemoryError) as error:
            level = logging.INFO if isinstance(error, NotCapturable) else logging.WARNING
            logger.log(level, "Decodes run without graphs from now on (at a batch of %d): %s", num_seqs, error)
            self._counters.copy_(before)
            self._is_refused = True
            self._graphs.clear()
            raise _Refused from error


class _Refused(Exception):
    """There are no graphs any more."""


def _have_equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
