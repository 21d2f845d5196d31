"""Compile Python functions to machine code with Numba: loops over any dtype, computed in fp32, without the GIL.

Sums are not reassociated, and products are fused into sums only by `fma`, so the same row gives the same bits at any
position.
"""

import struct
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numba
import torch
from llvmlite import ir
from numba import float32, int32, types, uint8, uint32
from numba.extending import intrinsic
from torch import Tensor

from moray.kernels.cpu.code_cache import cached

T = TypeVar("T")

FLOAT, HALF, INT = ir.FloatType(), ir.HalfType(), ir.IntType(32)

# torch's dtype -> the dtype of an array that holds its bits: Numba has no half precision
STORAGE_DTYPES = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Compile a function at its first call, for the types of its arguments; it is cached, see code_cache.py."""
    dispatcher: Callable[..., T] = cached(
        lambda cache: numba.njit(cache=cache, nogil=True, error_model="numpy")(function)
    )
    return dispatcher


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that is inlined into the compiled functions that call it."""
    dispatcher: Callable[..., Any] = numba.njit(inline="always")(function)
    return dispatcher


def array(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor as an array for compiled functions, in its storage dtype."""
    assert tensor.is_contiguous(), f"strides {tensor.stride()}"
    return tensor.view(STORAGE_DTYPES.get(tensor.dtype, tensor.dtype)).numpy()


class CFunction:
    """Compiles a Python function as a C function of 64-bit numbers when its address is first asked for.

    Compiled functions call it by its address. Like those of `compiled`, it is cached and holds no lock.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Return the address; the first call takes a second, unless the function is cached."""
        signature = types.void(*[types.uint64] * self._function.__code__.co_argcount)
        self._compiled = cached(lambda cache: numba.cfunc(signature, cache=cache, error_model="numpy")(self._function))
        return int(self._compiled.address)


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer to numbers of a NumPy type."""
    result = types.CPointer(kind.dtype)

    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.uint64, kind), generate


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def array_at(address: Any, shape: Any, kind: Any) -> Any:
    """Return the numbers at an address as an array. shape: a tuple; kind: the numbers' type, such as np.uint16"""
    return numba.carray(_pointer(address, kind), shape)


@intrinsic  # type: ignore[untyped-decorator]
def keep(_: Any, value: Any) -> Any:
    """Keep an array's memory up to here. Numba frees it after the last use of the array, and an address is no use."""
    return types.void(value), lambda context, _, __, ___: context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c in fp32, rounded once."""
    return float32(float32, float32, float32), lambda _, builder, __, args: builder.fma(*args)


@intrinsic  # type: ignore[untyped-decorator]
def as_float(_: Any, bits: Any) -> Any:
    """Return the fp32 number with these 32 bits."""
    return float32(uint32), lambda _, builder, __, args: builder.bitcast(args[0], FLOAT)


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(_: Any, x: Any) -> Any:
    """Return the 32 bits of an fp32 number."""
    return uint32(float32), lambda _, builder, __, args: builder.bitcast(args[0], INT)


def bits_of(number: float) -> int:
    """Return the bits of a number as fp32, for the arguments of compiled functions, in which as_float reads them."""
    return int.from_bytes(struct.pack("<f", number), "little")


@intrinsic  # type: ignore[untyped-decorator]
def widen(_: Any, x: Any) -> Any:
    """Return an array's number as fp32; bytes are codes of e4m3, see narrow_to_e4m3."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        if x == types.uint8:
            code = builder.zext(args[0], INT)
            magnitude = builder.and_(code, INT(0x7F))
            # Bits of an fp32 number of another exponent.
            number = builder.fmul(builder.bitcast(builder.shl(magnitude, INT(20)), FLOAT), FLOAT(2.0**120))
            bits = builder.bitcast(number, INT)
            bits = builder.select(builder.icmp_unsigned("==", magnitude, INT(0x7F)), INT(0x7FC00000), bits)
            sign = builder.shl(builder.and_(code, INT(0x80)), INT(24))
            return builder.bitcast(builder.or_(bits, sign), FLOAT)
        if x == types.uint16:
            bits = builder.shl(builder.zext(args[0], INT), INT(16))
            return builder.bitcast(bits, FLOAT)
        if x == types.int16:
            return builder.fpext(builder.bitcast(args[0], HALF), FLOAT)
        return args[0]

    return float32(x), generate


@intrinsic  # type: ignore[untyped-decorator]
def narrow(_: Any, x: Any, like: Any) -> Any:
    """Round an fp32 number, to nearest and ties to even, to the dtype of the array's number `like`."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        if like == types.uint16:
            bits = builder.bitcast(args[0], INT)
            is_odd = builder.and_(builder.lshr(bits, INT(16)), INT(1))
            rounded = builder.lshr(builder.add(builder.add(bits, INT(0x7FFF)), is_odd), INT(16))
            is_nan = builder.fcmp_unordered("uno", args[0], args[0])
            return builder.trunc(builder.select(is_nan, INT(0x7FC0), rounded), ir.IntType(16))
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], HALF), ir.IntType(16))
        return args[0]

    return like(float32, like), generate


@inlined
def narrow_to_e4m3(x: Any) -> Any:
    """Return the code, uint8, of an fp32 number: as to_e4m3 of kernels/e4m3.py rounds."""
    bits = as_bits(x)
    magnitude = as_float(bits & uint32(0x7FFFFFFF))
    magnitude = float32(448.0) if magnitude > float32(448.0) else magnitude  # this order keeps NaN
    rounded = as_bits(magnitude)
    # Adding half of the last bit that stays, and a little less where that bit is 0, rounds to nearest even.
    normal = ((rounded + uint32(0x7FFFF) + ((rounded >> uint32(20)) & uint32(1))) >> uint32(20)) - uint32(120 << 3)
    # A sum from 2 ** 14 on is rounded to multiples of 2 ** -9, the least e4m3.
    small = as_bits(magnitude + float32(16384.0)) - uint32(0x46800000)
    code = small if magnitude < float32(2.0**-6) else normal
    code = code if magnitude == magnitude else uint32(0x7F)
    return uint8(code | ((bits >> uint32(24)) & uint32(0x80)))


@inlined
def exp(x: Any) -> Any:
    """Return e to the x for x up to 0, within 2 units in the last place, at least 1e-38. (Cephes, expf)"""
    x = float32(-87.0) if x < float32(-87.0) else x  # this order of the comparison keeps NaN
    shifted = fma(x, float32(1.44269504), float32(12582912.0))  # 1.5 * 2**23: rounds to a whole number
    whole = shifted - float32(12582912.0)
    r = fma(whole, float32(2.12194440e-4), fma(whole, float32(-0.693359375), x))
    y = fma(float32(1.9875691500e-4), r, float32(1.3981999507e-3))
    y = fma(y, r, float32(8.3334519073e-3))
    y = fma(y, r, float32(4.1665795894e-2))
    y = fma(y, r, float32(1.6666665459e-1))
    y = fma(y, r, float32(5.0000001201e-1))
    y = fma(y, r * r, r) + float32(1.0)
    exponent = int32(as_bits(shifted)) - int32(0x4B400000) + int32(127)
    return y * as_float(uint32(exponent << int32(23)))
