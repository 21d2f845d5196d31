"""Quantize rows to float8_e4m3fn, one scale a row, for GPUs that multiply it (compute capability 8.9 and later)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.packed_weight import PackedWeight
from moray.kernels.gpu.sizes import next_power_of_2
from moray.kernels.gpu.tuning import Gpu

LARGEST = 448.0  # the largest float8_e4m3fn
NUM_WARPS = 8


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales with x close to codes * scales[:, None]; a row's largest number has the largest code.

    x:       [num_rows, width], contiguous
    returns: [num_rows, width] float8_e4m3fn, rounded to nearest even, and [num_rows] fp32
    """
    assert x.is_contiguous(), "quantize_rows reads contiguous rows"
    num_rows, width = x.shape
    codes, scales = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        block = next_power_of_2(width)
        _quantize_rows_kernel[(num_rows,)](x, codes, scales, WIDTH=width, BLOCK=block, num_warps=NUM_WARPS)
    return codes, scales


@triton.jit
def _quantize_rows_kernel(x, codes, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(values), 0) * (1 / 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    quotients = tl.div_rn(values, tl.broadcast_to(scale, [BLOCK]))
    # A quotient of the largest number may be just above the largest code.
    quotients = tl.clamp(quotients, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes + row * WIDTH + columns, quotients.to(tl.float8e4nv), mask=columns < WIDTH)
    tl.store(scales + row, scale)


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` slowly and obviously."""
    scales = x.float().abs().amax(1) * torch.tensor(1 / LARGEST, dtype=torch.float32)
    scales = torch.where(scales == 0, 1.0, scales)
    return (x.float() / scales[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def multiplied_rows(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Return the rows that a kernel multiplies by this weight, and their scales: x itself, or its codes."""
    return quantize_rows(x) if weight.format == "fp8_fp8" else (x, None)


def multiplied_rows_ref(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return in fp32 what `multiplied_rows` stands for."""
    if weight.format != "fp8_fp8":
        return x.float()
    codes, scales = quantize_rows_ref(x)
    return codes.float() * scales[:, None]


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return the widths of Phi-3.5-MoE and Mixtral."""
    if gpu.capability < (8, 9):
        return []
    signature = {"x": "*bf16:16", "codes": "*fp8e4nv:16", "scales": "*fp32:16"}
    return [
        Variant(
            f"quantize_rows {width}",
            _quantize_rows_kernel,
            signature,
            {"WIDTH": width, "BLOCK": next_power_of_2(width)},
            NUM_WARPS,
        )
        for width in (4096, 6400, 14336)
    ]
