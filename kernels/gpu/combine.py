"""The end of a mixture-of-experts layer: add up each token's rows and the residual, and apply the next norm."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.cpu.norms import layer_norm_ref, rms_norm_ref
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.norms import normalize
from moray.kernels.gpu.sizes import next_power_of_2
from moray.kernels.gpu.tuning import Gpu


def combine(
    rows: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    top_k: int,
    multiplier: float = 1.0,
    rounds_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x = residual + multiplier * the sum of a token's rows, and the norm of x.

    The rows are added in slot order in fp32; x is rounded once.

    rows:         [num_tokens * top_k, hidden_size], a token's rows one after the other
    residual:     [num_tokens, hidden_size]
    norm_weight:  [hidden_size]
    norm_bias:    [hidden_size] for a LayerNorm, None for an RMSNorm
    rounds_last:  see rms_norm
    returns:      x, normed: [num_tokens, hidden_size]
    """
    assert rows.is_contiguous() and residual.is_contiguous(), "combine reads contiguous rows"
    num_tokens, hidden_size = residual.shape
    x, normed = torch.empty_like(residual), torch.empty_like(residual)
    block_h = next_power_of_2(hidden_size)
    _combine_kernel[(num_tokens,)](
        rows,
        residual,
        norm_weight,
        norm_bias,
        x,
        normed,
        eps,
        multiplier,
        ROUNDS_LAST=rounds_last,
        TOP_K=top_k,
        H=hidden_size,
        BLOCK_H=block_h,
        num_warps=_num_warps(block_h),
    )
    return x, normed


def _num_warps(block_h: int) -> int:
    """Return the number of warps with which each thread loads 16 bytes of 16-bit numbers at once."""
    return min(16, max(1, block_h // 256))


@triton.jit
def _combine_kernel(
    rows,
    residual,
    norm_weight,
    norm_bias,
    x,
    normed,
    eps,
    multiplier,
    ROUNDS_LAST: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute one token per program."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    in_row = h < H
    total = tl.zeros([BLOCK_H], tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.load(rows + (token * TOP_K + slot) * H + h, mask=in_row, other=0.0).to(tl.float32)
    total = total * multiplier + tl.load(residual + token * H + h, mask=in_row, other=0.0).to(tl.float32)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + token * H + h, rounded, mask=in_row)

    dtype: tl.constexpr = x.dtype.element_ty
    result = normalize(rounded.to(tl.float32), norm_weight, norm_bias, h, in_row, H, eps, dtype, ROUNDS_LAST)
    tl.store(normed + token * H + h, result.to(normed.dtype.element_ty), mask=in_row)


def combine_ref(
    rows: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    top_k: int,
    multiplier: float = 1.0,
    rounds_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `combine` slowly and obviously: one slot at a time, then the CPU's norms."""
    total = torch.zeros(residual.shape, device=residual.device)
    for slot in range(top_k):
        total += rows[slot::top_k].float()
    x = (total * multiplier + residual.float()).to(residual.dtype)
    if norm_bias is None:
        return x, rms_norm_ref(x, norm_weight, eps, rounds_last)
    return x, layer_norm_ref(x, norm_weight, norm_bias, eps)


def aot_variants(gpu: Gpu) -> list[Variant]:
    variants = []
    for name, hidden_size, dtype, has_bias, top_k, rounds_last in (
        ("phi-3.5-moe", 4096, "bf16", True, 2, False),
        ("phixtral-4x2_8", 2560, "fp16", True, 2, False),
        ("mixtral-8x7b", 4096, "bf16", False, 2, False),
        ("qwen3-30b-a3b", 2048, "bf16", False, 8, False),
        ("gpt-oss-20b", 2880, "bf16", False, 4, True),
        ("phi-3.5-moe fp32", 4096, "fp32", True, 2, False),
    ):
        pointers = ["rows", "residual", "norm_weight", "norm_bias", "x", "normed"]
        block_h = next_power_of_2(hidden_size)
        constexprs: dict[str, Any] = {"ROUNDS_LAST": rounds_last, "TOP_K": top_k, "H": hidden_size, "BLOCK_H": block_h}
        constexprs |= {} if has_bias else {"norm_bias": None}
        signature = dict.fromkeys(pointers, f"*{dtype}:16") | {"eps": "fp32", "multiplier": "fp32"}
        variants.append(Variant(f"combine {name}", _combine_kernel, signature, constexprs, _num_warps(block_h)))
    return variants
