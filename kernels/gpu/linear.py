"""Dense linear layers whose rows do not depend, bit by bit, on the rows around them.

The sum over k is cut by the weight's shape alone, whatever the number of rows.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.aot import Variant
from kernels.gpu.product import multiply
from kernels.gpu.tiles import Key, Tile, choose, tiles_in_use

SUM_BLOCK = 512
SPLIT_BELOW = 64  # weights with fewer rows than this occupy too few programs unless the sum over k is split
SHORTEST_SPLIT = 256


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """x @ weight.T + bias, summed in fp32 and rounded once.

    x:       [num_tokens, in_features], contiguous
    weight:  [out_features, in_features], contiguous
    bias:    [out_features] or None
    returns: [num_tokens, out_features], dtype of x
    """
    assert x.is_contiguous() and weight.is_contiguous(), "linear reads contiguous rows"
    (num_tokens, k), n = x.shape, weight.shape[0]
    y = x.new_empty(num_tokens, n)
    if num_tokens == 0:
        return y
    tile = _narrowed(tile or choose("linear", Key(n, k, x.dtype), num_tokens), n)
    num_splits = count_splits(n, k, tile.block_k)
    parts = y if num_splits == 1 else x.new_empty(num_splits, num_tokens, n, dtype=torch.float32)
    _linear_kernel[(triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(n, tile.block_n), num_splits)](
        x,
        weight,
        bias if num_splits == 1 else None,
        parts,
        num_tokens,
        n,
        k,
        k // num_splits,
        IS_EVEN=k % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _sum_kernel[(triton.cdiv(y.numel(), SUM_BLOCK),)](parts, bias, y, y.numel(), n, num_splits, SUM_BLOCK)
    return y


def count_splits(n: int, k: int, block_k: int) -> int:
    """Into how many equal parts the sum over k is cut: fixed by the weight, whatever the number of rows."""
    splits = 1
    while n < SPLIT_BELOW and k % (2 * splits * block_k) == 0 and k // (2 * splits) >= SHORTEST_SPLIT:
        splits *= 2
    return splits


def _narrowed(tile: Tile, n: int) -> Tile:
    """No wider than a small weight; tl.dot takes 16 or more."""
    return replace(tile, block_n=min(tile.block_n, max(16, triton.next_power_of_2(n))))


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,
    weight,
    bias,
    y,
    num_tokens,
    N,
    K,
    length,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[split] = the sum of x times weight over `length` of k. IS_EVEN: whether BLOCK_K divides K."""
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    column_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    # GROUP_M neighbouring row blocks take a block of weights while it is in the L2 cache.
    group = pid // (GROUP_M * column_blocks)
    place = pid % (GROUP_M * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    rows = (group * GROUP_M + place % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = place // size * BLOCK_N + tl.arange(0, BLOCK_N)

    # Past the edges, read the last row again and store nothing: masks in the loop over k would cost more.
    from_rows = tl.minimum(rows, num_tokens - 1).to(tl.int64)
    held = tl.minimum(columns, N - 1).to(tl.int64)
    skipped = split * length
    total = multiply(weight + skipped, held, x + skipped, from_rows, K, length, IS_EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    total = tl.trans(total)

    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    stored = y + (split * num_tokens + rows.to(tl.int64))[:, None] * N + columns[None, :]
    tl.store(stored, total.to(y.dtype.element_ty), mask=(rows < num_tokens)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(parts, bias, y, size, N, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of parts, [NUM_SPLITS, size], in their order, and the bias."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + split * size.to(tl.int64) + places, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + places % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """Slow and obvious `linear`, in fp64."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def aot_variants() -> list[Variant]:
    """Every tile with bf16 and a bias (Phi-3.5-MoE), some with fp16 (phixtral) or without a bias (Mixtral, routers).

    Sizes are arguments, so layers of one dtype share programs.
    """
    shapes = {
        "qkv_phi": (6144, 4096, torch.bfloat16, True),
        "router_phi": (16, 4096, torch.bfloat16, False),
        "qkv_phixtral": (7680, 2560, torch.float16, True),
    }
    variants = []
    sizes = {"num_tokens": "i32", "N": "i32:16", "K": "i32:16", "length": "i32:16"}
    for name, (n, k, dtype, has_bias) in shapes.items():
        pointer = "*bf16:16" if dtype == torch.bfloat16 else "*fp16:16"
        for target in (80, 90):
            tiles = tiles_in_use("linear", Key(n, k, dtype), divmod(target, 10))
            for tile in dict.fromkeys(_narrowed(tile, n) for tile in tiles):
                y = "*fp32:16" if count_splits(n, k, tile.block_k) > 1 else pointer
                blocks = {
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "GROUP_M": tile.group_m,
                }
                variant = Variant(
                    f"linear {name} {tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}",
                    _linear_kernel,
                    dict.fromkeys(("x", "weight", "bias"), pointer) | {"y": y} | sizes,
                    blocks | {"IS_EVEN": k % tile.block_k == 0} | ({} if has_bias else {"bias": None}),
                    tile.num_warps,
                    tile.num_stages,
                    wants_wgmma=n >= SPLIT_BELOW,
                    targets=(target,),
                )
                variants.append(variant)
    signature = {"parts": "*fp32:16", "y": "*bf16:16", "size": "i32", "N": "i32:16"}
    constexprs = {"bias": None, "NUM_SPLITS": 16, "BLOCK": SUM_BLOCK}
    return [*variants, Variant("linear sum of splits", _sum_kernel, signature, constexprs, has_wide_loads=False)]
