"""Call quantized products from compiled code, through the interface of product.py.

A kernel here reads rows from three places that lie one after the other: the rows themselves, their scales, and the sums
of their planes (quantized_rows.py).
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import uint64
from torch import Tensor

from moray.kernels.cpu import product, quantized
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at
from moray.kernels.cpu.quantized import PackedQuantized, quantized_linear
from moray.kernels.cpu.quantized_panels import STEP_INPUTS
from moray.kernels.cpu.quantized_product import PLANES
from moray.kernels.cpu.quantized_rows import quantize_pairs, quantize_rows, widen_rows
from moray.kernels.cpu.vector_product import PANEL, STEP_BYTES

# What a description has of its own: addresses of codes, scales, zeros, bias and lengths (or 0), and numbers.
CODES, SCALES, ZEROS, BIAS, LENGTHS, STEPS, GROUPS, GROUP_STEPS, PADDED_INPUTS = range(product.OWN, product.OWN + 9)
WORDS = product.OWN + 9
FP8_LEVEL = 2  # of LLVM: above, the kernel of fp8 is wrong as a part of a C function that comes from the cache
CODE_BYTES = STEP_BYTES // PANEL  # bytes of codes of an output in a step


class QuantizedLinear:
    """Computes `quantized_linear` for rows of one dtype: in one compiled call, if the weight's kernel has an entry."""

    def __init__(self, packed: PackedQuantized, dtype: torch.dtype) -> None:
        self._packed = packed
        self._description = describe(packed, dtype)
        self._address = 0 if self._description is None else int(self._description.ctypes.data)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply rows, [num_tokens, in_features], with the weight; the result is [num_tokens, out_features]."""
        if not self._address or x.shape[0] == 0:
            return quantized_linear(x, self._packed)
        return product.multiply(x, self._address, self._packed.out_features)


def describe(packed: PackedQuantized, dtype: torch.dtype) -> Any:
    """Return the description of a weight for product.py, for rows of a dtype; None if compiled code cannot call it.

    The weight must outlive the description.
    """
    path = packed.path or quantized.paths(packed.kind, dtype)[0]
    run = _RUN.get((path, packed.kind))
    if dtype != torch.bfloat16 or run is None or (packed.kind == "fp8" and numba.config.OPT > FP8_LEVEL):
        return None
    is_integer = quantized.reads_integers(packed.kind, dtype)
    planes, item_bytes = (PLANES, 1) if is_integer else (1, 4)
    num_panels, num_steps = packed.codes.shape[:2]
    groups = packed.scales.shape[1]
    return product.describe(
        run,
        _PREPARE[quantized.KERNELS[path, packed.kind, is_integer].prepare],
        row_bytes=planes * packed.padded_inputs * item_bytes + 4 + (4 * planes * groups if is_integer else 0),
        num_panels=num_panels,
        panel_bytes=num_steps * STEP_BYTES,
        out_features=packed.out_features,
        in_features=packed.in_features,
        item_bytes=dtype.itemsize,
        own=(
            packed.codes.data_ptr(),
            packed.scales.data_ptr(),
            0 if packed.zeros is None else packed.zeros.data_ptr(),
            0 if packed.bias is None else packed.bias.data_ptr(),
            0 if packed.lengths is None else packed.lengths.data_ptr(),
            num_steps,
            groups,
            packed.group_size // STEP_INPUTS[packed.kind],
            packed.padded_inputs,
        ),
    )


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rows(of_weight: Any, address: Any, num_rows: int, planes: int, reads: Any) -> Any:
    """Return xq, xs and plane_sums of the rows that are prepared at an address."""
    padded, groups = np.int64(of_weight[PADDED_INPUTS]), np.int64(of_weight[GROUPS])
    xq = array_at(address, (planes * num_rows, padded), reads)
    xs_at = address + uint64(xq.size * xq.itemsize)
    sums = array_at(xs_at + uint64(4 * num_rows), (planes * num_rows, groups * (planes // PLANES)), np.int32)
    return xq, array_at(xs_at, (num_rows,), np.float32), sums


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _arrays(weight: Any, call: Any, planes: int, reads: Any, scaled: Any = np.float32) -> Any:
    """Return the first arguments of QuantizedKernel.run: weight, rows and result. scaled: the type of the scales"""
    of_weight = array_at(weight, (WORDS,), np.uint64)
    of_call = array_at(call, (product.CALL_WORDS,), np.uint64)
    num_panels, num_steps = np.int64(of_weight[product.NUM_PANELS]), np.int64(of_weight[STEPS])
    num_rows, out_features = np.int64(of_call[product.NUM_ROWS]), np.int64(of_weight[product.OUT_FEATURES])
    groups = np.int64(of_weight[GROUPS])
    has_zeros, has_bias = np.int64(of_weight[ZEROS] != uint64(0)), np.int64(of_weight[BIAS] != uint64(0))
    has_times = np.int64(of_call[product.TIMES] != uint64(0))
    w = array_at(of_weight[CODES], (num_panels, num_steps, PANEL, CODE_BYTES), np.uint8)
    scales = array_at(of_weight[SCALES], (num_panels, groups, PANEL), scaled)
    zeros = array_at(of_weight[ZEROS], (num_panels * has_zeros, groups * has_zeros, PANEL * has_zeros), np.uint8)
    bias = array_at(of_weight[BIAS], (out_features * has_bias,), np.float32)
    times = array_at(of_call[product.TIMES], (num_rows, out_features * has_times), np.uint16)
    y = array_at(of_call[product.Y], (num_rows, out_features), np.uint16)
    group_steps, activation = np.int64(of_weight[GROUP_STEPS]), np.int64(of_call[product.ACTIVATION])
    rows = _rows(of_weight, of_call[product.X], num_rows, planes, reads)
    has_lengths = np.int64(of_weight[LENGTHS] != uint64(0))
    lengths = array_at(of_weight[LENGTHS], (num_panels * has_lengths, groups * has_lengths), np.float64)
    return (w, scales, zeros, group_steps, lengths), rows, (bias, activation, times, y)


def _run_int8_tiles(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int8_tiles(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int8_512(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int8_512(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int4_512(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int4_512(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_fp4_512(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8, np.uint8)
    quantized._fp4_512(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int8_256(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int8_256(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int4_256(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int4_256(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_fp4_256(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8, np.uint8)
    quantized._fp4_256(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int8_avx2(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int8_avx2(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int4_avx2(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int4_avx2(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int8_pairs_512(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int8_pairs_512(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_int4_pairs_512(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8)
    quantized._int4_pairs_512(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_fp4_avx2(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, PLANES, np.int8, np.uint8)
    quantized._fp4_avx2(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_fp8_512(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, 1, np.float32)
    quantized._fp8_floats_512(of_weight, rows, result, np.int64(start), np.int64(stop))


def _run_fp8_256(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, rows, result = _arrays(weight, call, 1, np.float32)
    quantized._fp8_floats_256(of_weight, rows, result, np.int64(start), np.int64(stop))


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _source(weight: Any, call: Any) -> Any:
    """Return the description of the weight, the rows that are to be prepared, and the inputs of a group."""
    of_weight = array_at(weight, (WORDS,), np.uint64)
    of_call = array_at(call, (product.CALL_WORDS,), np.uint64)
    num_rows, steps = np.int64(of_call[product.NUM_ROWS]), np.int64(of_weight[STEPS])
    x = array_at(of_call[product.X], (num_rows, np.int64(of_weight[product.IN_FEATURES])), np.uint16)
    group_size = np.int64(of_weight[GROUP_STEPS]) * (np.int64(of_weight[PADDED_INPUTS]) // steps)
    return of_weight, x, group_size


def _quantize(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, x, group_size = _source(weight, call)
    target = array_at(call, (product.CALL_WORDS,), np.uint64)[product.Y]
    xq, xs, sums = _rows(of_weight, target, len(x), PLANES, np.int8)
    quantize_rows(x, group_size, xq, xs, sums, np.int64(start), np.int64(stop))


def _quantize_pairs(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, x, group_size = _source(weight, call)
    target = array_at(call, (product.CALL_WORDS,), np.uint64)[product.Y]
    xq, xs, sums = _rows(of_weight, target, len(x), PLANES, np.int8)
    quantize_pairs(x, group_size, xq, xs, sums, np.int64(start), np.int64(stop))


def _widen(weight: Any, call: Any, start: Any, stop: Any) -> None:
    of_weight, x, group_size = _source(weight, call)
    target = array_at(call, (product.CALL_WORDS,), np.uint64)[product.Y]
    xq, xs, sums = _rows(of_weight, target, len(x), 1, np.float32)
    widen_rows(x, group_size, xq, xs, sums, np.int64(start), np.int64(stop))


# What prepares rows -> what compiled code calls
_PREPARE = {
    quantize_rows: CFunction(_quantize),
    quantize_pairs: CFunction(_quantize_pairs),
    widen_rows: CFunction(_widen),
}

# (path, kind) -> the kernel for rows in bfloat16
_RUN = {
    ("amx", "int8"): CFunction(_run_int8_tiles),
    ("avx512_vnni", "int8"): CFunction(_run_int8_512),
    ("avx512_vnni", "int4"): CFunction(_run_int4_512),
    ("avx512_vnni", "fp4"): CFunction(_run_fp4_512),
    ("avx_vnni", "int8"): CFunction(_run_int8_256),
    ("avx_vnni", "int4"): CFunction(_run_int4_256),
    ("avx_vnni", "fp4"): CFunction(_run_fp4_256),
    ("avx512", "int8"): CFunction(_run_int8_pairs_512),
    ("avx512", "int4"): CFunction(_run_int4_pairs_512),
    ("avx2", "int8"): CFunction(_run_int8_avx2),
    ("avx2", "int4"): CFunction(_run_int4_avx2),
    ("avx2", "fp4"): CFunction(_run_fp4_avx2),
    ("avx512", "fp8"): CFunction(_run_fp8_512),
    ("avx2", "fp8"): CFunction(_run_fp8_256),
}
