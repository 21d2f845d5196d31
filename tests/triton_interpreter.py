"""Triton without a GPU: its interpreter, with bfloat16 and float8_e4m3fn repaired.

As of Triton 3.9 it keeps bfloat16 as uint16 patterns, multiplies those patterns, also in tl.dot, and cuts bits off
where it should round to nearest even. A float8_e4m3fn that rounds up to the next power of two gets the old exponent.
"""

import os
from typing import Any

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_original_dot = InterpreterBuilder.create_dot
_original_arithmetic = {name: getattr(InterpreterBuilder, name) for name in ("create_fmul", "create_fsub")}
_original_casts = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp")}


def repair() -> None:
    """Once, before any kernel runs."""
    assert isinstance(tl.cumsum, InterpretedFunction), "Triton was imported before TRITON_INTERPRET was set"
    InterpreterBuilder.create_dot = _dot
    for name in _original_arithmetic:
        setattr(InterpreterBuilder, name, _arithmetic_by(name))
    InterpreterBuilder.get_bf16 = _bfloat16  # it has none
    for name in _original_casts:
        setattr(InterpreterBuilder, name, _cast_by(name))


def _dot(builder: Any, a: TensorHandle, b: TensorHandle, total: TensorHandle, *rest: Any) -> TensorHandle:
    """Sums in fp64, rounded once: the bits of NumPy's fp32 sums depend on a row's place, those of a GPU's do not."""
    wide = TensorHandle(total.data.astype(np.float64), tl.float64)
    return TensorHandle(
        _original_dot(builder, _widened(a), _widened(b), wide, *rest).data.astype(np.float32), tl.float32
    )


def _bfloat16(builder: Any, value: float) -> TensorHandle:
    return _rounded(TensorHandle(np.array([value], dtype=np.float32), tl.float32))


def _arithmetic_by(name: str) -> Any:
    def compute(builder: Any, a: TensorHandle, b: TensorHandle) -> TensorHandle:
        result = _original_arithmetic[name](builder, _widened(a), _widened(b))
        return _rounded(result) if a.dtype.scalar == tl.bfloat16 else result

    return compute


def _cast_by(name: str) -> Any:
    def cast(builder: Any, value: TensorHandle, to: Any, *rest: Any) -> TensorHandle:
        if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return _rounded(value)
        if value.dtype.scalar == tl.float32 and to.scalar == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(value.data)).to(torch.float8_e4m3fn)
            return TensorHandle(codes.view(torch.uint8).numpy(), tl.float8e4nv)
        return _original_casts[name](builder, value, to, *rest)

    return cast


def _widened(value: TensorHandle) -> TensorHandle:
    if value.dtype.scalar == tl.float8e4nv:
        codes = torch.from_numpy(np.ascontiguousarray(value.data)).view(torch.float8_e4m3fn)
        return TensorHandle(codes.float().numpy(), tl.float32)
    if value.dtype.scalar != tl.bfloat16:
        return value
    bits = value.data.astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(value: TensorHandle) -> TensorHandle:
    """fp32 to the nearest bfloat16, to the even one of two; NaN stays NaN."""
    bits = np.ascontiguousarray(value.data).view(np.uint32)
    is_odd = bits >> np.uint32(16) & np.uint32(1)
    nearest = bits + np.uint32(0x7FFF) + is_odd >> np.uint32(16)
    quiet_nan = bits >> np.uint32(16) | np.uint32(0x40)
    return TensorHandle(np.where(np.isnan(value.data), quiet_nan, nearest).astype(np.uint16), tl.bfloat16)
