"""The epilogue of a matrix product, on sums that are still in the cache: bias, activation, multiplication, rounding."""

from typing import Any

import numba
from numba import float32, uint64

from moray.kernels.cpu.numba_intrinsics import exp, inlined, narrow, widen

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2}
SILU, GELU = 1, 2


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
    times: [num_tokens, out_features], or [num_tokens, 0] for no multiplication
    y:     [num_tokens, out_features]; its rows first .. first + rows - 1 are written
    """
    columns = min(uint64(sums.shape[1]), uint64(y.shape[1]) - first_column)
    for row in range(rows):
        t = first + row
        if len(bias) > 0:
            for c in range(columns):
                sums[row, c] += bias[first_column + c]
        if activation == SILU:
            for c in range(columns):
                sums[row, c] *= _sigmoid(sums[row, c])
        elif activation == GELU:
            for c in range(columns):
                x = sums[row, c]
                inner = x * (float32(1.0) + float32(0.044715) * (x * x))
                sums[row, c] = x * _sigmoid(float32(1.5957691216) * inner)
        if times.shape[1] > 0:
            for c in range(columns):
                sums[row, c] *= widen(times[t, first_column + c])
        for c in range(columns):
            y[t, first_column + c] = narrow(sums[row, c], y[t, first_column + c])
