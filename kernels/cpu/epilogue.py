"""The epilogue of a matrix product, on sums that are still in the cache: bias, activation, multiplication, rounding."""

from typing import Any

import numba
from numba import float32, uint32, uint64

from moray.kernels.activation import ALPHA, Activation, ActivationKind
from moray.kernels.cpu.numba_intrinsics import as_float, bits_of, exp, inlined, narrow, widen

# What is done with each sum; the last two are the parts of a clamped SwiGLU, of its gate and of what that multiplies.
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "clamped_silu": 3, "clamped_plus_one": 4}
SILU, GELU, CLAMPED_SILU, CLAMPED_PLUS_ONE = range(1, 5)
# The activations of an expert's two products, of its gate and of up.
OF_PRODUCTS: dict[ActivationKind, tuple[str, str]] = {
    "swiglu": ("silu", "none"),
    "clamped_swiglu": ("clamped_silu", "clamped_plus_one"),
    "gelu": ("none", "gelu"),
}


def encode(activation: str, limit: float = 0.0) -> int:
    """Return an activation as one number for compiled code: its code, and the bits of its limit in the upper half."""
    return ACTIVATIONS[activation] | bits_of(limit) << 32


def encode_products(activation: Activation) -> tuple[int, int]:
    """Return what `encode` gives for an expert's gate and up."""
    gate, up = OF_PRODUCTS[activation.kind]
    return encode(gate, activation.limit), encode(up, activation.limit)


@inlined
def _sigmoid(x: Any) -> Any:
    e = exp(-abs(x))
    return (float32(1.0) if x >= float32(0.0) else e) / (float32(1.0) + e)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def apply_epilogue(
    sums: Any, bias: Any, activation: int, times: Any, y: Any, first: Any, first_column: Any, rows: Any
) -> None:
    """Write activation(sums + bias) * times, rounded once, to the columns of y from `first_column` on.

    It writes a panel of columns, or fewer at the end of y. Indices are unsigned: LLVM does not vectorize loops whose
    indices may be negative, because each must be checked.

    sums:  [rows, PANEL] fp32, overwritten
    bias:  [out_features] fp32, or empty
    activation: from `encode`
    times: [num_tokens, out_features], or [num_tokens, 0] for no multiplication
    y:     [num_tokens, out_features]; its rows first .. first + rows - 1 are written
    """
    kind, limit = activation & 255, as_float(uint32(activation >> 32))
    columns = min(uint64(sums.shape[1]), uint64(y.shape[1]) - first_column)
    for row in range(rows):
        t = first + row
        if len(bias) > 0:
            for c in range(columns):
                sums[row, c] += bias[first_column + c]
        if kind == SILU:
            for c in range(columns):
                sums[row, c] *= _sigmoid(sums[row, c])
        elif kind == GELU:
            for c in range(columns):
                x = sums[row, c]
                inner = x * (float32(1.0) + float32(0.044715) * (x * x))
                sums[row, c] = x * _sigmoid(float32(1.5957691216) * inner)
        elif kind == CLAMPED_SILU:
            for c in range(columns):
                x = limit if sums[row, c] > limit else sums[row, c]  # these comparisons keep NaN
                sums[row, c] = x * _sigmoid(float32(ALPHA) * x)
        elif kind == CLAMPED_PLUS_ONE:
            for c in range(columns):
                x = limit if sums[row, c] > limit else sums[row, c]
                sums[row, c] = (-limit if x < -limit else x) + float32(1.0)
        if times.shape[1] > 0:
            for c in range(columns):
                sums[row, c] *= widen(times[t, first_column + c])
        for c in range(columns):
            y[t, first_column + c] = narrow(sums[row, c], y[t, first_column + c])
