"""The operations of moray.kernels.cpu.tiles in plain memory, as Intel's manual defines them.

The register file is an array of 32-bit words: the configuration, then eight tiles of 16 rows of 16 words. Its last word
records that an operation had shapes or tile numbers that the CPU would reject.
"""

from typing import Any

import numba
import numpy as np
from numba import float32, int8, int64, types, uint32, uint64
from numba.extending import intrinsic

from moray.kernels.cpu import vectors
from moray.kernels.cpu.numba_intrinsics import as_bits, as_float
from moray.kernels.cpu.quantized_tiles import multiply_quantized_tiles
from moray.kernels.cpu.tile_product import multiply_tiles

CONFIG_WORDS, TILE_WORDS, ROW_WORDS = 16, 256, 16
REFUSED = CONFIG_WORDS + 8 * TILE_WORDS
FILE_WORDS = REFUSED + 1

part = numba.njit(error_model="numpy")


@intrinsic
def peek(_: Any, address: Any) -> Any:
    return types.uint32(types.uint64), lambda _, builder, __, args: vectors.load(builder, args[0], vectors.I32)


@intrinsic
def poke(_: Any, address: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        vectors.store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint32), generate


@part
def configure(file: Any, config: Any) -> None:
    for word in range(CONFIG_WORDS):
        file[word] = peek(config + uint64(4 * word))
    file[CONFIG_WORDS:REFUSED] = 0
    for tile in range(8):
        if file[0] & 0xFF != 1 or not 0 < rows_of(file, tile) <= 16 or words_of(file, tile) != ROW_WORDS:
            file[REFUSED] = 1


@part
def rows_of(file: Any, tile: int) -> Any:
    return (file[12 + tile // 4] >> uint32(8 * (tile % 4))) & uint32(0xFF)


@part
def words_of(file: Any, tile: int) -> Any:
    return ((file[4 + tile // 2] >> uint32(16 * (tile % 2))) & uint32(0xFFFF)) // uint32(4)


@part
def at(tile: int, row: int, word: int) -> int:
    return CONFIG_WORDS + tile * TILE_WORDS + row * ROW_WORDS + word


@part
def release(file: Any) -> None:
    file[:CONFIG_WORDS] = 0


@part
def zero(file: Any, tile: int) -> None:
    for word in range(TILE_WORDS):
        file[at(tile, 0, word)] = 0


@part
def read(file: Any, tile: int, address: Any, stride: Any) -> None:
    if rows_of(file, tile) == 0:
        file[REFUSED] = 1
    zero(file, tile)
    for row in range(rows_of(file, tile)):
        for word in range(words_of(file, tile)):
            file[at(tile, row, word)] = peek(address + uint64(row) * stride + uint64(4 * word))


@part
def write(file: Any, tile: int, address: Any, stride: Any) -> None:
    if rows_of(file, tile) == 0:
        file[REFUSED] = 1
    for row in range(rows_of(file, tile)):
        for word in range(words_of(file, tile)):
            poke(address + uint64(row) * stride + uint64(4 * word), file[at(tile, row, word)])


@part
def flushed(x: Any) -> Any:
    """Return x, or zero if it is denormal."""
    return x if abs(x) >= float32(1.17549435e-38) or x != x else float32(0.0) * x


@part
def product(a: Any, b: Any, upper: bool) -> Any:
    """Return the product of the lower or the upper bf16 of two words."""
    if upper:
        a, b = a & uint32(0xFFFF0000), b & uint32(0xFFFF0000)
    else:
        a, b = uint32(a << uint32(16)), uint32(b << uint32(16))
    return flushed(flushed(as_float(uint32(a))) * flushed(as_float(uint32(b))))


@part
def dot_bf16(file: Any, sums: int, a: int, b: int) -> None:
    if rows_of(file, sums) != rows_of(file, a) or words_of(file, a) != rows_of(file, b):
        file[REFUSED] = 1
    for m in range(rows_of(file, sums)):
        for n in range(words_of(file, sums)):
            lower, upper = float32(0.0), float32(0.0)
            for k in range(words_of(file, a)):
                x, y = file[at(a, m, k)], file[at(b, k, n)]
                lower = flushed(lower + product(x, y, False))
                upper = flushed(upper + product(x, y, True))
            total = as_float(file[at(sums, m, n)]) + flushed(lower + upper)
            file[at(sums, m, n)] = as_bits(flushed(total))


@part
def byte_of(word: Any, index: int) -> Any:
    return (word >> uint32(8 * index)) & uint32(0xFF)


@part
def dot_bytes(file: Any, sums: int, a: int, b: int) -> None:
    if rows_of(file, sums) != rows_of(file, a) or words_of(file, a) != rows_of(file, b):
        file[REFUSED] = 1
    for m in range(rows_of(file, sums)):
        for n in range(words_of(file, sums)):
            total = int64(file[at(sums, m, n)])
            for k in range(words_of(file, a)):
                for index in range(4):
                    signed = int64(int8(byte_of(file[at(a, m, k)], index)))
                    total += signed * int64(byte_of(file[at(b, k, n)], index))
            file[at(sums, m, n)] = uint32(total)


@numba.njit(nogil=True, error_model="numpy")
def multiply_quantized_emulated(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    """Run the AMX kernel of quantized.KERNELS on emulated tiles; what the CPU would reject makes all of y NaN."""
    file = np.zeros(FILE_WORDS, np.uint32)
    multiply_quantized_tiles(
        configure, zero, read, dot_bytes, write, release, file, 128, weight, rows, result, start, stop
    )
    if file[REFUSED]:
        result[3][:] = 0x7FC0


@numba.njit(nogil=True, error_model="numpy")
def multiply_emulated(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    """Run the AMX kernel of panels.KERNELS on emulated tiles; what the CPU would reject makes all of y NaN."""
    file = np.zeros(FILE_WORDS, np.uint32)
    multiply_tiles(configure, zero, read, dot_bf16, write, release, file, w, x, bias, activation, times, y, start, stop)
    if file[REFUSED]:
        y[:] = 0x7FC0
