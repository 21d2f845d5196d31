"""Multiply rows of 16-bit integers with panels of 64 quantized weights on AVX2, in the bits of quantized_product.py.

AVX2 has no product of bytes whose sums are exact, but one of pairs of 16-bit integers (vpmaddwd). So a row is not split
into planes: codes are widened in registers, and a row times a code is one product instead of two. What comes out is
256 * upper + lower, where `upper` and `lower` are the sums of the planes.

The result is defined as fp32(upper) * 256 + fp32(lower), rounded once. If both sums have at most 24 bits, fp32 has them
exactly, and that is the sum of the products itself, rounded once. A bound from the lengths of the vectors shows that
for nearly all rows; for the others `lower` is computed too, as the product with a row that holds the lower plane only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import float32, float64, int16, int32, types, uint64
from numba.extending import intrinsic

from moray.kernels.cpu.epilogue import apply_epilogue
from moray.kernels.cpu.numba_intrinsics import array_at, fma as fma_one, inlined
from moray.kernels.cpu.quantized_product import PLANES
from moray.kernels.cpu.vector_product import LINES_PER_STEP, PANEL, STEP_BYTES
from moray.kernels.cpu.vectors import (
    BYTE,
    F32,
    I16,
    I32,
    I64,
    address_of,
    call,
    constant,
    emit_prefetch,
    fma,
    load,
    loop,
    offset,
    splat,
    store,
    variable,
    vector,
)

LANES = 8  # words in a vector
VECTORS = (0, 8, 4, 4, 2, 2, 2)  # by the number of rows: vectors of a row's sums that are in registers
MAX_ROWS = 6  # rows whose sums are in registers
BLOCK_ROWS = 36  # rows whose sums stay in the first-level cache together
PASS_STEPS = 64  # steps whose sums fit 32 bits, whatever the codes; 16 KB, which stay in the first-level cache
AHEAD_BYTES = 16384  # distance from the weights in use to those that are prefetched
EXACT = 2**24  # whole numbers up to this are exact in fp32
MAX_PLANE = 128

Part = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class PairForm:
    """States how words hold codes: `parts` extract two of them as 16-bit numbers, in the order of a row's pairs."""

    parts: tuple[Part, ...]


def _bits(first: int, width: int) -> Part:
    """Return a function that extracts an unsigned code of `width` bits, whose lowest is `first`, from 16 bits."""

    def extract(builder: Any, words: Any) -> Any:
        shifted = builder.lshr(words, constant(I16, words.type.count, first)) if first else words
        return shifted if first + width == 16 else builder.and_(shifted, constant(I16, words.type.count, 2**width - 1))

    return extract


BYTES = PairForm((_bits(0, 8), _bits(8, 8)))
HALVES = PairForm((_bits(0, 4), _bits(8, 4), _bits(4, 4), _bits(12, 4)))


def _multiplier(name: str, form: PairForm) -> Any:
    """Return the intrinsic `name` that multiplies 1..MAX_ROWS rows with some groups, or a part of a group, of a panel.

    lines:       cache lines to prefetch per step, from `ahead` on: 0, 1, 2 or 4
    w:           address of the first step
    x, x_stride: address of the first row's pairs at that step; bytes from row to row
    is_whole:    1 if groups are whole: their sums, times scales, are added to `total`. 0 for a part of a group: its sum
                 is split into 256 * upper + lower, with lower from 0 to 255, and these are added to `upper` and `lower`
    scales:      address of the first group's scales, [groups, PANEL] fp32
    zeros:       address of what is subtracted from each output's codes, [groups, PANEL] bytes; or 0, if it is `zero`
                 for all of them
    plane_sums:  address of the negative sum of the first row's upper plane in the first group, int32
    sum_stride:  bytes from there to the lower plane's
    total:       address of the sums of all groups, [rows, PANEL] fp32
    upper:       address of [rows, PANEL] int32, and so is `lower`
    """

    def multiply(
        _: Any,
        rows: Any,
        lines: Any,
        w: Any,
        x: Any,
        x_stride: Any,
        groups: Any,
        group_steps: Any,
        ahead: Any,
        is_whole: Any,
        scales: Any,
        zeros: Any,
        zero: Any,
        plane_sums: Any,
        sum_stride: Any,
        total: Any,
        upper: Any,
        lower: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            rows, lines, *rest = args
            function = builder.function
            done = function.append_basic_block("multiplied")
            cases = builder.switch(builder.add(builder.mul(rows, I64(8)), lines), done)
            for num_rows in range(1, MAX_ROWS + 1):
                for num_lines in possible_lines(num_rows):
                    block = function.append_basic_block()
                    cases.add_case(I64(num_rows * 8 + num_lines), block)
                    builder.position_at_end(block)
                    _emit(builder, form, num_rows, num_lines, *rest)
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 17), generate

    # Numba names machine code in its cache by the names of functions, see quantized_product.py.
    multiply.__name__ = name
    return intrinsic(multiply)


