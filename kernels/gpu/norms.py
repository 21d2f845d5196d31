"""Normalise rows, with or without adding a residual first. One program per row, so rows are independent."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import next_power_of_2
from moray.kernels.gpu.tuning import Gpu

NUM_WARPS = 8  # the same for every launch, because it determines the order in which a row is summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each row to mean 0 and variance 1, then scale and shift; computed in fp32, rounded once.

    x: [num_tokens, hidden_size], contiguous; weight, bias: [hidden_size]
    """
    return _launch(x, None, weight, bias, eps)[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Divide each row by its root mean square in fp32, round to x's dtype, then scale (in that order, as Mixtral does).

    x:            [num_tokens, hidden_size], contiguous
    weight:       [hidden_size]
    rounds_last:  scale in fp32 and then round, as gpt-oss does
    """
    return _launch(x, None, weight, None, eps, rounds_last=rounds_last)[1]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return x * multiplier + residual, rounded once, and its layer_norm.

    residual: [num_tokens, hidden_size], contiguous
    """
    return _launch(x, residual, weight, bias, eps, multiplier)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x * multiplier + residual, rounded once, and its rms_norm.

    residual: [num_tokens, hidden_size], contiguous
    """
    return _launch(x, residual, weight, None, eps, multiplier, rounds_last)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    multiplier: float = 1.0,
    rounds_last: bool = False,
) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous() and (residual is None or residual.is_contiguous()), "norms read contiguous rows"
    num_tokens, hidden_size = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if num_tokens > 0:
        _norm_kernel[(num_tokens,)](
            x,
            residual,
            weight,
            bias,
            total,
            normed,
            hidden_size,
            eps,
            multiplier,
            ROUNDS_LAST=rounds_last,
            BLOCK=next_power_of_2(hidden_size),
            num_warps=NUM_WARPS,
        )
    return total, normed


@triton.jit
def normalize(values, weight, bias, columns, inside, size, eps, dtype: tl.constexpr, ROUNDS_LAST: tl.constexpr):
    """Return the norm of a row in fp32, not yet rounded, 0 where not inside: LayerNorm with a bias, RMSNorm without."""
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values = tl.where(inside, values - tl.sum(values) / size, 0.0)
        values *= tl.rsqrt(tl.sum(values * values) / size + eps)
        return values * scale + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        values *= tl.rsqrt(tl.sum(values * values) / size + eps)
        if not ROUNDS_LAST:
            values = values.to(dtype).to(tl.float32)  # rounded before the weight, as Mixtral does
        return values * scale


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    normed,
    hidden_size,
    eps,
    multiplier,
    ROUNDS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute total = x, or x * multiplier + residual, and its norm: LayerNorm with a bias, else RMSNorm.

    A program has one row.
    """
    start = tl.program_id(0).to(tl.int64) * hidden_size
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values = values * multiplier + tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)  # normalise the rounded numbers, which are the next residual

    dtype: tl.constexpr = normed.dtype.element_ty
    values = normalize(values, weight, bias, columns, inside, hidden_size, eps, dtype, ROUNDS_LAST)
    tl.store(normed + start + columns, values.to(dtype), mask=inside)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `layer_norm` slowly and obviously, in fp64."""
    return functional.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), eps).to(x.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Compute `rms_norm` slowly and obviously, in fp64 except for the rounding before the scale."""
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return (weight * normed).to(x.dtype) if rounds_last else weight * normed.to(x.dtype)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    total = (x.float() * multiplier + residual.float()).to(x.dtype)
    return total, layer_norm_ref(total, weight, bias, eps)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    total = (x.float() * multiplier + residual.float()).to(x.dtype)
    return total, rms_norm_ref(total, weight, eps, rounds_last)


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return the norms of Phi-3.5-MoE and Mixtral (4096 columns), phixtral (2560, fp16) and gpt-oss (2880)."""
    pointers = ("x", "residual", "weight", "bias", "total", "normed")
    variants = []
    for model, dtype, is_layer_norm, rounds_last in (
        ("phi", "bf16", True, False),
        ("mixtral", "bf16", False, False),
        ("phixtral", "fp16", True, False),
        ("gpt-oss", "bf16", False, True),
        ("phi fp32", "fp32", True, False),
    ):
        for adds in (True, False):
            signature = dict.fromkeys(pointers, f"*{dtype}:16") | {
                "hidden_size": "i32:16", "eps": "fp32", "multiplier": "fp32",
            }  # fmt: skip
            absent = [] if is_layer_norm else ["bias"]
            absent += [] if adds else ["residual"]
            constexprs: dict[str, Any] = {"ROUNDS_LAST": rounds_last, "BLOCK": 4096, **dict.fromkeys(absent)}
            name = f"{'add and norm' if adds else 'norm'} {model}"
            variants.append(Variant(name, _norm_kernel, signature, constexprs, NUM_WARPS))
    return variants
