"""Multiply rows with panels of 64 quantized weights on vectors.

A panel holds its codes in steps of 64 words of 32 bits, one word per output feature: four inputs of 8 bits each, or
eight of 4 bits, the first four of them in the lower halves of the bytes. Codes lie there as unsigned numbers, those of
fp4 as they are: twice the numbers that they stand for are looked up in a register. Their scales are exponents.

Rows are multiplied in one of two ways. As integers: a row is 256 * (its upper plane) + (its lower plane), two rows of
signed bytes, and the sums of a group are exact, so all instruction sets give the same bits. As floats: codes are
widened to fp32, and a group's products are added in one order. Either way the groups are added in fp32 in their order.
Blocking decides only whether a sum is kept in a register or in the cache meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import float32, types, uint64
from numba.core.cgutils import unpack_tuple
from numba.extending import intrinsic

from moray.kernels.cpu.epilogue import apply_epilogue
from moray.kernels.cpu.numba_intrinsics import inlined
from moray.kernels.cpu.quantized_panels import INTEGERS
from moray.kernels.cpu.vector_product import LINES_PER_STEP, PANEL, STEP_BYTES
from moray.kernels.cpu.vectors import (
    BYTE,
    F32,
    I32,
    I64,
    address_of,
    constant,
    dot_bytes,
    dot_small_bytes_avx2,
    emit_prefetch,
    fma,
    load,
    look_up,
    loop,
    offset,
    splat,
    store,
    variable,
    vector,
)

PLANES = 2  # planes of bytes that make up a row
BLOCK_ROWS = 36  # rows whose sums stay in the first-level cache together; a multiple of every form's `rows`
FEW_ROWS_STEPS = 64  # steps of a panel per pass with up to BLOCK_ROWS rows: 16 KB, which stay in the first-level cache
MANY_ROWS_STEPS = 512  # steps per pass with more rows: 128 KB, which stay in the second-level cache
SPAN_STEPS = 128  # steps of fp32 numbers that are added up before the sums of such spans, so that long sums stay exact
AHEAD_BYTES = 16384  # distance from the weights in use to those that are prefetched

FIRST, LAST = 1, 2  # flags of a pass: it is the first, or the last, of its group

Part = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Form:
    """States how a kernel multiplies rows with words of codes.

    lanes:    words in a vector
    vectors:  vectors of a row's sums, or of each of its planes' sums, that are in registers
    rows:     most rows whose sums are in registers
    parts:    functions that extract codes from words: as integers four codes in unsigned bytes, as floats one in fp32
    dot:      as integers (builder, sums, codes, x) -> the sums with the products added; as floats None
    is_e2m1:  codes are twice what they stand for, and scales are bytes, the exponents of powers of two plus 127
    """

    lanes: int
    vectors: int
    rows: int
    parts: tuple[Part, ...]
    dot: Callable[[Any, Any, Any, Any], Any] | None = None
    is_e2m1: bool = False

    @property
    def planes(self) -> int:
        """Return how many rows of numbers a row of x is."""
        return PLANES if self.dot else 1

    @property
    def number(self) -> Any:
        """Return the LLVM type of a sum, and of what is read of x at once."""
        return I32 if self.dot else F32


def _as_they_are(_: Any, words: Any) -> Any:
    return words


def _lower_halves(builder: Any, words: Any) -> Any:
    return builder.and_(words, constant(I32, words.type.count, 0x0F0F0F0F))


def _upper_halves(builder: Any, words: Any) -> Any:
    return _lower_halves(builder, builder.lshr(words, constant(I32, words.type.count, 4)))


def _lower_e2m1(builder: Any, words: Any) -> Any:
    return look_up(builder, INTEGERS, _lower_halves(builder, words))


def _upper_e2m1(builder: Any, words: Any) -> Any:
    return look_up(builder, INTEGERS, _upper_halves(builder, words))


def _byte_of(part: Part, byte: int) -> Part:
    """Return a function that extracts a byte of what a part extracts, as fp32."""
    return lambda builder, words: _bits(8 * byte, 0xFF)(builder, part(builder, words))


def _bits(first: int, mask: int) -> Part:
    """Return a function that extracts an unsigned code, whose lowest bit is `first`, as fp32."""

    def extract(builder: Any, words: Any) -> Any:
        lanes = words.type.count
        code = builder.and_(builder.lshr(words, constant(I32, lanes, first)), constant(I32, lanes, mask))
        return builder.sitofp(code, vector(F32, lanes))

    return extract


def _fp8(byte: int) -> Part:
    """Return a function that extracts an e4m3 code as fp32: its bits, moved to fp32's places, times 2**120."""

    def extract(builder: Any, words: Any) -> Any:
        lanes = words.type.count
        top = builder.shl(words, constant(I32, lanes, 24 - 8 * byte))
        sign = builder.and_(top, constant(I32, lanes, -(2**31)))
        rest = builder.and_(builder.lshr(top, constant(I32, lanes, 4)), constant(I32, lanes, 0x7F << 20))
        number = builder.bitcast(builder.or_(sign, rest), vector(F32, lanes))
        return builder.fmul(number, splat(builder, F32(2.0**120), lanes))

    return extract


