"""Multiply rows of 16-bit integers with panels of 64 quantized weights without VNNI, in quantized_product.py's bits.

AVX2 and AVX-512 alone have no product of bytes whose sums are exact, but one of pairs of 16-bit integers (vpmaddwd). So
rows are not split into planes here: codes are widened in registers, and a number times a code is one product instead of
two. The sum of a group is T = 256 * U + L, where U and L are the sums that the upper and the lower plane would have.

The result of a group is defined as fp32(U) * 256 + fp32(L), rounded once. Where U and L are at most 2**24, fp32 has
them exactly, and this is T rounded once. |L| is at most the product of the lengths of the lower plane and of the codes
(Cauchy and Schwarz); that shows it for nearly all rows of less than some 6,000 inputs, and for all rows up to 1,024.
The lengths of codes are computed when a weight is packed. Where the product is too large, L is computed too: it is the
product with a row that holds the lower plane alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, float64, int16, int32, types, uint32, uint64
from numba.core.cgutils import unpack_tuple
from numba.extending import intrinsic
from torch import Tensor

from moray.kernels.cpu.epilogue import apply_epilogue
from moray.kernels.cpu.numba_intrinsics import array, array_at, compiled, inlined
from moray.kernels.cpu.numba_intrinsics import fma as fused
from moray.kernels.cpu.quantized_product import PLANES, possible_lines
from moray.kernels.cpu.thread_pool import parallel_for
from moray.kernels.cpu.vector_product import LINES_PER_STEP, PANEL, STEP_BYTES
from moray.kernels.cpu.vectors import (
    BYTE,
    F32,
    I16,
    I32,
    I64,
    address_of,
    constant,
    dot_pairs,
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

MAX_ROWS = 6
# Lanes of a vector -> vectors of a row's sums that are in registers, for 1..MAX_ROWS rows. AVX-512 has 32 registers.
VECTORS = {8: (8, 4, 2, 2, 2, 2), 16: (4, 4, 4, 4, 4, 4)}
BLOCK_ROWS = 36  # rows whose sums stay in the first-level cache together; a multiple of MAX_ROWS
PASS_STEPS = 64  # of a panel, 16 KB, which stay in the first-level cache. Their sums fit 32 bits, whatever the codes.
AHEAD_BYTES = 16384  # distance from the weights in use to those that are prefetched
EXACT = 2**24  # fp32 has all whole numbers up to this
MAX_PLANE = 128  # largest number of a plane
MARGIN = 2**17  # 256 * EXACT - 256 * MARGIN + the largest exact L is less than 256 * EXACT


Part = Callable[[Any, Any], Any]


class PairOperands(NamedTuple):
    """Says what a multiplier reads and writes: addresses, distances in bytes and numbers, all of 64 bits.

    w:           address of the first step
    x, x_stride: address of the first row's pairs at that step; bytes from row to row
    groups:      how many groups, of `group_steps` steps, or 1 and the steps of a part of one
    is_whole:    1: the sums of each group, times its scales, are added to `total`; 0: the sums are not complete, and
                 are added to 256 * `upper` + `lower`
    scales:      address of the first group's scales, [groups, PANEL] fp32
    zeros:       address of what is subtracted from each output's codes, [groups, PANEL] bytes; 0 if it is `zero` for
                 all of them
    plane_sums:  address of the negative sum of the first row's upper plane in the first group, int32
    sum_stride:  bytes from there to the lower plane's
    total:       address of the sums of all groups, [rows, PANEL] fp32
    upper:       address of [rows, PANEL] int32; and so is `lower`
    """

    w: Any
    x: Any
    x_stride: Any
    groups: Any
    group_steps: Any
    ahead: Any
    is_whole: Any
    scales: Any
    zeros: Any
    zero: Any
    plane_sums: Any
    sum_stride: Any
    total: Any
    upper: Any
    lower: Any


def _bits(first: int, width: int) -> Part:
    """Return a function that extracts an unsigned code, whose lowest bit is `first`, from each 16 bits."""

    def extract(builder: Any, words: Any) -> Any:
        halves = words.type.count
        shifted = builder.lshr(words, constant(I16, halves, first)) if first else words
        return builder.and_(shifted, constant(I16, halves, 2**width - 1)) if first + width < 16 else shifted

    return extract


# The codes of a word in pairs: inputs 0 and 2, 1 and 3, and so on. Rows have this order too (quantize_pairs).
BYTES = (_bits(0, 8), _bits(8, 8))
HALVES = (_bits(0, 4), _bits(8, 4), _bits(4, 4), _bits(12, 4))


def _multiplier(name: str, parts: tuple[Part, ...], lanes: int) -> Any:
    """Return the intrinsic `name` that multiplies 1..MAX_ROWS rows with some groups, or a part of one, of a panel.

    It computes with vectors of `lanes` words, and takes the number of rows, the cache lines to prefetch per step (0, 1,
    2 or 4), from `ahead` on, and PairOperands.
    """

    def multiply(_: Any, rows: Any, lines: Any, operands: Any) -> Any:
        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            rows, lines, packed = args
            found = PairOperands(*unpack_tuple(builder, packed))
            function = builder.function
            done = function.append_basic_block("multiplied")
            cases = builder.switch(builder.add(builder.mul(rows, I64(8)), lines), done)
            for num_rows in range(1, MAX_ROWS + 1):
                for num_lines in possible_lines(num_rows, MAX_ROWS, BLOCK_ROWS):
                    block = function.append_basic_block()
                    cases.add_case(I64(num_rows * 8 + num_lines), block)
                    builder.position_at_end(block)
                    _emit(builder, parts, lanes, num_rows, num_lines, found)
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, operands), generate

    # Numba names machine code in its cache by the names of functions, see quantized_product.py.
    multiply.__name__ = name
    return intrinsic(multiply)


def _emit(builder: Any, parts: tuple[Part, ...], lanes: int, rows: int, lines: int, given: PairOperands) -> None:
    """Emit the multiplication of `rows` rows with all columns of a panel, in blocks of columns."""
    vectors = VECTORS[lanes][rows - 1]
    block_bytes = lanes * vectors * 4  # bytes of a step that belong to a block of columns
    blocks = STEP_BYTES // block_bytes
    block_lines = -(-lines // blocks)
    x_rows = [builder.add(given.x, builder.mul(given.x_stride, I64(row))) for row in range(rows)]
    planes = [
        builder.add(given.plane_sums, builder.mul(given.sum_stride, I64(plane))) for plane in range(PLANES * rows)
    ]
    adds_whole_groups = builder.icmp_unsigned("!=", given.is_whole, I64(0))
    with loop(builder, I64(blocks)) as block:
        start = builder.mul(block, I64(block_bytes))
        w_here, scales_here = builder.add(given.w, start), builder.add(given.scales, start)
        zeros_here = builder.add(given.zeros, builder.lshr(start, I64(2)))
        ahead_here = builder.add(given.ahead, builder.mul(block, I64(64 * block_lines)))
        columns = _Columns(builder, rows, vectors, lanes)
        with loop(builder, given.groups) as group:
            columns.clear()
            first_step = builder.mul(group, given.group_steps)
            with loop(builder, given.group_steps) as in_group:
                step = builder.add(first_step, in_group)
                ahead_at = builder.add(ahead_here, builder.mul(step, I64(64 * lines)))
                for line in range(block_lines):
                    emit_prefetch(builder, offset(builder, ahead_at, 64 * line))
                x_at = builder.mul(step, I64(4 * len(parts)))
                w_at = builder.add(w_here, builder.mul(step, I64(STEP_BYTES)))
                columns.add_products(parts, w_at, [builder.add(row, x_at) for row in x_rows])
            with builder.if_else(adds_whole_groups) as (whole, incomplete):
                with whole:
                    zeros_at = builder.add(zeros_here, builder.mul(group, I64(PANEL)))
                    sum_at = builder.mul(group, I64(4))
                    sums_at = [builder.add(plane, sum_at) for plane in planes]
                    columns.subtract_zeros(given.zeros, zeros_at, given.zero, sums_at)
                    scales_at = builder.add(scales_here, builder.mul(group, I64(STEP_BYTES)))
                    columns.add_to_total(scales_at, builder.add(given.total, start))
                with incomplete:
                    columns.add_to_parts(builder.add(given.upper, start), builder.add(given.lower, start))


class _Columns:
    """Emits the parts of a product for the columns of one block. `sums` are [rows][vectors] variables."""

    def __init__(self, builder: Any, rows: int, vectors: int, lanes: int) -> None:
        self.builder, self.vectors, self.lanes = builder, vectors, lanes
        self.pairs, self.words, self.floats = vector(I16, 2 * lanes), vector(I32, lanes), vector(F32, lanes)
        self.none = splat(builder, I32(0), lanes)
        self.sums = [[variable(builder, self.none) for _ in range(vectors)] for _ in range(rows)]

    def place(self, address: Any, row: int, i: int) -> Any:
        """Return the address of vector i of a row of 32-bit numbers."""
        return offset(self.builder, address, row * STEP_BYTES + i * self.lanes * 4)

    def clear(self) -> None:
        for at in (at for places in self.sums for at in places):
            self.builder.store(self.none, at)

    def add_products(self, parts: tuple[Part, ...], w: Any, x_rows: list[Any]) -> None:
        """Add the products of one step."""
        builder = self.builder
        for p, part in enumerate(parts):
            w = _hidden(builder, w)
            codes = [part(builder, load(builder, self.place(w, 0, i), self.pairs)) for i in range(self.vectors)]
            for x, places in zip(x_rows, self.sums, strict=True):
                pair = splat(builder, load(builder, offset(builder, x, 4 * p), I32), self.lanes)
                for code, at in zip(codes, places, strict=True):
                    products = dot_pairs(builder, code, builder.bitcast(pair, self.pairs))
                    builder.store(builder.add(builder.load(at), products), at)

    def subtract_zeros(self, zeros: Any, zeros_at: Any, zero: Any, planes: list[Any]) -> None:
        """Add what codes are too large by, times minus the sums of the rows, whose planes' sums are at `planes`."""
        builder = self.builder
        found = [load(builder, at, I32) for at in planes]
        negative = [
            builder.add(builder.shl(above, I32(8)), below) for above, below in zip(found[::2], found[1::2], strict=True)
        ]
        by_output = builder.icmp_unsigned("!=", zeros, I64(0))
        with builder.if_else(by_output) as (some, none):
            with some:
                for i in range(self.vectors):
                    bytes_ = load(builder, offset(builder, zeros_at, i * self.lanes), vector(BYTE, self.lanes))
                    of_outputs = builder.zext(bytes_, self.words)
                    for one, places in zip(negative, self.sums, strict=True):
                        product = builder.mul(of_outputs, splat(builder, one, self.lanes))
                        builder.store(builder.add(builder.load(places[i]), product), places[i])
            with none:
                for one, places in zip(negative, self.sums, strict=True):
                    product = splat(builder, builder.mul(one, builder.trunc(zero, I32)), self.lanes)
                    for at in places:
                        builder.store(builder.add(builder.load(at), product), at)

    def add_to_total(self, scales: Any, total: Any) -> None:
        """Add the sums times the scales to the sums of all groups."""
        builder = self.builder
        for i in range(self.vectors):
            scale = load(builder, self.place(scales, 0, i), self.floats)
            for row, places in enumerate(self.sums):
                at = self.place(total, row, i)
                number = builder.sitofp(builder.load(places[i]), self.floats)
                store(builder, fma(builder, number, scale, load(builder, at, self.floats)), at)

    def add_to_parts(self, upper: Any, lower: Any) -> None:
        """Split the sums into 256 * (upper part) + (lower part), which is from 0 to 255, and add these."""
        builder = self.builder
        for row, places in enumerate(self.sums):
            for i, place in enumerate(places):
                number = builder.load(place)
                above = builder.ashr(number, constant(I32, self.lanes, 8))
                below = builder.and_(number, constant(I32, self.lanes, 255))
                for address, part in ((upper, above), (lower, below)):
                    at = self.place(address, row, i)
                    store(builder, builder.add(load(builder, at, self.words), part), at)


