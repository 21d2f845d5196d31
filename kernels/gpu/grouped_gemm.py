"""Shared by the two GEMMs of the experts: the mapping of programs to work, and the shapes that are compiled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.tuning import Gpu, Key, tiles_in_use


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a model whose kernels are compiled ahead of time and whose tiles are tuned."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    is_gated: bool

    @property
    def up(self) -> Key:
        """The weight of the first GEMM."""
        n = self.intermediate_size * (2 if self.is_gated else 1)
        return Key(n, self.hidden_size, self.dtype, self.num_experts)

    @property
    def down(self) -> Key:
        """The weight of the second GEMM."""
        return Key(self.hidden_size, self.intermediate_size, self.dtype, self.num_experts)


SHAPES = [
    ExpertShape("phi-3.5-moe", 16, 4096, 6400, torch.bfloat16, True),
    ExpertShape("phixtral-4x2_8", 4, 2560, 10240, torch.float16, False),
    ExpertShape("mixtral-8x7b", 8, 4096, 14336, torch.bfloat16, True),
]
# Compiled ahead of time but not tuned: the small relatives of Phi-3.5-MoE, and fp32 for each kind of expert.
OTHER_SHAPES = [
    ExpertShape("phi-mini-moe", 16, 4096, 960, torch.bfloat16, True),
    ExpertShape("phi-tiny-moe", 16, 4096, 448, torch.bfloat16, True),
    ExpertShape("phi-3.5-moe fp32", 16, 4096, 6400, torch.float32, True),
    ExpertShape("phixtral-4x2_8 fp32", 4, 2560, 10240, torch.float32, False),
]
POINTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def locate(tile_experts, expert_tiles, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return this program's expert (-1 = none), row block and column block.

    The programs of an expert are consecutive, NUM_N per row block. Among them the row block changes fastest, in groups
    of
    GROUP_M: a block of weights is read from memory once, and the rows, which are few by comparison, are read again from
             the
    L2 cache.
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
def of_expert(
    expert,
    weight,
    scales,
    zeros,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Return the expert's weight, scales and zeros, as gemm_tile reads them."""
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if FORMAT == "dense" or FORMAT == "fp8_fp8":
        weight += expert.to(tl.int64) * N * K
    else:
        weight += expert.to(tl.int64) * N * (BLOCKS * BLOCK_K * (4 if FORMAT == "int4" else 8) // 32)
    if FORMAT != "dense":
        NUM_GROUPS: tl.constexpr = (BLOCKS * BLOCK_K + GROUP_SIZE - 1) // GROUP_SIZE if GROUP_SIZE else 1
        scales += expert * (NUM_GROUPS * N)
        if zeros is not None:
            zeros += expert * (NUM_GROUPS * N)
    return weight, scales, zeros


def gemm_variants(op: str, kernel: Any, signature: Mapping[str, str], is_up: bool, gpu: Gpu) -> list[Variant]:
    """Return the kernel as each model launches it on this GPU, for every tile in use.

    A type "*model" in the signature becomes the model's dtype. If two models use a tile and differ in sizes alone, it
    is listed once; whether tiles divide the sum over k does not count as a size.
    """
    variants: dict[object, Variant] = {}
    for shape in [*SHAPES, *OTHER_SHAPES]:
        key = shape.up if is_up else shape.down
        dtype = POINTERS[shape.dtype]
        types = {name: kind.replace("model", dtype) for name, kind in signature.items()}
        constexprs: dict[str, Any] = {"N": key.n, "K": key.k}
        if is_up:
            constexprs |= {"TOP_K": 2, "IS_GATED": shape.is_gated}
        if shape.is_gated:  # models with gated experts have no biases
            constexprs["bias"] = None
        for tile in tiles_in_use(op, key, gpu):
            blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
            name = f"{op} {shape.name} {tile.block_m}x{tile.block_n}x{tile.block_k}"
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
            variants.setdefault((dtype, shape.is_gated, is_even, tile), variant)
    return list(variants.values())
