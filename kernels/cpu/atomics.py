"""Atomic operations, waiting and calls by address for functions that Numba compiles. Addresses are unsigned numbers."""

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.kernels.cpu.vectors import BYTE, I32, I64, call, pointer

ORDER = "seq_cst"
WORD = 8  # bytes of an atomic number
SEMAPHORE_BYTES = 64  # more than a sem_t has on any Linux
PAUSES = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}


@intrinsic  # type: ignore[untyped-decorator]
def read(_: Any, address: Any) -> Any:
    """Return the number at the address."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), ORDER, WORD)

    return types.uint64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def write(_: Any, address: Any, value: Any) -> Any:
    """Set the number at the address."""

    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), ORDER, WORD)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


def _changer(operation: str) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def change(_: Any, address: Any, value: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, pointer(builder, args[0], I64), args[1], ORDER)

        return types.uint64(types.uint64, types.uint64), generate

    return change


# add(address, value) and exchange(address, value) change the number at the address and return what it was before.
add, exchange = _changer("add"), _changer("xchg")


@intrinsic  # type: ignore[untyped-decorator]
def replace(_: Any, address: Any, old: Any, new: Any) -> Any:
    """Set the number at the address to `new` if it is `old`; return whether it was."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        result = builder.cmpxchg(pointer(builder, args[0], I64), args[1], args[2], ORDER, ORDER)
        return builder.extract_value(result, 1)

    return types.boolean(types.uint64, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pause(_: Any) -> Any:
    """Tell the CPU that the thread is waiting in a loop."""

    def generate(context: Any, builder: Any, __: Any, ___: Any) -> Any:
        if name := PAUSES.get(platform.machine()):
            call(builder, name, ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def nap(_: Any) -> Any:
    """Sleep for 50 us."""

    def generate(context: Any, builder: Any, __: Any, ___: Any) -> Any:
        call(builder, "usleep", I32, I32(50))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def now_ns(_: Any) -> Any:
    """Return the time of a monotonic clock in nanoseconds."""

    def generate(_: Any, builder: Any, __: Any, ___: Any) -> Any:
        place = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        call(builder, "clock_gettime", I32, I32(1), builder.bitcast(place, BYTE.as_pointer()))  # 1: CLOCK_MONOTONIC
        seconds = builder.load(builder.gep(place, [I32(0), I32(0)]))
        rest = builder.load(builder.gep(place, [I32(0), I32(1)]))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)

    return types.uint64(), generate


def _semaphore_call(name: str, *rest: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def operate(_: Any, address: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            return call(builder, name, I32, pointer(builder, args[0], BYTE), *rest)

        return types.int32(types.uint64), generate

    return operate


# Operations of a semaphore in SEMAPHORE_BYTES at the address; they return 0, or -1 when a signal interrupted sem_wait.
sem_init = _semaphore_call("sem_init", I32(0), I32(0))
sem_post, sem_wait = _semaphore_call("sem_post"), _semaphore_call("sem_wait")


def _caller(num_arguments: int) -> Any:
    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * num_arguments)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return generate


@intrinsic  # type: ignore[untyped-decorator]
def call_with_2(_: Any, function: Any, a: Any, b: Any) -> Any:
    """Call the C function at the address `function` with two 64-bit numbers."""
    return types.void(*[types.uint64] * 3), _caller(2)


@intrinsic  # type: ignore[untyped-decorator]
def call_with_4(_: Any, function: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Call the C function at the address `function` with four 64-bit numbers."""
    return types.void(*[types.uint64] * 5), _caller(4)