def _hidden(builder: Any, address: Any) -> Any:
    """Return the address so that LLVM does not know it.

    Otherwise LLVM keeps the words of a step to extract all codes from them, and for that stores sums to the stack.
    """
    return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0,~{memory}", [address], side_effect=True)


multiply_byte_pairs_256 = _multiplier("multiply_byte_pairs_256", BYTES, 8)
multiply_byte_pairs_512 = _multiplier("multiply_byte_pairs_512", BYTES, 16)
multiply_half_pairs_256 = _multiplier("multiply_half_pairs_256", HALVES, 8)
multiply_half_pairs_512 = _multiplier("multiply_half_pairs_512", HALVES, 16)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _lower_length(pairs: Any) -> Any:
    """Return the square of the length of a row's lower plane, at most 2**31."""
    total = uint32(0)
    for k in range(uint64(len(pairs))):
        lower = int32(int16(pairs[k] << int16(8)) >> int16(8))
        total = uint32(total + uint32(lower * lower))
    return total


def longest_codes(codes: Tensor, zeros: Tensor | None, group_size: int, step_inputs: int) -> Tensor | None:
    """Return the square of the length of the longest codes of an output, for each panel and group: [panels, groups].

    A length is that of the codes of an output in a group, less their zero, as a vector. None where the kernel does not
    need it: its groups are short.

    codes: [out_features, in_features] int8
    zeros: [out_features, groups] int8, or None
    """
    if group_size <= PASS_STEPS * step_inputs:
        return None
    out_features, in_features = codes.shape
    groups = -(-in_features // group_size)
    found = torch.zeros(-(-out_features // PANEL), groups, dtype=torch.float64)
    arrays = array(codes.contiguous()), np.empty((0, 0), np.int8) if zeros is None else array(zeros), array(found)
    parallel_for(lambda panel: _measure(*arrays, group_size, panel), range(len(found)))
    return found


@compiled
def _measure(codes: Any, zeros: Any, found: Any, group_size: int, panel: int) -> None:
    in_features = codes.shape[1]
    for output in range(panel * PANEL, min((panel + 1) * PANEL, codes.shape[0])):
        for group in range(found.shape[1]):
            zero = int32(zeros[output, group]) if zeros.shape[0] > 0 else int32(0)
            total = uint32(0)  # the squares of as many inputs as quantized._check_codes allows fit
            for k in range(uint64(group * group_size), uint64(min((group + 1) * group_size, in_features))):
                code = int32(int32(codes[output, k]) - zero)
                total = uint32(total + uint32(code * code))
            found[panel, group] = max(found[panel, group], float64(total))


# Inlined for the reason that multiply_quantized is.
@inlined
def multiply_pairs(multiply: Any, zero: int, weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1.

    multiply: an intrinsic of this file
    rows:     (xq, xs, plane_sums) from quantized_rows.quantize_pairs
    The rest is as for multiply_quantized.
    """
    w, scales, zeros, group_steps, lengths = weight
    xq, xs, plane_sums = rows
    bias, activation, times, y = result
    num_steps, num_groups, padded = w.shape[1], scales.shape[1], xq.shape[1]
    used_steps = min(num_steps, num_groups * group_steps)  # padding may begin a group that has no scale
    row_bytes = uint64(PLANES * padded)
    x_step = row_bytes // uint64(num_steps)
    sum_stride = uint64(plane_sums.shape[1] * 4)
    is_whole = group_steps <= PASS_STEPS
    farthest = zero if zeros.shape[0] == 0 else 2 * zero - 1  # distance of a code from its zero
    group_inputs = min(group_steps, used_steps) * (padded // num_steps)
    is_exact = is_whole or group_inputs * farthest * MAX_PLANE <= EXACT  # whatever the numbers are
    total = np.empty((BLOCK_ROWS, PANEL), np.float32)
    upper, lower = np.empty((BLOCK_ROWS, PANEL), np.int32), np.empty((BLOCK_ROWS, PANEL), np.int32)
    upper_of_rows = np.empty((BLOCK_ROWS, PANEL), np.int32)
    shifts = np.full(PANEL, zero, np.int32)
    lower_planes = np.empty(0, np.int16)
    plane_lengths = np.zeros(0 if is_exact else len(y), np.float64)  # their squares
    for row in range(len(plane_lengths)):
        at = address_of(xq) + uint64(row) * row_bytes
        plane_lengths[row] = _lower_length(array_at(at, (uint64(padded),), np.int16))
    for panel in range(start, stop):
        for first in range(0, len(y), BLOCK_ROWS):
            num_rows = min(BLOCK_ROWS, len(y) - first)
            # Blocks are of about the same size, and each prefetches its share of what follows. Only the first rows need
            # that: for later ones the weights are in the cache.
            num_blocks = (num_rows + MAX_ROWS - 1) // MAX_ROWS
            to_fetch = LINES_PER_STEP if first == 0 else 0
            longest = float64(0.0)
            for row in range(first, min(first + num_rows, len(plane_lengths))):
                longest = max(longest, plane_lengths[row])
            is_short = is_exact or longest * float64(group_inputs * farthest * farthest) <= EXACT**2
            total[:num_rows] = float32(0.0)
            reads_lower_planes = False
            step = 0
            while step < used_steps:
                group = step // group_steps
                group_start, group_stop = group * group_steps, min((group + 1) * group_steps, used_steps)
                groups, steps = 1, min(PASS_STEPS, group_stop - step)
                if is_whole and steps == group_steps:
                    groups = min(PASS_STEPS // group_steps, (used_steps - step) // group_steps)
                if step == group_start and not is_whole:
                    if zeros.shape[0] > 0:
                        for column in range(uint64(PANEL)):
                            shifts[column] = int32(zeros[panel, group, column])
                    for row in range(uint64(num_rows)):
                        plane = uint64(PLANES) * (uint64(first) + row)
                        upper_sum = int32(0) if reads_lower_planes else plane_sums[plane, group]
                        lower_sum = plane_sums[plane + uint64(1), group]
                        for column in range(uint64(PANEL)):
                            upper[row, column] = int32(upper_sum * shifts[column])
                        for column in range(uint64(PANEL)):
                            lower[row, column] = int32(lower_sum * shifts[column])
                at_group = uint64((panel * num_groups + group) * PANEL)
                block_w = address_of(w) + uint64((panel * num_steps + step) * STEP_BYTES)
                ahead = block_w + uint64(AHEAD_BYTES)
                x = address_of(lower_planes) if reads_lower_planes else address_of(xq) + uint64(first) * row_bytes
                for block in range(num_blocks):
                    row = num_rows * block // num_blocks
                    block_rows = num_rows * (block + 1) // num_blocks - row
                    lines = to_fetch * (block + 1) // num_blocks - to_fetch * block // num_blocks
                    operands = PairOperands(
                        w=block_w,
                        x=x + uint64(row) * row_bytes + uint64(step) * x_step,
                        x_stride=row_bytes,
                        groups=uint64(groups),
                        group_steps=uint64(steps),
                        ahead=ahead,
                        is_whole=uint64(is_whole),
                        scales=address_of(scales) + at_group * uint64(4),
                        zeros=address_of(zeros) + at_group if zeros.shape[0] > 0 else uint64(0),
                        zero=uint64(zero),
                        plane_sums=address_of(plane_sums)
                        + uint64(PLANES * (first + row)) * sum_stride
                        + uint64(4 * group),
                        sum_stride=sum_stride,
                        total=address_of(total) + uint64(row * STEP_BYTES),
                        upper=address_of(upper) + uint64(row * STEP_BYTES),
                        lower=address_of(lower) + uint64(row * STEP_BYTES),
                    )
                    multiply(uint64(block_rows), uint64(lines), operands)
                    ahead += uint64(lines * 64 * groups * steps)
                step += groups * steps
                if is_whole or step < group_stop:
                    continue
                largest = int32(0)
                for row in range(uint64(num_rows)):
                    for column in range(uint64(PANEL)):
                        upper[row, column] += lower[row, column] >> int32(8)
                        lower[row, column] &= int32(255)
                        largest = max(largest, abs(upper[row, column]))
                if reads_lower_planes:
                    # Both sums have the same lower part: they differ by 256 * U.
                    for row in range(uint64(num_rows)):
                        for column in range(uint64(PANEL)):
                            above = upper_of_rows[row, column] - upper[row, column]
                            lower[row, column] += upper[row, column] * int32(256)
                            upper[row, column] = above
                    reads_lower_planes = False
                elif not is_exact and (
                    largest > EXACT - MARGIN
                    or not (is_short or (lengths.shape[0] > 0 and longest * lengths[panel, group] <= EXACT**2))
                ):
                    upper_of_rows[:num_rows] = upper[:num_rows]
                    if len(lower_planes) == 0:
                        lower_planes = np.empty(BLOCK_ROWS * padded, np.int16)
                    pairs = array_at(x, (uint64(num_rows * padded),), np.int16)
                    for k in range(uint64(num_rows * padded)):
                        lower_planes[k] = int16(pairs[k] << int16(8)) >> int16(8)
                    reads_lower_planes = True
                    step = group_start
                    continue
                for row in range(uint64(num_rows)):
                    for column in range(uint64(PANEL)):
                        number = fused(float32(upper[row, column]), float32(256.0), float32(lower[row, column]))
                        total[row, column] = fused(number, scales[panel, group, column], total[row, column])
            for row in range(uint64(num_rows)):
                for column in range(uint64(PANEL)):
                    total[row, column] *= xs[uint64(first) + row]
            apply_epilogue(total, bias, activation, times, y, uint64(first), uint64(panel * PANEL), uint64(num_rows))
