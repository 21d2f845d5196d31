"""Run vLLM's experts as a peer: its Triton kernel, cut from its wheel by cut_fused_moe.py, in its order of work.

For what vLLM does in CUDA around the kernel our own kernels are used, which are no slower: `route` sorts,
`_silu_and_mul` is the activation, `combine` sums over a token's slots. Tiles are ours, or those of vLLM's rule for
shapes without a table, which its users get for the shapes measured here.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.route import Routing
from moray.kernels.gpu.tuning import TileConfig

PEERS = Path(__file__).resolve().parents[2] / ".peers"
KERNEL = PEERS / "vllm_fused_moe.py"


@cache
def kernel() -> Any:
    """Return the jit function. Raises FileNotFoundError where it was not cut out."""
    if not KERNEL.exists():
        raise FileNotFoundError(f"{KERNEL} is not there; python benchmarks/gpu/cut_fused_moe.py WHEEL makes it")
    spec = importlib.util.spec_from_file_location("vllm_fused_moe", KERNEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


def rule(num_tokens: int, num_experts: int) -> TileConfig:
    """Return the tile of vLLM 0.24.0 for 16-bit experts where it has no table."""
    block_m = 16 if num_tokens <= 32 else 32 if num_tokens <= 96 else 64 if num_tokens <= 512 else 128
    return TileConfig(
        block_m=block_m,
        block_n=64 if num_tokens <= 64 else 128,
        block_k=128 if num_tokens <= 64 else 64,
        group_m=16 if num_tokens // num_experts > 128 else 1,
        num_warps=4 if num_tokens <= 128 else 8,
        num_stages=4 if num_tokens <= 32 else 3,
    )


def gemm(
    x: Tensor, weight: Tensor, routing: Routing, out: Tensor, tile: TileConfig, *, top_k: int, is_down: bool
) -> None:
    """Compute out[a] = weight[expert of a] x[a // top_k] for each assignment a, times its routing weight if is_down.

    x: [.., k]; weight: [num_experts, n, k]; out: [num_assignments, n]; tile.block_m must be routing.block_m
    """
    num_assignments, (_, n, k) = len(out), weight.shape
    block_m, padded = routing.block_m, len(routing.sorted_rows)
    if routing.topk_ids.shape[0] < block_m:
        padded = min(padded, num_assignments * block_m)
    dtype = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    kernel()[(triton.cdiv(padded, block_m) * triton.cdiv(n, tile.block_n),)](
        x,
        weight,
        out,
        None,
        None,
        None,
        routing.topk_weights,
        routing.sorted_rows,
        routing.tile_experts,
        _constant(padded, x.device),
        n,
        k,
        padded,
        num_assignments,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(2),
        weight.stride(1),
        out.stride(0),
        out.stride(1),
        *[0] * 7,
        0,
        0,
        naive_block_assignment=False,
        BLOCK_SIZE_M=block_m,
        BLOCK_SIZE_N=tile.block_n,
        BLOCK_SIZE_K=tile.block_k,
        GROUP_SIZE_M=tile.group_m,
        SPLIT_K=1,
        MUL_ROUTED_WEIGHT=is_down,
        top_k=1 if is_down else top_k,
        compute_type=dtype,
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        per_channel_quant=False,
        HAS_BIAS=False,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@cache
def _constant(value: int, device: torch.device) -> Tensor:
    """Return the number of rows of the sorted list as a tensor, as the kernel needs it.

    Tiles after those of the last expert are marked with -1 and end early.
    """
    return torch.tensor([value], dtype=torch.int32, device=device)


def up(x: Tensor, weight: Tensor, routing: Routing, tile: TileConfig) -> Tensor:
    """Run both halves of the first GEMM, gate first, and return silu(gate) * up: [num_assignments, n / 2]."""
    num_assignments, top_k = routing.topk_ids.numel(), routing.topk_ids.shape[1]
    both = x.new_empty(num_assignments, weight.shape[1])
    gemm(x, weight, routing, both, tile, top_k=top_k, is_down=False)
    hidden = x.new_empty(num_assignments, weight.shape[1] // 2)
    grid = (num_assignments, triton.cdiv(hidden.shape[1], 1024))
    _silu_and_mul[grid](both, hidden, hidden.shape[1], BLOCK=1024)
    return hidden


def down(hidden: Tensor, weight: Tensor, routing: Routing, tile: TileConfig) -> Tensor:
    """Run the second GEMM; return its rows in the order of the tokens: [num_assignments, n]."""
    rows = hidden.new_empty(len(hidden), weight.shape[1])
    gemm(hidden, weight, routing, rows, tile, top_k=1, is_down=True)
    return rows


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul(both, hidden, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(both + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    linear = tl.load(both + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        hidden + row * width + columns, (gate * tl.sigmoid(gate) * linear).to(hidden.dtype.element_ty), mask=inside
    )
