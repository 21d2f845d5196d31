"""Helpers that emit vector instructions (LLVM) in the code generators of Numba intrinsics.

Kernels whose inner loop must stay in registers are written with these helpers, unrolled by plain Python loops:

    @intrinsic
    def first_sixteen(_, address):
        def generate(_, builder, __, args):
            ...
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I16, I32, I64, F16, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
BYTE = ir.IntType(8)


def vector(element: Any, lanes: int) -> Any:
    """Return the LLVM type of a vector with `lanes` elements."""
    return ir.VectorType(element, lanes)


def constant(element: Any, lanes: int, value: int) -> Any:
    """Return a vector constant with the value in every lane."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Return the address as a pointer to a value of the LLVM type `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def offset(builder: Any, address: Any, num_bytes: int) -> Any:
    """Return the address plus num_bytes."""
    return builder.add(address, I64(num_bytes)) if num_bytes else address


def load(builder: Any, address: Any, kind: Any) -> Any:
    """Load a value of the LLVM type `kind` from any address, aligned or not."""
    return builder.load(pointer(builder, address, kind), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    """Store a value at any address, aligned or not."""
    builder.store(value, pointer(builder, address, value.type), align=1)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector with the value in every lane."""
    kind = vector(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), constant(I32, lanes, 0))


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call the LLVM intrinsic `name`, such as llvm.fma.v16f32."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [arg.type for arg in args]), name)
    return builder.call(function, args)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c for fp32 vectors, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def dot_bf16(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add the products of the two bf16 in each 32-bit lane of a and b to the 16 fp32 sums (vdpbf16ps)."""
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", sums.type, sums, a, b)


def dot_bytes(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add the products of the four unsigned bytes of a and the four signed bytes of b in each lane (vpdpbusd)."""
    lanes = sums.type.count
    of_bytes = vector(BYTE, 4 * lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return call(builder, name, sums.type, sums, builder.bitcast(a, of_bytes), builder.bitcast(b, of_bytes))


def dot_pairs(builder: Any, a: Any, b: Any) -> Any:
    """Return the sums of the products of the two 16-bit integers in each 32-bit lane of a and b (vpmaddwd)."""
    lanes = a.type.count // 2
    name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[lanes]
    return call(builder, name, vector(I32, lanes), a, b)


def dot_small_bytes_avx2(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Do what dot_bytes does, for 8 lanes and bytes of a up to 127: sums of two products fit 16 bits (vpmaddubsw)."""
    of_bytes, halves = vector(BYTE, 4 * sums.type.count), vector(I16, 2 * sums.type.count)
    operands = builder.bitcast(a, of_bytes), builder.bitcast(b, of_bytes)
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", halves, *operands)
    return builder.add(sums, dot_pairs(builder, pairs, constant(I16, halves.count, 1)))


def look_up(builder: Any, table: Sequence[int], indices: Any) -> Any:
    """Return the byte of a table of 16 at each byte of vectors of 32-bit words, which are 0..15 (vpshufb)."""
    lanes = indices.type.count
    of_bytes = vector(BYTE, 4 * lanes)
    entries = ir.Constant(of_bytes, list(table) * (lanes // 4))
    name = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}[lanes]
    found = call(builder, name, of_bytes, entries, builder.bitcast(indices, of_bytes))
    return builder.bitcast(found, indices.type)


def even_bf16(builder: Any, pairs: Any) -> Any:
    """Return the lower bf16 of each 32-bit lane as fp32."""
    lanes = pairs.type.count
    return builder.bitcast(builder.shl(pairs, constant(I32, lanes, 16)), vector(F32, lanes))


def odd_bf16(builder: Any, pairs: Any) -> Any:
    """Return the upper bf16 of each 32-bit lane as fp32."""
    lanes = pairs.type.count
    return builder.bitcast(builder.and_(pairs, constant(I32, lanes, -65536)), vector(F32, lanes))


def even_f16(builder: Any, pairs: Any) -> Any:
    """Return the lower float16 of each 32-bit lane as fp32."""
    lanes = pairs.type.count
    halves = builder.bitcast(builder.trunc(pairs, vector(I16, lanes)), vector(F16, lanes))
    return builder.fpext(halves, vector(F32, lanes))


def odd_f16(builder: Any, pairs: Any) -> Any:
    """Return the upper float16 of each 32-bit lane as fp32."""
    return even_f16(builder, builder.lshr(pairs, constant(I32, pairs.type.count, 16)))


def emit_prefetch(builder: Any, address: Any) -> None:
    """Emit a prefetch of the cache line at the address into the second-level cache. Invalid addresses are allowed."""
    line = pointer(builder, address, BYTE)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(2), I32(1))


@contextmanager
def loop(builder: Any, count: Any) -> Iterator[Any]:
    """Emit the body as a loop; yields the index, which runs from 0 to count - 1 (both have 64 bits)."""
    with cgutils.for_range(builder, count) as body:
        yield body.index


def variable(builder: Any, value: Any) -> Any:
    """Return the address of a variable that loops may change; LLVM keeps it in a register if it can."""
    place = cgutils.alloca_once(builder, value.type)
    builder.store(value, place)
    return place


@intrinsic  # type: ignore[untyped-decorator]
def address_of(_: Any, array: Any) -> Any:
    """Return the address of a NumPy array's data."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, I64)

    return types.uint64(array), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, address: Any) -> Any:
    """Prefetch the cache line at the address into the second-level cache. Invalid addresses are allowed."""

    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        emit_prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.uint64), generate
