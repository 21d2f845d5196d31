"""Triton's interpreter without work whose result is thrown away. Nothing that kernels compute changes.

Most of its time goes into Python objects around small arrays. As of Triton 3.7.1:

* Each call of a kernel or of a function in one replaces the language's functions by those that interpret, which visits
  all names of the language. They can stay: in a process that interprets, nothing compiles.
* Each integer addition, subtraction and multiplication is computed once more in 64 bits for an assertion, which is
  dropped where nobody debugs.
* Types are made anew for each operation, with a check of their shape.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_is_patched: set[str] = set()


def make_faster() -> None:
    """Once, before any kernel runs."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter.InterpreterBuilder.get_block_ty = lambda _, element, shape: _block_type(element, shape)
    tl.block_type.with_element_ty = lambda block, element: _block_type(element, block.shape)
    tl.tensor.__init__ = _init_tensor


def _patch_lang_once(fn: Callable[..., Any]) -> Any:
    module = fn.__globals__["__name__"]
    if module not in _is_patched:
        _patch_lang(fn)
        _is_patched.add(module)
    return interpreter._LangPatchScope()  # with nothing to restore


def _by_name(function: Callable[[tl.dtype], Any]) -> Callable[[tl.dtype], Any]:
    """Keep what it returns for a type. A type's name says all, and hashes faster than the type."""
    kept: dict[str, Any] = {}

    def look_up(dtype: tl.dtype) -> Any:
        if dtype.name not in kept:
            kept[dtype.name] = function(dtype)
        return kept[dtype.name]

    return look_up


_blocks: dict[tuple[str, tuple[int, ...]], tl.block_type] = {}


def _block_type(element: tl.dtype, shape: tl.tuple) -> tl.block_type:
    key = element.name, tuple(shape)
    if key not in _blocks:
        _blocks[key] = tl.block_type(element, shape)
    return _blocks[key]


def _init_tensor(tensor: tl.tensor, handle: Any, dtype: tl.dtype) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, dtype, dtype.scalar
    tensor.shape, tensor.numel = _shape(tuple(dtype.shape) if dtype.is_block() else ())


@lru_cache(None)
def _shape(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
