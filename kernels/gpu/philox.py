"""Philox4x32-10 on the device, bit for bit as in kernels/cpu/philox.py; Triton provides the ten rounds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.cpu import philox as cpu_philox
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import cdiv
from moray.kernels.gpu.tuning import Gpu

BLOCK = 128


@triton.jit
def random_bits(stream_key, sample, position):
    """Return 64 random bits, uint64, for one token.

    stream_key, position: int64; sample: int32; all are scalars or all are blocks
    """
    low, high, _, _ = tl.philox(
        stream_key,
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        sample.to(tl.uint32),
        sample.to(tl.uint32) * 0,
    )
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


def uniform_bits(stream_keys: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """Return 64 random bits per row.

    stream_keys: [num_rows] int64, of the requests; the bits of a number below 2**64
    samples:     [num_rows] int32, numbers of the samples in their requests
    positions:   [num_rows] int64, number of tokens generated before this one
    returns:     [num_rows] int64, the bits of a number below 2**64
    """
    bits = torch.empty_like(stream_keys)
    num_rows = len(stream_keys)
    if num_rows > 0:
        _uniform_bits_kernel[(cdiv(num_rows, BLOCK),)](stream_keys, samples, positions, bits, num_rows, BLOCK)
    return bits


@triton.jit(do_not_specialize=["num_rows"])
def _uniform_bits_kernel(stream_keys, samples, positions, bits, num_rows, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    stream_key = tl.load(stream_keys + rows, mask=inside, other=0)
    sample = tl.load(samples + rows, mask=inside, other=0)
    position = tl.load(positions + rows, mask=inside, other=0)
    random = random_bits(stream_key, sample, position)
    tl.store(bits + rows, random.to(tl.int64, bitcast=True), mask=inside)


def uniform_bits_ref(stream_keys: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """Compute `uniform_bits` with the CPU's implementation, one row at a time."""
    rows = zip(stream_keys.tolist(), samples.tolist(), positions.tolist(), strict=True)
    bits = [cpu_philox.uniform_bits(*row) for row in rows]
    return stream_keys.new_tensor([b - 2**64 if b >= 2**63 else b for b in bits])


def aot_variants(gpu: Gpu) -> list[Variant]:
    signature = {
        "stream_keys": "*i64:16",
        "samples": "*i32:16",
        "positions": "*i64:16",
        "bits": "*i64:16",
        "num_rows": "i32",
    }
    return [Variant("philox", _uniform_bits_kernel, signature, {"BLOCK": BLOCK}, has_wide_loads=False)]
