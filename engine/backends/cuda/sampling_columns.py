"""SamplingColumns: the parameters that the sampling kernel reads, one column each, on the device."""

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moray.engine.core.sequence import Sequence as EngineSequence
from moray.engine.platform.transfer import to_device

ROWS_TOGETHER = 4  # so that 16 divides each column's address: Triton compiles a kernel again for others
# A row as pack_row() packs it, which is once a sample: a step only puts rows one after the other.
_ROW = struct.Struct("=ddQfii")
_DTYPES = {
    "top_p": torch.float64, "min_p": torch.float64, "stream_key": torch.int64,
    "temperature": torch.float32, "top_k": torch.int32, "sample": torch.int32,
}  # fmt: skip
_FIELDS = np.dtype([(name, str(dtype).removeprefix("torch.")) for name, dtype in _DTYPES.items()])
assert _FIELDS.itemsize == _ROW.size


def pack_row(temperature: float, top_k: int, top_p: float, min_p: float, stream_key: int, sample: int) -> bytes:
    """Return the row of a sample; see kernels/gpu/sampling.py for the parameters."""
    return _ROW.pack(top_p, min_p, stream_key, temperature, top_k, sample)


class SamplingColumns:
    """Holds the columns of some samples, which one copy has brought to the device.

    The number of generated tokens is not in them: it changes with each step.
    """

    def __init__(self, rows: Sequence[bytes], seqs: Sequence[EngineSequence], device: torch.device) -> None:
        """Make the columns. rows: from pack_row(), one a sequence"""
        self._seqs, self._device = list(seqs), device
        self._prompt_lens = np.array([seq.num_prompt_tokens for seq in seqs], np.int64)
        room = -len(rows) % ROWS_TOGETHER + len(rows)
        values = np.frombuffer(b"".join(rows) + bytes((room - len(rows)) * _ROW.size), _FIELDS)
        packed = np.frombuffer(bytearray().join([values[name].tobytes() for name in _DTYPES]), np.uint8)
        memory = to_device(packed, torch.uint8, device)
        columns = memory.split([dtype.itemsize * room for dtype in _DTYPES.values()])
        parts = zip(_DTYPES.items(), columns, strict=True)
        self._columns = {name: column.view(dtype)[: len(rows)] for (name, dtype), column in parts}

    def of_step(self) -> tuple[Tensor, ...]:
        """Return the arguments of the sampling kernel, after the logits, for the next token of each sequence."""
        num_generated = np.array([seq.num_tokens for seq in self._seqs], np.int64) - self._prompt_lens
        of = self._columns
        fixed = of["temperature"], of["top_k"], of["top_p"], of["min_p"], of["stream_key"], of["sample"]
        return *fixed, to_device(num_generated, torch.int64, self._device)
