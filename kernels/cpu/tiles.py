"""AMX tile registers in functions that Numba compiles: eight tiles of up to 16 rows of 64 bytes each.

The first argument of each operation represents the register file. The CPU does not need it; the tests' implementation
in plain memory keeps the tiles there.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from moray.kernels.cpu.vectors import BYTE, call, pointer

TILE_ROWS = 16  # most rows of a tile
TILE_BYTES = 64  # bytes of a row of a tile
CONFIG_BYTES = 64  # bytes of a configuration of all tiles
# Offsets in the configuration: the palette, the bytes of each tile's rows (16 bits each), the rows of each tile.
PALETTE_AT, BYTES_AT, ROWS_AT = 0, 16, 48


def _emit(context: Any, builder: Any, name: str, *args: Any) -> Any:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *args)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def configure(_: Any, file: Any, config: Any) -> Any:
    """Set the shapes of all tiles from CONFIG_BYTES at the address `config`; the tiles become zero."""

    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        return _emit(context, builder, "ldtilecfg", pointer(builder, args[1], BYTE))

    return types.void(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def release(_: Any, file: Any) -> Any:
    """Release the tiles, so that a context switch need not save them."""
    return types.void(types.uint64), lambda context, builder, _, __: _emit(context, builder, "tilerelease")


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def zero(_: Any, file: Any, tile: Any) -> Any:
    """Set a tile to zero."""
    number = BYTE(tile.literal_value)
    return types.void(types.uint64, tile), lambda context, builder, _, __: _emit(context, builder, "tilezero", number)


def _mover(name: str) -> Any:
    @intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
    def move(_: Any, file: Any, tile: Any, address: Any, stride: Any) -> Any:
        number = BYTE(tile.literal_value)

        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            return _emit(context, builder, name, number, pointer(builder, args[2], BYTE), args[3])

        return types.void(types.uint64, tile, types.uint64, types.uint64), generate

    return move


# read(file, tile, address, stride) and write(file, tile, address, stride) copy rows that are `stride` bytes apart.
read, write = _mover("tileloadd64"), _mover("tilestored64")


def _dot(name: str) -> Any:
    @intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
    def dot(_: Any, file: Any, sums: Any, a: Any, b: Any) -> Any:
        numbers = [BYTE(tile.literal_value) for tile in (sums, a, b)]

        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            return _emit(context, builder, name, *numbers)

        return types.void(types.uint64, sums, a, b), generate

    return dot


# dot_bf16(file, sums, a, b) adds a's rows of bf16 pairs times b's columns of bf16 pairs to the fp32 sums; denormals
# count as zero. dot_bytes does the same for a's signed and b's unsigned bytes, in fours, and int32 sums, which wrap.
dot_bf16, dot_bytes = _dot("tdpbf16ps"), _dot("tdpbsud")


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def shape_tile(config: Any, tile: int, rows: int) -> None:
    """Set a tile's shape, `rows` rows of 64 bytes, in a configuration, an array of CONFIG_BYTES bytes."""
    config[PALETTE_AT] = 1
    config[BYTES_AT + 2 * tile] = TILE_BYTES
    config[ROWS_AT + tile] = rows
