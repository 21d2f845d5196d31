"""SamplingColumns: the parameters that the sampling kernel reads, one column each, on the device."""

import struct
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from moray.engine.backends.inputs import integers
from moray.engine.core.sequence import Sequence as EngineSequence
from moray.engine.platform.transfer import to_device
from moray.engine.sampling.running_sample import RunningSample

ROWS_TOGETHER = 4  # so that 16 divides each column's address: Triton compiles a kernel again for others
# A row as pack_row() packs it, which is once a sample: a step only puts rows one after the other.
_ROW = struct.Struct("=ddQqfii")
_DTYPES = {
    "top_p": torch.float64, "min_p": torch.float64, "stream_key": torch.int64, "num_prompt_tokens": torch.int64,
    "temperature": torch.float32, "top_k": torch.int32, "sample": torch.int32,
}  # fmt: skip
_FIELDS = np.dtype([(name, str(dtype).removeprefix("torch.")) for name, dtype in _DTYPES.items()])
assert _FIELDS.itemsize == _ROW.size
_ON_DEVICE = ("temperature", "top_k", "top_p", "min_p", "stream_key", "sample")  # as the kernel takes them


def pack_row(seq: EngineSequence, temperature: float, top_k: int) -> bytes:
    """Return the row of a sequence; see kernels/gpu/sampling.py for the parameters."""
    params, key = seq.request.params, seq.request.stream_key
    return _ROW.pack(params.top_p, params.min_p, key, seq.num_prompt_tokens, temperature, top_k, seq.sample)


class SamplingColumns:
    """Holds the columns of some samples on the device, from step to step as long as the samples stay the same.

    The numbers of generated tokens are counted on the device: each sample gets a token in each step. Where a grammar
    may force further tokens, the host brings the numbers with each step.
    """

    def __init__(self, rows: Sequence[bytes], samples: Sequence[RunningSample], device: torch.device) -> None:
        """Make the columns. rows: from pack_row(), one a sample"""
        self._seqs, self._device = [sample.seq for sample in samples], device
        self._has_jumps = any(sample.jumps for sample in samples)
        room = len(rows) + -len(rows) % ROWS_TOGETHER
        values = np.frombuffer(b"".join(rows) + bytes((room - len(rows)) * _ROW.size), _FIELDS)
        self._prompt_lens = values["num_prompt_tokens"][: len(rows)].copy()
        packed = np.frombuffer(bytearray().join([values[name].tobytes() for name in _ON_DEVICE]), np.uint8)
        memory = to_device(packed, torch.uint8, device)
        dtypes = [_DTYPES[name] for name in _ON_DEVICE]
        sizes = [dtype.itemsize * room for dtype in dtypes]
        columns = zip(dtypes, sizes, accumulate(sizes), strict=True)
        self._columns = tuple(memory[end - size : end].view(dtype) for dtype, size, end in columns)
        self._num_generated: Tensor | None = None  # for the next step

    def of_step(self) -> tuple[Tensor, ...]:
        """Return the arguments of the sampling kernel, after the logits, for the next token of each sample."""
        if self._num_generated is None:
            num_generated = integers([seq.num_tokens for seq in self._seqs]) - self._prompt_lens
            self._num_generated = to_device(num_generated, torch.int64, self._device)
        return *self._columns, self._num_generated

    def count(self) -> None:
        """Count the tokens that were sampled with what of_step() returned."""
        if self._has_jumps:
            self._num_generated = None
        elif self._num_generated is not None:
            self._num_generated.add_(1)
