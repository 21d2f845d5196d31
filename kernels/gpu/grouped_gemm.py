"""What the two GEMMs of the experts share: which part of the work a program does, and the shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Variant
from kernels.gpu.tiles import Key, tiles_in_use


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a model, for which kernels are compiled ahead of time and tiles tuned."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    is_gated: bool

    @property
    def up(self) -> Key:
        n = self.intermediate_size * (2 if self.is_gated else 1)
        return Key(n, self.hidden_size, self.dtype, self.num_experts)

    @property
    def down(self) -> Key:
        return Key(self.hidden_size, self.intermediate_size, self.dtype, self.num_experts)


SHAPES = [
    ExpertShape("phi-3.5-moe", 16, 4096, 6400, torch.bfloat16, True),
    ExpertShape("phixtral-4x2_8", 4, 2560, 10240, torch.float16, False),
    ExpertShape("mixtral-8x7b", 8, 4096, 14336, torch.bfloat16, True),
]


@triton.jit
def locate(tile_experts, expert_tiles, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's expert (-1: none), row block and column block.

    An expert's programs stand together, NUM_N to a row block. Among them row blocks change fastest, GROUP_M at a time:
    so a block of weights is read from memory once and the rows, few by comparison, are read again from the L2 cache.
    """
    pid = tl.program_id(0)
    row_block = pid // NUM_N
    column_block = pid % NUM_N
    expert = tl.load(tile_experts + row_block)
    if expert >= 0:
        first = tl.load(expert_tiles + expert)
        count = tl.load(expert_tiles + expert + 1) - first
        place = pid - first * NUM_N
        group = place // (GROUP_M * NUM_N)
        size = tl.minimum(count - group * GROUP_M, GROUP_M)
        place = place % (GROUP_M * NUM_N)
        row_block = first + group * GROUP_M + place % size
        column_block = place // size
    return expert, row_block, column_block


def gemm_variants(op: str, kernel: Any, signature: Mapping[str, str], is_up: bool) -> list[Variant]:
    """The kernel as each model launches it, for every tile in use. A type "*model" becomes the model's dtype.

    A tile that two models share, which differ in sizes alone, is listed once.
    """
    variants: dict[object, Variant] = {}
    for shape in SHAPES:
        key = shape.up if is_up else shape.down
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[shape.dtype]
        types = {name: kind.replace("model", dtype) for name, kind in signature.items()}
        constexprs: dict[str, Any] = {"N": key.n, "K": key.k}
        if is_up:
            constexprs |= {"TOP_K": 2, "IS_GATED": shape.is_gated}
        if shape.is_gated:  # those models have no biases
            constexprs["bias"] = None
        for target in (80, 90):
            for tile in tiles_in_use(op, key, divmod(target, 10)):
                blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
                name = f"{op} {shape.name} {tile.block_m}x{tile.block_n}x{tile.block_k}"
                variant = Variant(
                    f"{name} w{tile.num_warps} s{tile.num_stages}",
                    kernel,
                    types,
                    constexprs | blocks | {"GROUP_M": tile.group_m},
                    tile.num_warps,
                    tile.num_stages,
                    wants_wgmma=True,
                    targets=(target,),
                )
                variants.setdefault((dtype, shape.is_gated, target, tile), variant)
    return list(variants.values())
