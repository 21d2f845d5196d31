"""StepBuffer: the inputs of a step side by side in one piece of memory, which one copy brings to the GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from moray.engine.backends.cuda.attention import CudaAttentionMetadata
from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.kernels.cpu.step_memory import StepLayout, write_step


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
        sizes = [1, self.num_seqs + 1, self.num_seqs, self.num_seqs * self.width]
        return _slices(sizes, itemsize=4, first=self.longs[-1].stop * 8)

    @cached_property
    def layout(self) -> StepLayout:
        """Return the sizes, and the byte where each part begins."""
        starts = [*(8 * part.start for part in self.longs), *(4 * part.start for part in self.ints)]
        return StepLayout(self.num_tokens, self.num_seqs, self.width, *starts)

    @cached_property
    def num_bytes(self) -> int:
        """Return the size of the memory."""
        return _padded(4 * self.ints[-1].stop)


class StepBuffer:
    """Divides a device's memory among the inputs of a step.

    inputs:  views of the memory; what is beyond the step is padding, which writes no key, and reads none
    """

    def __init__(self, shape: StepShape, memory: Tensor) -> None:
        """Make a buffer. memory: [shape.num_bytes] uint8"""
        self.shape, self.memory = shape, memory
        longs, ints = memory.view(torch.int64), memory.view(torch.int32)
        input_ids, positions, rope_sets, slots, pending_tokens, pending_rows = (longs[part] for part in shape.longs)
        num_tokens, starts, lens, tables = (ints[part] for part in shape.ints)
        self._pending_tokens, self._pending_rows = pending_tokens, pending_rows
        attention = CudaAttentionMetadata(tables.view(shape.num_seqs, shape.width), starts, lens, slots)
        self.inputs = ModelInputs(input_ids, positions, rope_sets, attention, num_tokens)

    def load(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> None:
        """Copy a step of at most this shape into the memory, without waiting; see Backend.build_inputs."""
        # PyTorch reuses a block of pinned memory only after the copies from it are complete.
        memory = torch.empty(self.shape.num_bytes, dtype=torch.uint8, pin_memory=self.memory.device.type != "cpu")
        num_pending = write_step(memory, self.shape.layout, block_size, plan.input_ids, plan.seqs, plan.blocks)
        self.memory.copy_(memory, non_blocking=True)
        if num_pending and last_token_ids is not None:
            self._take_pending(num_pending, last_token_ids)

    def _take_pending(self, num_pending: int, last_token_ids: Tensor) -> None:
        tokens, rows = self._pending_tokens, self._pending_rows
        if num_pending < len(rows):
            tokens, rows = tokens[:num_pending], rows[:num_pending]
        # A token that could not be sampled (-1) ends its sequence when it is read; until then any valid id will do.
        self.inputs.input_ids.index_copy_(0, tokens, last_token_ids.index_select(0, rows).clamp_(min=0))


def _padded(num_bytes: int) -> int:
    """Return the bytes up to the next part. Triton compiles a kernel again for pointers that 16 does not divide."""
    return -(-num_bytes // 16) * 16


def _slices(sizes: Sequence[int], itemsize: int, first: int = 0) -> list[slice]:
    """Return where parts of these sizes are, one after the other, from the byte `first` on."""
    spans = (_padded(itemsize * size) // itemsize for size in sizes)
    starts = accumulate(spans, initial=_padded(first) // itemsize)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
