"""The kernels for CPUs that multiply bytes exactly (vpdpbusd), with that instruction made of those of AVX2."""

from typing import Any

import numba

from moray.kernels.cpu import quantized_product
from moray.kernels.cpu.quantized_product import BYTES, E2M1, HALVES, PLANES, Form, multiply_quantized
from moray.kernels.cpu.vectors import I16, call, constant, vector


def dot_bytes_emulated(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    halves = vector(I16, 2 * sums.type.count)
    eight = constant(I16, halves.count, 8)
    a, b = builder.bitcast(a, halves), builder.bitcast(b, halves)
    evens = builder.and_(a, constant(I16, halves.count, 255)), builder.ashr(builder.shl(b, eight), eight)
    odds = builder.lshr(a, eight), builder.ashr(b, eight)
    for pair in (evens, odds):
        sums = builder.add(sums, call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, *pair))
    return sums


def multiplier(name: str, parts: Any, is_e2m1: bool = False) -> Any:
    return quantized_product._multiplier(name, Form(8, 2, 2, parts, dot_bytes_emulated, is_e2m1))


multiply_bytes = multiplier("multiply_bytes_emulated", BYTES)
multiply_halves = multiplier("multiply_halves_emulated", HALVES)
multiply_e2m1 = multiplier("multiply_e2m1_emulated", E2M1, is_e2m1=True)


@numba.njit(nogil=True, error_model="numpy")
def int8_emulated(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(multiply_bytes, 2, PLANES, 128, weight, rows, result, start, stop)


@numba.njit(nogil=True, error_model="numpy")
def int4_emulated(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(multiply_halves, 2, PLANES, 8, weight, rows, result, start, stop)


@numba.njit(nogil=True, error_model="numpy")
def fp4_emulated(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(multiply_e2m1, 2, PLANES, 12, weight, rows, result, start, stop)
