"""StepBuffer: the inputs of a step side by side in one piece of memory, which one copy brings to the GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from moray.engine.backends.cuda.attention import CudaAttentionMetadata
from moray.engine.backends.inputs import Integers, ModelInputs, StepPlan


@dataclass(frozen=True)
class StepShape:
    """States how many tokens and sequences a buffer has room for, and how wide its block tables are."""

    num_tokens: int
    num_seqs: int
    width: int

    @classmethod
    def of(cls, plan: StepPlan) -> "StepShape":
        """Return the shape of a step without padding."""
        return cls(plan.num_tokens, plan.num_seqs, plan.max_blocks)

    @cached_property
    def longs(self) -> list[slice]:
        """Return the int64 parts: input_ids, positions, rope_sets, slots, pending tokens and their rows."""
        return _slices([*[self.num_tokens] * 4, self.num_seqs, self.num_seqs], itemsize=8)

    @cached_property
    def ints(self) -> list[slice]:
        """Return the int32 parts, which follow: num_tokens, query_starts, context_lens, block tables."""
        return _slices([1, self.num_seqs + 1, self.num_seqs, self.num_seqs * self.width], itemsize=4)

    @cached_property
    def longs_bytes(self) -> int:
        """Return where the int32 parts begin."""
        return _padded(8 * self.longs[-1].stop)

    @cached_property
    def num_bytes(self) -> int:
        """Return the size of the memory."""
        return self.longs_bytes + _padded(4 * self.ints[-1].stop)


class StepBuffer:
    """Divides a device's memory among the inputs of a step.

    inputs:  views of the memory; what is beyond the step is padding, which writes no key, and reads none
    """

    def __init__(self, shape: StepShape, memory: Tensor) -> None:
        """Make a buffer. memory: [shape.num_bytes] uint8, as pack() fills it"""
        self.shape, self.memory = shape, memory
        end = shape.longs_bytes
        longs, ints = memory[:end].view(torch.int64), memory[end:].view(torch.int32)
        input_ids, positions, rope_sets, slots, pending_tokens, pending_rows = (longs[part] for part in shape.longs)
        num_tokens, starts, lens, tables = (ints[part] for part in shape.ints)
        self._pending_tokens, self._pending_rows = pending_tokens, pending_rows
        attention = CudaAttentionMetadata(tables.view(shape.num_seqs, shape.width), starts, lens, slots)
        self.inputs = ModelInputs(input_ids, positions, rope_sets, attention, num_tokens)

    def load(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> None:
        """Copy a step of at most this shape into the memory, without waiting; see Backend.build_inputs."""
        memory = pack(plan, self.shape, block_size, pinned=self.memory.device.type != "cpu")
        self.memory.copy_(memory, non_blocking=True)
        if len(plan.pending_rows) and last_token_ids is not None:
            self._take_pending(len(plan.pending_rows), last_token_ids)

    def _take_pending(self, num_pending: int, last_token_ids: Tensor) -> None:
        rows = last_token_ids.index_select(0, self._pending_rows[:num_pending])
        # A token that could not be sampled (-1) ends its sequence when it is read; until then any valid id will do.
        self.inputs.input_ids.index_copy_(0, self._pending_tokens[:num_pending], rows.clamp_(min=0))


def pack(plan: StepPlan, shape: StepShape, block_size: int, *, pinned: bool) -> Tensor:
    """Return the host's copy of the memory of a buffer of this shape, with the step in it.

    pinned: PyTorch reuses a block of pinned memory only after the copies from it are complete
    """
    memory = torch.empty(shape.num_bytes, dtype=torch.uint8, pin_memory=pinned)
    end = shape.longs_bytes
    bytes_of = memory.numpy()
    longs, ints = bytes_of[:end].view(np.int64), bytes_of[end:].view(np.int32)
    input_ids, positions, rope_sets, slots, tokens, rows = [longs[part] for part in shape.longs]
    num_tokens, starts, lens, tables = [ints[part] for part in shape.ints]
    _fill(input_ids, plan.input_ids)
    _fill(positions, plan.positions)
    _fill(rope_sets, plan.of_tokens(plan.rope_sets))
    _fill(slots, plan.slots(block_size), -1)
    tokens[: len(plan.pending_tokens)] = plan.pending_tokens
    rows[: len(plan.pending_rows)] = plan.pending_rows
    num_tokens[0] = plan.num_tokens
    starts[0] = 0
    _fill(starts[1:], plan.query_ends, plan.num_tokens)
    _fill(lens, plan.context_lens)
    plan.write_tables(tables.reshape(shape.num_seqs, shape.width))
    return memory


def _padded(num_bytes: int) -> int:
    """Return the bytes up to the next part. Triton compiles a kernel again for pointers that 16 does not divide."""
    return -(-num_bytes // 16) * 16


def _slices(sizes: Sequence[int], itemsize: int) -> list[slice]:
    """Return where parts of these sizes are, one after the other."""
    starts = accumulate((_padded(itemsize * size) // itemsize for size in sizes), initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def _fill(part: Integers, values: Integers, padding: int = 0) -> None:
    part[: len(values)] = values
    part[len(values) :] = padding
