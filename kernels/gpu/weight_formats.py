"""The formats of weights that the GEMMs multiply, and their sizes. gemm_tile.py says what they are."""

from typing import Literal, get_args

PackedFormat = Literal["int8", "int4", "fp8", "fp4", "fp8_fp8"]
Format = Literal["dense", PackedFormat]
PACKED_FORMATS: tuple[PackedFormat, ...] = get_args(PackedFormat)

CODE_BITS: dict[PackedFormat, int] = {"int8": 8, "int4": 4, "fp8": 8, "fp4": 4, "fp8_fp8": 8}
# Inputs that a program multiplies at a time, whatever the tile: the layout in memory depends on it.
PACKED_BLOCK_K: dict[PackedFormat, int] = {"int8": 128, "int4": 128, "fp8": 128, "fp4": 128, "fp8_fp8": 128}
