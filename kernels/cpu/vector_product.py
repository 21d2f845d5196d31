"""Multiply rows with panels of 64 weights on vectors.

A sum stays in fp32, and its inputs are added in the same order whatever the rows, the number of rows and the number of
threads. Blocking decides only whether a sum is kept in a register or in the cache meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.extending import intrinsic

from moray.kernels.cpu.vectors import (
    F32,
    I32,
    I64,
    dot_bf16,
    emit_prefetch,
    even_bf16,
    even_f16,
    fma,
    load,
    loop,
    odd_bf16,
    odd_f16,
    offset,
    splat,
    store,
    variable,
    vector,
)

PANEL = 64  # output features in a panel
STEP_BYTES = 4 * PANEL  # bytes of a step of a panel: one 32-bit word per feature, which is two inputs, or one in fp32
LINES_PER_STEP = STEP_BYTES // 64  # cache lines in a step
MAX_ROWS = 6  # maximum rows that are multiplied at once, with their sums in registers
FOUR = (4,) * MAX_ROWS  # of 16 lanes: a whole panel
FEWER = (8, 4, 2, 2, 2, 2)  # of 8 lanes, which there are 16 of: as many sums as keep the multipliers busy


@dataclass(frozen=True)
class VectorForm:
    """States how a kernel multiplies rows with words of weights.

    lanes:    numbers in a vector
    vectors:  vectors of a row's sums that are in registers, for 1..MAX_ROWS rows
    word:     LLVM type of a value of x
    parts:    functions that extract a vector from words of weights; the first vector is multiplied with x's first value
              of a step, the second with its second
    add:      (builder, sums, weights, x) -> the sums with the products added
    """

    lanes: int
    vectors: tuple[int, ...]
    word: Any
    parts: tuple[Callable[[Any, Any], Any], ...]
    add: Callable[[Any, Any, Any, Any], Any]


def _fma(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    return fma(builder, weights, x, sums)


def _as_they_are(_: Any, words: Any) -> Any:
    return words


def _as_fp32(builder: Any, words: Any) -> Any:
    return builder.bitcast(words, vector(F32, words.type.count))


def _multiplier(name: str, form: VectorForm) -> Any:
    """Return the intrinsic `name`(rows, lines, w, x, x_stride, sums, num_steps, ahead).

    It adds the products of some steps of a panel to the sums of 1..MAX_ROWS rows.

    lines:     cache lines to prefetch per step, from `ahead` on: 0, 1, 2 or 4
    w:         address of the first step in the panel
    x:         address of the first row at that step
    x_stride:  bytes from row to row
    sums:      address of the sums, [rows, PANEL] fp32
    """

    def multiply(
        _: Any, rows: Any, lines: Any, w: Any, x: Any, x_stride: Any, sums: Any, num_steps: Any, ahead: Any
    ) -> Any:
        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            rows, lines, *rest = args
            function = builder.function
            done = function.append_basic_block("multiplied")
            choice = builder.mul(rows, I64(8))
            choice = builder.add(choice, lines)
            cases = builder.switch(choice, done)
            for num_rows in range(1, MAX_ROWS + 1):
                for num_lines in (0, 1, 2, 4) if num_rows == MAX_ROWS else (0, 4):
                    block = function.append_basic_block()
                    cases.add_case(I64(num_rows * 8 + num_lines), block)
                    builder.position_at_end(block)
                    _emit(builder, form, num_rows, num_lines, *rest)
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 8), generate

    # Numba names machine code in its cache by the names of functions: with the same name for all, a kernel might get
    # the code that another process compiled for another form.
    multiply.__name__ = name
    return intrinsic(multiply)


def _emit(
    builder: Any,
    form: VectorForm,
    rows: int,
    lines: int,
    w: Any,
    x: Any,
    x_stride: Any,
    sums: Any,
    num_steps: Any,
    ahead: Any,
) -> None:
    """Emit the multiplication of `rows` rows with all columns of a panel, in groups of columns that `form` defines."""
    vectors = form.vectors[rows - 1]
    group_bytes = form.lanes * vectors * 4  # bytes of a step that belong to a group
    groups = STEP_BYTES // group_bytes
    lines_per_group = -(-lines // groups)
    x_rows = [builder.add(x, builder.mul(x_stride, I64(row))) for row in range(rows)]
    with loop(builder, I64(groups)) as group:
        start = builder.mul(group, I64(group_bytes))
        # Lines are prefetched in the order of their addresses, which the hardware's prefetcher follows.
        bytes_ahead = builder.mul(num_steps, I64(64 * lines // groups))
        group_ahead = builder.add(ahead, builder.mul(group, bytes_ahead))
        group_addresses = builder.add(w, start), builder.add(sums, start), group_ahead
        _emit_group(builder, form, vectors, 64 * lines // groups, lines_per_group, x_rows, num_steps, *group_addresses)


def _emit_group(
    builder: Any,
    form: VectorForm,
    vectors: int,
    bytes_per_step: int,
    lines_per_group: int,
    x_rows: list[Any],
    num_steps: Any,
    w: Any,
    sums: Any,
    ahead: Any,
) -> None:
    width = form.lanes * 4
    addresses = [
        [offset(builder, sums, row * STEP_BYTES + i * width) for i in range(vectors)] for row in range(len(x_rows))
    ]
    accumulators = [
        [variable(builder, load(builder, at, vector(F32, form.lanes))) for at in row_addresses]
        for row_addresses in addresses
    ]
    with loop(builder, num_steps) as step:
        w_at = builder.add(w, builder.mul(step, I64(STEP_BYTES)))
        x_at = builder.mul(step, I64(4 * len(form.parts)))
        ahead_at = builder.add(ahead, builder.mul(step, I64(bytes_per_step)))
        for line in range(lines_per_group):
            emit_prefetch(builder, offset(builder, ahead_at, 64 * line))
        words = [load(builder, offset(builder, w_at, i * width), vector(I32, form.lanes)) for i in range(vectors)]
        for p, part in enumerate(form.parts):
            weights = [part(builder, word) for word in words]
            for x_row, row_sums in zip(x_rows, accumulators, strict=True):
                one = load(builder, offset(builder, builder.add(x_row, x_at), 4 * p), form.word)
                factor = splat(builder, one, form.lanes)
                for place, weight in zip(row_sums, weights, strict=True):
                    builder.store(form.add(builder, builder.load(place), weight, factor), place)
    for row_addresses, row_sums in zip(addresses, accumulators, strict=True):
        for at, place in zip(row_addresses, row_sums, strict=True):
            store(builder, builder.load(place), at)


multiply_bf16 = _multiplier("multiply_bf16", VectorForm(16, FOUR, I32, (_as_they_are,), dot_bf16))
multiply_bf16_512 = _multiplier("multiply_bf16_512", VectorForm(16, FOUR, F32, (even_bf16, odd_bf16), _fma))
multiply_f16_512 = _multiplier("multiply_f16_512", VectorForm(16, FOUR, F32, (even_f16, odd_f16), _fma))
multiply_fp32_512 = _multiplier("multiply_fp32_512", VectorForm(16, FOUR, F32, (_as_fp32,), _fma))
multiply_bf16_256 = _multiplier("multiply_bf16_256", VectorForm(8, FEWER, F32, (even_bf16, odd_bf16), _fma))
multiply_f16_256 = _multiplier("multiply_f16_256", VectorForm(8, FEWER, F32, (even_f16, odd_f16), _fma))
multiply_fp32_256 = _multiplier("multiply_fp32_256", VectorForm(8, FEWER, F32, (_as_fp32,), _fma))
