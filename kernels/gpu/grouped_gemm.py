"""Shared by the two GEMMs of the experts: the mapping of programs to work, and the shapes that are compiled."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from moray.kernels.activation import GELU, SWIGLU, Activation
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.tuning import Gpu, Key, tiles_in_use
from moray.kernels.gpu.weight_formats import Format, PackedFormat


@dataclass(frozen=True)
class ExpertShape:
    """Describes the experts of a model whose kernels are compiled ahead of time and whose tiles are tuned."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    activation: Activation = SWIGLU
    has_bias: bool = False

    @property
    def is_gated(self) -> bool:
        """Return whether the first GEMM has the outputs of a gate too."""
        return self.activation.is_gated

    @property
    def up(self) -> Key:
        """Return the weight of the first GEMM."""
        n = self.intermediate_size * (2 if self.is_gated else 1)
        return Key(n, self.hidden_size, self.dtype, self.num_experts)

    @property
    def down(self) -> Key:
        """Return the weight of the second GEMM."""
        return Key(self.hidden_size, self.intermediate_size, self.dtype, self.num_experts)


SHAPES = [
    ExpertShape("phi-3.5-moe", 16, 4096, 6400, torch.bfloat16),
    ExpertShape("phixtral-4x2_8", 4, 2560, 10240, torch.float16, GELU, has_bias=True),
    ExpertShape("mixtral-8x7b", 8, 4096, 14336, torch.bfloat16),
]
GPT_OSS = ExpertShape("gpt-oss-20b", 32, 2880, 2880, torch.bfloat16, Activation("clamped_swiglu", 7.0), has_bias=True)
# Compiled ahead of time but not tuned: small experts, one that all tokens go through, and fp32 for each kind of expert.
OTHER_SHAPES = [
    ExpertShape("phi-mini-moe", 16, 4096, 960, torch.bfloat16),
    ExpertShape("phi-tiny-moe", 16, 4096, 448, torch.bfloat16),
    ExpertShape("qwen3-30b-a3b", 128, 2048, 768, torch.bfloat16),
    ExpertShape("granite-3.1-1b-a400m", 32, 1024, 512, torch.bfloat16),
    ExpertShape("olmoe-1b-7b", 64, 2048, 1024, torch.bfloat16),
    ExpertShape("qwen1.5-moe-a2.7b", 60, 2048, 1408, torch.bfloat16),
    ExpertShape("qwen1.5-moe-a2.7b shared", 1, 2048, 5632, torch.bfloat16),
    GPT_OSS,
    ExpertShape("phi-3.5-moe fp32", 16, 4096, 6400, torch.float32),
    ExpertShape("phixtral-4x2_8 fp32", 4, 2560, 10240, torch.float32, GELU, has_bias=True),
]
POINTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def locate(tile_experts, expert_tiles, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return this program's expert (-1 = none), row block and column block.

    The programs of an expert are consecutive, NUM_N per row block. Among them the row block changes fastest, in groups
    of GROUP_M: a block of weights is read from memory once, and the rows, which are few by comparison, are read again
    from the L2 cache.
    """
    pid = tl.program_id(0)
    row_block = pid // NUM_N
    column_block = pid % NUM_N
    expert = tl.load(tile_experts + row_block)
    if expert >= 0:
        first = tl.load(expert_tiles + expert)
        count = tl.load(expert_tiles + expert + 1) - first
        index = pid - first * NUM_N
        group = index // (GROUP_M * NUM_N)
        size = tl.minimum(count - group * GROUP_M, GROUP_M)
        index = index % (GROUP_M * NUM_N)
        row_block = first + group * GROUP_M + index % size
        column_block = index // size
    return expert, row_block, column_block


@triton.jit
def offsets_of(
    expert,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Return where the expert's weight begins, int64, and where its scales and zeros do."""
    PADDED: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    if FORMAT == "dense" or FORMAT == "fp8_fp8":
        weight = expert.to(tl.int64) * N * K
    else:
        weight = expert.to(tl.int64) * N * (PADDED * (4 if FORMAT == "int4" or FORMAT == "fp4" else 8) // 32)
    scales = expert * N
    if GROUP_SIZE != 0:
        scales *= (PADDED + GROUP_SIZE - 1) // GROUP_SIZE
    return weight, scales


@dataclass(frozen=True)
class QuantizedCase:
    """Names a format of quantized weights that kernels are compiled ahead of time for."""

    format: PackedFormat
    group_size: int = 0
    has_zeros: bool = False


# What on_load.py makes, and the most demanding of what checkpoints have.
ON_LOAD = [QuantizedCase("int8"), QuantizedCase("int4", 128), QuantizedCase("fp8")]
QUANTIZED = [
    *ON_LOAD,
    QuantizedCase("int8", 128, has_zeros=True),
    QuantizedCase("int4", 32, has_zeros=True),
    QuantizedCase("fp8", 128),
    QuantizedCase("fp8_fp8"),
    QuantizedCase("fp8_fp8", 128),
]
MXFP4 = QuantizedCase("fp4", 32)
QUANTIZED_SHAPES = [
    *((SHAPES[0], case) for case in QUANTIZED),
    *((SHAPES[1], case) for case in ON_LOAD),
    (OTHER_SHAPES[0], QuantizedCase("int8")),  # no block divides 960 inputs
    (GPT_OSS, MXFP4),  # nor 2,880
]
# With rows in the order of the assignments, as ranks send them.
IN_ORDER_SHAPES: list[tuple[ExpertShape, QuantizedCase | None]] = [(SHAPES[0], None), (SHAPES[0], ON_LOAD[1])]


def is_multiplied(format: Format, gpu: Gpu) -> bool:
    """Return whether the GPU can multiply weights of this format: e4m3 by e4m3 needs units for it."""
    return format != "fp8_fp8" or gpu.capability >= (8, 9)


def operand_types(dtype: torch.dtype, case: QuantizedCase | None) -> tuple[dict[str, str], dict[str, None]]:
    """Return the types of a GEMM's operands, and the operands that are None: x, x_scales, weight, scales, zeros."""
    pointer = f"*{POINTERS[dtype]}:16"
    types = {"x": pointer, "x_scales": "*fp32:16", "weight": pointer, "scales": "*fp32:16", "zeros": "*i8:16"}
    missing = ["x_scales", "scales", "zeros"]
    if case is not None:
        types["weight"] = "*i32:16"
        missing = ["x_scales", *([] if case.has_zeros else ["zeros"])]
        if case.format == "fp4":
            types["scales"] = "*u8:16"
        if case.format == "fp8_fp8":
            types["x"] = types["weight"] = "*fp8e4nv:16"
            missing = ["zeros"]
    return types, dict.fromkeys(missing)


def gemm_variants(
    op: str, kernel: Any, operands: Mapping[str, str], signature: Mapping[str, str], is_up: bool, gpu: Gpu
) -> list[Variant]:
    """Return the kernel as each model launches it on this GPU, for every tile in use.

    A type "*model" in the signature becomes the model's dtype. If two models use a tile and differ in sizes alone, it
    is listed once; whether tiles divide the sum over k does not count as a size.

    operands: name that operand_types has for an operand -> the kernel's
    """
    variants: dict[object, Variant] = {}
    cases = [*((shape, None) for shape in [*SHAPES, *OTHER_SHAPES]), *QUANTIZED_SHAPES]
    of_ranks = [(*case, True) for case in IN_ORDER_SHAPES]
    for shape, case, in_order in [*((*case, False) for case in cases), *of_ranks]:
        key = shape.up if is_up else shape.down
        if case is not None:
            if not is_multiplied(case.format, gpu):
                continue
            key = replace(key, format=case.format, group_size=case.group_size)
        dtype = POINTERS[shape.dtype]
        types, missing = operand_types(shape.dtype, case)
        types = {operands.get(name, name): kind for name, kind in types.items()}
        types |= {name: kind.replace("model", dtype) for name, kind in signature.items()}
        constexprs: dict[str, Any] = {"N": key.n, "K": key.k, "FORMAT": key.format, "GROUP_SIZE": key.group_size}
        constexprs["IN_ORDER"] = in_order
        constexprs |= {operands.get(name, name): None for name in missing}
        if is_up:
            constexprs |= {"TOP_K": 2, "ACTIVATION": shape.activation.kind, "LIMIT": shape.activation.limit}
        if not shape.has_bias:
            constexprs["bias"] = None
        for tile in tiles_in_use(op, key, gpu):
            blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
            name = f"{op} {shape.name}{case_label(case)}{' in order' if in_order else ''}"
            name += f" {tile.block_m}x{tile.block_n}x{tile.block_k}"
            variant = Variant(
                f"{name} w{tile.num_warps} s{tile.num_stages}",
                kernel,
                types,
                constexprs | blocks | {"GROUP_M": tile.group_m},
                tile.num_warps,
                tile.num_stages,
                wants_wgmma=shape.dtype != torch.float32,
            )
            is_even = key.k % tile.block_k == 0, key.n % tile.block_n == 0
            variants.setdefault((dtype, shape.activation, shape.has_bias, is_even, tile, case, in_order), variant)
    return list(variants.values())


def case_label(case: QuantizedCase | None) -> str:
    """Return the part of a variant's name that says how its weights are quantized."""
    if case is None:
        return ""
    groups = f" g{case.group_size}" if case.group_size else ""
    return f" {case.format}{groups}{' zeros' if case.has_zeros else ''}"