def possible_lines(rows: int) -> set[int]:
    """Return how many cache lines per step a block of `rows` rows may have to prefetch, see multiply_pairs."""
    found = {0}
    for num_rows in range(rows, BLOCK_ROWS + 1):
        blocks = -(-num_rows // MAX_ROWS)
        sizes = [num_rows * (i + 1) // blocks - num_rows * i // blocks for i in range(blocks)]
        shares = [LINES_PER_STEP * (i + 1) // blocks - LINES_PER_STEP * i // blocks for i in range(blocks)]
        found.update(share for size, share in zip(sizes, shares, strict=True) if size == rows)
    return found


def hidden(builder: Any, address: Any) -> Any:
    """Return the address in a way that LLVM cannot see through, after all loads and stores before it."""
    return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0,~{memory}", [address], side_effect=True)


def _emit(
    builder: Any,
    form: PairForm,
    rows: int,
    lines: int,
    w: Any,
    x: Any,
    x_stride: Any,
    groups: Any,
    group_steps: Any,
    ahead: Any,
    is_whole: Any,
    scales: Any,
    zeros: Any,
    zero: Any,
    plane_sums: Any,
    sum_stride: Any,
    total: Any,
    upper: Any,
    lower: Any,
) -> None:
    """Emit the multiplication of `rows` rows with all columns of a panel, in blocks of columns."""
    vectors = VECTORS[rows]
    block_bytes = LANES * vectors * 4  # bytes of a step that belong to a block of columns
    blocks = STEP_BYTES // block_bytes
    block_lines = -(-lines // blocks)
    words, floats = vector(I32, LANES), vector(F32, LANES)
    x_bytes = 4 * len(form.parts)  # of a row's pairs in a step
    x_rows = [builder.add(x, builder.mul(x_stride, I64(row))) for row in range(rows)]
    two_strides = builder.mul(sum_stride, I64(2))
    sum_rows = [builder.add(plane_sums, builder.mul(two_strides, I64(row))) for row in range(rows)]
    add_whole = builder.icmp_unsigned("!=", is_whole, I64(0))
    by_output = builder.icmp_unsigned("!=", zeros, I64(0))
    zero = builder.trunc(zero, I32)

    def place(address: Any, row: int, i: int) -> Any:
        return offset(builder, address, row * STEP_BYTES + i * LANES * 4)

    with loop(builder, I64(blocks)) as block:
        start = builder.mul(block, I64(block_bytes))
        total_here, upper_here, lower_here = (builder.add(at, start) for at in (total, upper, lower))
        w_here, scales_here = builder.add(w, start), builder.add(scales, start)
        zeros_here = builder.add(zeros, builder.lshr(start, I64(2)))
        ahead_here = builder.add(ahead, builder.mul(block, I64(64 * block_lines)))
        sums = [[variable(builder, splat(builder, I32(0), LANES)) for _ in range(vectors)] for _ in range(rows)]
        with loop(builder, groups) as group:
            for one_row in sums:
                for at in one_row:
                    builder.store(splat(builder, I32(0), LANES), at)
            first_step = builder.mul(group, group_steps)
            with loop(builder, group_steps) as in_group:
                step = builder.add(first_step, in_group)
                w_at = builder.add(w_here, builder.mul(step, I64(STEP_BYTES)))
                ahead_at = builder.add(ahead_here, builder.mul(step, I64(64 * lines)))
                for line in range(block_lines):
                    emit_prefetch(builder, offset(builder, ahead_at, 64 * line))
                x_at = builder.mul(step, I64(x_bytes))
                pairs = vector(I16, 2 * LANES)
                for p, part in enumerate(form.parts):
                    w_at = hidden(builder, w_at)
                    codes = [part(builder, load(builder, offset(builder, w_at, i * LANES * 4), pairs)) for i in range(vectors)]
                    for x_row, places in zip(x_rows, sums, strict=True):
                        pair = load(builder, offset(builder, builder.add(x_row, x_at), 4 * p), I32)
                        factor = builder.bitcast(splat(builder, pair, LANES), pairs)
                        for code, at in zip(codes, places, strict=True):
                            products = call(builder, "llvm.x86.avx2.pmadd.wd", words, code, factor)
                            builder.store(builder.add(builder.load(at), products), at)
            with builder.if_else(add_whole) as (whole, part_of_one):
                with whole:
                    scales_at = builder.add(scales_here, builder.mul(group, I64(STEP_BYTES)))
                    zeros_at = builder.add(zeros_here, builder.mul(group, I64(PANEL)))
                    sum_at = builder.mul(group, I64(4))
                    negative = []
                    for at in sum_rows:
                        above = load(builder, builder.add(at, sum_at), I32)
                        below = load(builder, builder.add(builder.add(at, sum_stride), sum_at), I32)
                        negative.append(builder.add(builder.shl(above, I32(8)), below))
                    with builder.if_else(by_output) as (some, none):
                        with some:
                            for i in range(vectors):
                                of_outputs = load(builder, offset(builder, zeros_at, i * LANES), vector(BYTE, LANES))
                                of_outputs = builder.zext(of_outputs, words)
                                for one, places in zip(negative, sums, strict=True):
                                    shift = builder.mul(of_outputs, splat(builder, one, LANES))
                                    builder.store(builder.add(builder.load(places[i]), shift), places[i])
                        with none:
                            for one, places in zip(negative, sums, strict=True):
                                shift = splat(builder, builder.mul(one, zero), LANES)
                                for at in places:
                                    builder.store(builder.add(builder.load(at), shift), at)
                    for i in range(vectors):
                        scale = load(builder, place(scales_at, 0, i), floats)
                        for row, places in enumerate(sums):
                            at = place(total_here, row, i)
                            number = builder.sitofp(builder.load(places[i]), floats)
                            store(builder, fma(builder, number, scale, load(builder, at, floats)), at)
                with part_of_one:
                    for row, places in enumerate(sums):
                        for i, found in enumerate(places):
                            number = builder.load(found)
                            at = place(upper_here, row, i)
                            above = builder.ashr(number, constant(I32, LANES, 8))
                            store(builder, builder.add(load(builder, at, words), above), at)
                            at = place(lower_here, row, i)
                            below = builder.and_(number, constant(I32, LANES, 255))
                            store(builder, builder.add(load(builder, at, words), below), at)


multiply_byte_pairs = _multiplier("multiply_byte_pairs", BYTES)
multiply_half_pairs = _multiplier("multiply_half_pairs", HALVES)


@intrinsic  # type: ignore[untyped-decorator]
def add_squares(_: Any, w: Any, num_steps: Any, zero: Any, sums: Any) -> Any:
    """Add the squares of an output's codes of 8 bits, less zero, to its sum.

    w:    address of the first step of a panel
    sums: address of [PANEL] int32
    """

    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        w, num_steps, zero, sums = args
        pairs, vectors = vector(I16, 2 * LANES), PANEL // LANES
        zeros = splat(builder, builder.trunc(zero, I16), 2 * LANES)
        places = [offset(builder, sums, i * LANES * 4) for i in range(vectors)]
        found = [variable(builder, load(builder, at, vector(I32, LANES))) for at in places]
        with loop(builder, num_steps) as step:
            w_at = builder.add(w, builder.mul(step, I64(STEP_BYTES)))
            for i, at in enumerate(found):
                words = load(builder, offset(builder, w_at, i * LANES * 4), pairs)
                for part in BYTES.parts:
                    codes = builder.sub(part(builder, words), zeros)
                    squares = call(builder, "llvm.x86.avx2.pmadd.wd", vector(I32, LANES), codes, codes)
                    builder.store(builder.add(builder.load(at), squares), at)
        for at, place in zip(found, places, strict=True):
            store(builder, builder.load(at), place)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), generate


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _lower_length(xq: Any, row: Any) -> Any:
    """Return the square of the length of a row's lower plane."""
    pairs = array_at(address_of(xq) + row * uint64(PLANES * xq.shape[1]), (uint64(xq.shape[1]),), np.int16)
    total = np.int64(0)
    for k in range(uint64(xq.shape[1])):
        lower = int32(int16(pairs[k] << int16(8)) >> int16(8))
        total += lower * lower
    return total


# Inlined for the reason that multiply_quantized is.
@inlined
def multiply_pairs(multiply: Any, zero: int, weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1.

    multiply: an intrinsic of this file
    rows:     (xq, xs, plane_sums), with xq from quantized_rows.quantize_pairs
    The rest is as for multiply_quantized.
    """
    w, scales, zeros, group_steps = weight
    xq, xs, plane_sums = rows
    bias, activation, times, y = result
    num_steps, num_groups = w.shape[1], scales.shape[1]
    used_steps = min(num_steps, num_groups * group_steps)  # padding may begin a group that has no scale
    padded = xq.shape[1]
    row_bytes = uint64(PLANES * padded)
    x_step = row_bytes // uint64(num_steps)
    sum_stride = uint64(plane_sums.shape[1] * 4)
    is_whole = group_steps <= PASS_STEPS
    farthest = zero if zeros.shape[0] == 0 else 2 * zero - 1  # distance of a code from its zero
    group_inputs = min(group_steps, used_steps) * (padded // num_steps)
    is_exact = is_whole or group_inputs * farthest * MAX_PLANE <= EXACT
    total = np.empty((BLOCK_ROWS, PANEL), np.float32)
    upper, lower = np.empty((BLOCK_ROWS, PANEL), np.int32), np.empty((BLOCK_ROWS, PANEL), np.int32)
    first_upper, first_lower = np.empty_like(upper), np.empty_like(lower)
    lower_planes = np.empty(0, np.int16)
    # squares of the lengths of the rows' lower planes, and of the codes of a panel's outputs
    plane_lengths, code_lengths = np.zeros(0 if is_exact else len(y), np.int64), np.empty(PANEL, np.int32)
    for row in range(len(plane_lengths)):
        plane_lengths[row] = _lower_length(xq, uint64(row))
    for panel in range(start, stop):
        for first in range(0, len(y), BLOCK_ROWS):
            num_rows = min(BLOCK_ROWS, len(y) - first)
            # Blocks are of about the same size, and each prefetches its share of what follows. Only the first rows need
            # that: for later ones the weights are in the cache.
            num_blocks = (num_rows + MAX_ROWS - 1) // MAX_ROWS
            to_fetch = LINES_PER_STEP if first == 0 else 0
            total[:num_rows] = float32(0.0)
            of_lower_planes = False
            longest = float64(0.0)
            for row in range(first, min(first + num_rows, len(plane_lengths))):
                longest = max(longest, float64(plane_lengths[row]))
            is_short = is_exact or longest * float64(group_inputs * farthest * farthest) <= EXACT**2
            is_measured = not is_short and zero == 128 and zeros.shape[0] == 0
            step = 0
            while step < used_steps:
                group = step // group_steps
                group_start, group_stop = group * group_steps, min((group + 1) * group_steps, used_steps)
                if not is_whole:
                    groups, steps = 1, min(PASS_STEPS, group_stop - step)
                    if step == group_start:
                        code_lengths[:] = 0
                        for row in range(uint64(num_rows)):
                            plane = uint64(PLANES) * (uint64(first) + row)
                            above = plane_sums[plane, group] if not of_lower_planes else int32(0)
                            below = plane_sums[plane + uint64(1), group]
                            for column in range(uint64(PANEL)):
                                shift = int32(zeros[panel, group, column]) if zeros.shape[0] > 0 else int32(zero)
                                upper[row, column] = int32(above * shift)
                                lower[row, column] = int32(below * shift)
                elif group_stop - step < group_steps:
                    groups, steps = 1, group_stop - step
                else:
                    groups, steps = min(PASS_STEPS // group_steps, (used_steps - step) // group_steps), group_steps
                at_group = uint64((panel * num_groups + group) * PANEL)
                zeros_at = address_of(zeros) + at_group if zeros.shape[0] > 0 else uint64(0)
                block_w = address_of(w) + uint64((panel * num_steps + step) * STEP_BYTES)
                ahead = block_w + uint64(AHEAD_BYTES)
                x = address_of(lower_planes) if of_lower_planes else address_of(xq) + uint64(first) * row_bytes
                for block in range(num_blocks):
                    row = num_rows * block // num_blocks
                    block_rows = num_rows * (block + 1) // num_blocks - row
                    lines = to_fetch * (block + 1) // num_blocks - to_fetch * block // num_blocks
                    multiply(
                        uint64(block_rows),
                        uint64(lines),
                        block_w,
                        x + uint64(row) * row_bytes + uint64(step) * x_step,
                        row_bytes,
                        uint64(groups),
                        uint64(steps),
                        ahead,
                        uint64(is_whole),
                        address_of(scales) + at_group * uint64(4),
                        zeros_at,
                        uint64(zero),
                        address_of(plane_sums) + uint64(PLANES * (first + row)) * sum_stride + uint64(4 * group),
                        sum_stride,
                        address_of(total) + uint64(row * STEP_BYTES),
                        address_of(upper) + uint64(row * STEP_BYTES),
                        address_of(lower) + uint64(row * STEP_BYTES),
                    )
                    ahead += uint64(lines * 64 * groups * steps)
                if is_measured and not of_lower_planes:
                    add_squares(block_w, uint64(steps), uint64(zero), address_of(code_lengths))
                step += groups * steps
                if is_whole or step < group_stop:
                    continue
                largest = int32(0)
                for row in range(uint64(num_rows)):
                    for column in range(uint64(PANEL)):
                        upper[row, column] += lower[row, column] >> int32(8)
                        lower[row, column] &= int32(255)
                        largest = max(largest, abs(upper[row, column]))
                if of_lower_planes:
                    for row in range(uint64(num_rows)):
                        for column in range(uint64(PANEL)):
                            # what `lower` is of the first sums is equal: they differ by a multiple of 256
                            above = first_upper[row, column] - upper[row, column]
                            below = upper[row, column] * int32(256) + lower[row, column]
                            number = fma_one(float32(above), float32(256.0), float32(below))
                            total[row, column] = fma_one(number, scales[panel, group, column], total[row, column])
                    of_lower_planes = False
                elif is_exact or (
                    (is_short or (is_measured and longest * float64(code_lengths.max()) <= EXACT**2))
                    and largest <= EXACT - MAX_PLANE * 1024
                ):
                    for row in range(uint64(num_rows)):
                        for column in range(uint64(PANEL)):
                            number = fma_one(
                                float32(upper[row, column]), float32(256.0), float32(lower[row, column])
                            )
                            total[row, column] = fma_one(number, scales[panel, group, column], total[row, column])
                else:
                    first_upper[:num_rows] = upper[:num_rows]
                    if len(lower_planes) == 0:
                        lower_planes = np.empty(BLOCK_ROWS * padded, np.int16)
                    pairs = array_at(x, (num_rows * padded,), np.int16)
                    for k in range(uint64(num_rows * padded)):
                        lower_planes[k] = int16(pairs[k] << int16(8)) >> int16(8)
                    of_lower_planes = True
                    step = group_start
            for row in range(uint64(num_rows)):
                for column in range(uint64(PANEL)):
                    total[row, column] *= xs[uint64(first) + row]
            apply_epilogue(total, bias, activation, times, y, uint64(first), uint64(panel * PANEL), uint64(num_rows))