BYTES = (_as_they_are,)
HALVES = (_lower_halves, _upper_halves)
E2M1 = (_lower_e2m1, _upper_e2m1)
BYTES_AS_FLOATS = tuple(_bits(8 * byte, 0xFF) for byte in range(4))
HALVES_AS_FLOATS = tuple(_bits(8 * byte + upper, 0xF) for upper in (0, 4) for byte in range(4))
E2M1_AS_FLOATS = tuple(_byte_of(part, byte) for part in E2M1 for byte in range(4))
FP8_AS_FLOATS = tuple(_fp8(byte) for byte in range(4))


class Operands(NamedTuple):
    """Says what a multiplier reads and writes: addresses, distances in bytes and numbers, all of 64 bits.

    w:           address of the first step
    x, x_stride: address of the first row (as integers: of its upper plane) at that step; bytes from row or plane to the
                 next
    num_steps:   how many steps
    ahead:       address from which weights are prefetched
    flags:       FIRST, LAST, both or neither
    sums:        address of the group's sums between its passes, [rows * planes, PANEL] int32 or fp32
    total:       address of the sums of all groups, [rows, PANEL] fp32
    scales:      address of the group's scales, [PANEL] fp32, or bytes of e2m1
    zeros:       address of what is subtracted from each output's codes: as floats [PANEL] fp32; as integers [PANEL]
                 bytes, or 0 if it is `zero` for all of them
    plane_sums:  address of the negative sum of the first plane in the group, int32 (as integers)
    sum_stride:  bytes from there to the next plane's
    """

    w: Any
    x: Any
    x_stride: Any
    num_steps: Any
    ahead: Any
    flags: Any
    sums: Any
    total: Any
    scales: Any
    zeros: Any
    zero: Any
    plane_sums: Any
    sum_stride: Any


def _multiplier(name: str, form: Form) -> Any:
    """Return the intrinsic `name` that multiplies 1..form.rows rows with some steps of a group of a panel.

    It takes the number of rows, the cache lines to prefetch per step (0, 1, 2 or 4), from `ahead` on, and Operands.
    """

    def multiply(_: Any, rows: Any, lines: Any, operands: Any) -> Any:
        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            rows, lines, packed = args
            found = Operands(*unpack_tuple(builder, packed))
            function = builder.function
            done = function.append_basic_block("multiplied")
            cases = builder.switch(builder.add(builder.mul(rows, I64(8)), lines), done)
            for num_rows in range(1, form.rows + 1):
                for num_lines in possible_lines(num_rows, form.rows, BLOCK_ROWS):
                    block = function.append_basic_block()
                    cases.add_case(I64(num_rows * 8 + num_lines), block)
                    builder.position_at_end(block)
                    _emit(builder, form, num_rows, num_lines, found)
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, operands), generate

    # Numba names machine code in its cache by the names of functions: with the same name for all, a kernel might get
    # the code that another process compiled for another form.
    multiply.__name__ = name
    return intrinsic(multiply)


def possible_lines(rows: int, max_rows: int, most: int) -> set[int]:
    """Return how many cache lines per step a block of `rows` rows may have to prefetch, see multiply_quantized.

    most: rows that are multiplied together, in blocks of up to max_rows
    """
    found = {0}
    for num_rows in range(rows, most + 1):
        blocks = -(-num_rows // max_rows)
        sizes = [num_rows * (i + 1) // blocks - num_rows * i // blocks for i in range(blocks)]
        shares = [LINES_PER_STEP * (i + 1) // blocks - LINES_PER_STEP * i // blocks for i in range(blocks)]
        found.update(share for size, share in zip(sizes, shares, strict=True) if size == rows)
    return found


def _emit(builder: Any, form: Form, rows: int, lines: int, given: Operands) -> None:
    """Emit the multiplication of `rows` rows with all columns of a panel, in blocks of columns that `form` defines."""
    block_bytes = form.lanes * form.vectors * 4  # bytes of a step that belong to a block of columns
    blocks = STEP_BYTES // block_bytes
    block_lines = -(-lines // blocks)
    planes = rows * form.planes
    x_planes = [builder.add(given.x, builder.mul(given.x_stride, I64(plane))) for plane in range(planes)]
    sum_places = [builder.add(given.plane_sums, builder.mul(given.sum_stride, I64(plane))) for plane in range(planes)]
    is_first = builder.icmp_unsigned("!=", builder.and_(given.flags, I64(FIRST)), I64(0))
    is_last = builder.icmp_unsigned("!=", builder.and_(given.flags, I64(LAST)), I64(0))
    with loop(builder, I64(blocks)) as block:
        start = builder.mul(block, I64(block_bytes))
        columns = _Columns(builder, form, builder.add(given.sums, start), builder.add(given.total, start))
        accumulators = [[variable(builder, columns.zero) for _ in range(form.vectors)] for _ in range(planes)]
        zeros_here = builder.add(given.zeros, start if form.dot is None else builder.lshr(start, I64(2)))
        with builder.if_else(is_first) as (first, later):
            with first:
                columns.start(accumulators, given.zeros, zeros_here, given.zero, sum_places)
            with later:
                columns.load_sums(accumulators)
        w_here = builder.add(given.w, start)
        ahead_here = builder.add(given.ahead, builder.mul(block, I64(64 * block_lines)))
        with loop(builder, given.num_steps) as step:
            w_at = builder.add(w_here, builder.mul(step, I64(STEP_BYTES)))
            ahead_at = builder.add(ahead_here, builder.mul(step, I64(64 * lines)))
            for line in range(block_lines):
                emit_prefetch(builder, offset(builder, ahead_at, 64 * line))
            x_at = builder.mul(step, I64(4 * len(form.parts)))
            columns.add_products(accumulators, w_at, [builder.add(plane, x_at) for plane in x_planes], zeros_here)
        with builder.if_else(is_last) as (last, not_yet):
            with last:
                of_block = builder.lshr(start, I64(2)) if form.is_e2m1 else start
                columns.add_to_total(accumulators, builder.add(given.scales, of_block))
            with not_yet:
                columns.store_sums(accumulators)


class _Columns:
    """Emits the parts of a product for the columns of one block. Accumulators are [planes][vectors] variables."""

    def __init__(self, builder: Any, form: Form, sums: Any, total: Any) -> None:
        self.builder, self.form, self.sums, self.total = builder, form, sums, total
        self.kind = vector(form.number, form.lanes)
        self.floats = vector(F32, form.lanes)
        self.zero = splat(builder, form.number(0), form.lanes)

    def place(self, address: Any, row: int, i: int) -> Any:
        """Return the address of vector i of a row of 32-bit numbers."""
        return offset(self.builder, address, row * STEP_BYTES + i * self.form.lanes * 4)

    def start(self, accumulators: Any, zeros: Any, zeros_here: Any, zero: Any, sum_places: list[Any]) -> None:
        """Set the sums to what a group starts with: as integers, to minus (what codes are too large by) times x."""
        if self.form.dot is None:
            for place in (place for row in accumulators for place in row):
                self.builder.store(self.zero, place)
            return
        negative = [load(self.builder, place, I32) for place in sum_places]
        by_output = self.builder.icmp_unsigned("!=", zeros, I64(0))
        with self.builder.if_else(by_output) as (some, none):
            with some:
                factors = [splat(self.builder, one, self.form.lanes) for one in negative]
                for i in range(self.form.vectors):
                    bytes_ = vector(BYTE, self.form.lanes)
                    at = offset(self.builder, zeros_here, i * self.form.lanes)
                    of_outputs = self.builder.zext(load(self.builder, at, bytes_), self.kind)
                    for factor, plane in zip(factors, accumulators, strict=True):
                        self.builder.store(self.builder.mul(of_outputs, factor), plane[i])
            with none:
                for one, plane in zip(negative, accumulators, strict=True):
                    product = self.builder.mul(one, self.builder.trunc(zero, I32))
                    for place in plane:
                        self.builder.store(splat(self.builder, product, self.form.lanes), place)

    def load_sums(self, accumulators: Any) -> None:
        for row, places in enumerate(accumulators):
            for i, place in enumerate(places):
                self.builder.store(load(self.builder, self.place(self.sums, row, i), self.kind), place)

    def store_sums(self, accumulators: Any) -> None:
        for row, places in enumerate(accumulators):
            for i, place in enumerate(places):
                store(self.builder, self.builder.load(place), self.place(self.sums, row, i))

    def add_products(self, accumulators: Any, w: Any, x_planes: list[Any], zeros: Any) -> None:
        """Add the products of one step."""
        builder, form = self.builder, self.form
        words = [load(builder, self.place(w, 0, i), vector(I32, form.lanes)) for i in range(form.vectors)]
        for p, part in enumerate(form.parts):
            codes = [part(builder, word) for word in words]
            if form.dot is None:
                codes = [
                    builder.fsub(code, load(builder, self.place(zeros, 0, i), self.floats))
                    for i, code in enumerate(codes)
                ]
            for x, places in zip(x_planes, accumulators, strict=True):
                factor = splat(builder, load(builder, offset(builder, x, 4 * p), form.number), form.lanes)
                for code, place in zip(codes, places, strict=True):
                    before = builder.load(place)
                    after = form.dot(builder, before, code, factor) if form.dot else fma(builder, code, factor, before)
                    builder.store(after, place)

    def scale(self, scales: Any, i: int) -> Any:
        """Return vector i of a group's scales."""
        builder, lanes = self.builder, self.form.lanes
        if not self.form.is_e2m1:
            return load(builder, self.place(scales, 0, i), self.floats)
        exponents = builder.zext(
            load(builder, offset(builder, scales, i * lanes), vector(BYTE, lanes)), vector(I32, lanes)
        )
        bits, least = builder.shl(exponents, constant(I32, lanes, 23)), constant(I32, lanes, 1 << 22)  # 2^-127
        return builder.bitcast(builder.select(builder.icmp_unsigned("<", bits, least), least, bits), self.floats)

    def add_to_total(self, accumulators: Any, scales: Any) -> None:
        """Add the sums of a group times its scales to the sums of all groups."""
        builder = self.builder
        base = splat(builder, F32(256.0), self.form.lanes)
        for i in range(self.form.vectors):
            scale = self.scale(scales, i)
            sums = [builder.load(places[i]) for places in accumulators]
            if self.form.dot:
                planes = [builder.sitofp(one, self.floats) for one in sums]
                sums = [fma(builder, planes[p], base, planes[p + 1]) for p in range(0, len(planes), PLANES)]
            if self.form.is_e2m1:
                sums = [builder.fmul(one, splat(builder, F32(0.5), self.form.lanes)) for one in sums]
            for row, one in enumerate(sums):
                at = self.place(self.total, row, i)
                store(builder, fma(builder, one, scale, load(builder, at, self.floats)), at)


multiply_bytes_512 = _multiplier("multiply_bytes_512", Form(16, 4, 3, BYTES, dot_bytes))
multiply_halves_512 = _multiplier("multiply_halves_512", Form(16, 4, 3, HALVES, dot_bytes))
multiply_e2m1_512 = _multiplier("multiply_e2m1_512", Form(16, 4, 3, E2M1, dot_bytes, is_e2m1=True))
multiply_bytes_256 = _multiplier("multiply_bytes_256", Form(8, 2, 3, BYTES, dot_bytes))
multiply_halves_256 = _multiplier("multiply_halves_256", Form(8, 2, 2, HALVES, dot_bytes))
multiply_e2m1_256 = _multiplier("multiply_e2m1_256", Form(8, 2, 2, E2M1, dot_bytes, is_e2m1=True))
multiply_e2m1_avx2 = _multiplier("multiply_e2m1_avx2", Form(8, 2, 2, E2M1, dot_small_bytes_avx2, is_e2m1=True))
multiply_byte_floats_512 = _multiplier("multiply_byte_floats_512", Form(16, 2, 4, BYTES_AS_FLOATS))
multiply_half_floats_512 = _multiplier("multiply_half_floats_512", Form(16, 2, 4, HALVES_AS_FLOATS))
multiply_e2m1_floats_512 = _multiplier("multiply_e2m1_floats_512", Form(16, 2, 4, E2M1_AS_FLOATS, is_e2m1=True))
multiply_fp8_floats_512 = _multiplier("multiply_fp8_floats_512", Form(16, 2, 4, FP8_AS_FLOATS))
multiply_byte_floats_256 = _multiplier("multiply_byte_floats_256", Form(8, 2, 4, BYTES_AS_FLOATS))
multiply_half_floats_256 = _multiplier("multiply_half_floats_256", Form(8, 2, 4, HALVES_AS_FLOATS))
multiply_e2m1_floats_256 = _multiplier("multiply_e2m1_floats_256", Form(8, 2, 4, E2M1_AS_FLOATS, is_e2m1=True))
multiply_fp8_floats_256 = _multiplier("multiply_fp8_floats_256", Form(8, 2, 4, FP8_AS_FLOATS))


# Inlined, so that LLVM optimizes it once. A function that is linked into another is optimized again there, and the
# result, which runs when it is loaded from the cache, was once wrong (docs/log.md).
@inlined
def multiply_quantized(
    multiply: Any,
    max_rows: int,
    planes: int,
    zero: int,
    weight: Any,
    rows: Any,
    result: Any,
    start: int,
    stop: int,
) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1.

    multiply:    an intrinsic of this file, for `max_rows` rows of `planes` planes
    zero:        what all codes are stored more than they are, where zeros is empty
    weight:      (w, scales, zeros, group_steps, lengths)
        w:           [panels, steps, PANEL, 4] bytes
        scales:      [panels, groups, PANEL] fp32, or bytes of e2m1
        zeros:       [panels, groups, PANEL] bytes: what codes are stored more than they are; or [0, 0, 0]
        group_steps: steps that share a scale
        lengths:     [panels, groups] fp64 for pair_product.py; or [0, 0]
    rows:        (xq, xs, plane_sums), see quantized_rows.py
    result:      (bias, activation, times, y), see epilogue.apply_epilogue
    """
    w, scales, zeros, group_steps, _ = weight
    xq, xs, plane_sums = rows
    bias, activation, times, y = result
    num_steps, num_groups = w.shape[1], scales.shape[1]
    used_steps = min(num_steps, num_groups * group_steps)  # padding may begin a group that has no scale
    as_floats = planes == 1
    run_steps = min(group_steps, SPAN_STEPS) if as_floats else group_steps
    plane_bytes = uint64(xq.shape[1] * xq.itemsize)
    x_step = plane_bytes // uint64(num_steps)
    steps_per_pass = FEW_ROWS_STEPS if len(y) <= BLOCK_ROWS else MANY_ROWS_STEPS
    total = np.empty((BLOCK_ROWS, PANEL), np.float32)
    sums = np.empty((BLOCK_ROWS * planes, PANEL), np.int32)
    float_zeros = np.empty(PANEL, np.float32)
    float_zeros[:] = float32(zero)
    sum_stride = uint64(plane_sums.shape[1] * 4)
    for panel in range(start, stop):
        for first in range(0, len(y), BLOCK_ROWS):
            num_rows = min(BLOCK_ROWS, len(y) - first)
            # Blocks are of about the same size, and each prefetches its share of what follows. Only the first rows need
            # that: for later ones the weights are in the cache.
            num_blocks = (num_rows + max_rows - 1) // max_rows
            to_fetch = LINES_PER_STEP if first == 0 else 0
            total[:num_rows] = float32(0.0)
            step = 0
            while step < used_steps:
                group = step // group_steps
                run_start = step - (step - group * group_steps) % run_steps
                run_stop = min(min(run_start + run_steps, (group + 1) * group_steps), used_steps)
                steps = min(steps_per_pass, run_stop - step)
                flags = (FIRST if step == run_start else 0) + (LAST if step + steps == run_stop else 0)
                at_group = uint64((panel * num_groups + group) * PANEL)
                zeros_at = uint64(0)
                if as_floats:
                    zeros_at = address_of(float_zeros)
                    if zeros.shape[0] > 0 and step == group * group_steps:
                        for column in range(uint64(PANEL)):
                            float_zeros[column] = float32(zeros[panel, group, column])
                elif zeros.shape[0] > 0:
                    zeros_at = address_of(zeros) + at_group
                scales_at = address_of(scales) + at_group * uint64(scales.itemsize)
                block_w = address_of(w) + uint64((panel * num_steps + step) * STEP_BYTES)
                ahead = block_w + uint64(AHEAD_BYTES)
                for block in range(num_blocks):
                    row = num_rows * block // num_blocks
                    block_rows = num_rows * (block + 1) // num_blocks - row
                    lines = to_fetch * (block + 1) // num_blocks - to_fetch * block // num_blocks
                    plane = uint64((first + row) * planes)
                    operands = Operands(
                        w=block_w,
                        x=address_of(xq) + plane * plane_bytes + uint64(step) * x_step,
                        x_stride=plane_bytes,
                        num_steps=uint64(steps),
                        ahead=ahead,
                        flags=uint64(flags),
                        sums=address_of(sums) + uint64(row * planes * STEP_BYTES),
                        total=address_of(total) + uint64(row * STEP_BYTES),
                        scales=scales_at,
                        zeros=zeros_at,
                        zero=uint64(zero),
                        plane_sums=address_of(plane_sums) + plane * sum_stride + uint64(4 * group),
                        sum_stride=sum_stride,
                    )
                    multiply(uint64(block_rows), uint64(lines), operands)
                    ahead += uint64(lines * 64 * steps)
                step += steps
            for row in range(uint64(num_rows)):
                for column in range(uint64(PANEL)):
                    total[row, column] *= xs[uint64(first) + row]
            apply_epilogue(total, bias, activation, times, y, uint64(first), uint64(panel * PANEL), uint64(num_rows))
