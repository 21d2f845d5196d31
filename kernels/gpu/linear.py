"""Linear layers whose rows do not depend, bit by bit, on the other rows.

How the sum over k is split depends on the shape of the whole weight alone: neither on the number of rows, nor on how
many of the weight's outputs a rank has.
"""

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.gemm_tile import gemm_tile
from moray.kernels.gpu.grouped_gemm import (
    ON_LOAD,
    POINTERS,
    QUANTIZED,
    QuantizedCase,
    case_label,
    is_multiplied,
    operand_types,
)
from moray.kernels.gpu.packed_weight import PackedWeight, as_packed
from moray.kernels.gpu.quantize_rows import multiplied_rows, multiplied_rows_ref
from moray.kernels.gpu.sizes import cdiv, next_power_of_2
from moray.kernels.gpu.tuning import Gpu, Key, TileConfig, select_tile, tiles_in_use

SUM_BLOCK = 512  # outputs per program of the kernel that adds up splits
MIN_UNSPLIT_FEATURES = 64  # a weight with fewer rows fills too few programs unless the sum over k is split
MIN_SPLIT_LENGTH = 256  # a split of the sum over k is at least this long


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    tile: TileConfig | None = None,
    num_outputs: int | None = None,
) -> Tensor:
    """Return x @ weight.T + bias, summed in fp32 and rounded once.

    x:           [num_tokens, in_features], contiguous
    weight:      [out_features, in_features], contiguous, or packed
    bias:        [out_features] or None
    tile:        None = the tuned or default tile
    num_outputs: of the whole weight, of which this one has some; None = all of them
    returns:     [num_tokens, out_features], dtype of x
    """
    packed = as_packed(weight)
    assert x.is_contiguous() and packed.weight.is_contiguous(), "linear reads contiguous rows"
    num_tokens, n, k = x.shape[0], packed.sizes.n, packed.sizes.k
    num_outputs = num_outputs or n
    y = x.new_empty(num_tokens, n)
    if num_tokens == 0:
        return y
    tile = _narrowed(tile or select_tile("linear", packed.key(x.dtype), num_tokens), num_outputs)
    num_splits = count_splits(num_outputs, k, tile.block_k) if packed.format == "dense" else 1
    parts = y if num_splits == 1 else x.new_empty(num_splits, num_tokens, n, dtype=torch.float32)
    codes, x_scales = multiplied_rows(x, packed)
    _linear_kernel[(cdiv(num_tokens, tile.block_m) * cdiv(n, tile.block_n), num_splits)](
        codes,
        x_scales,
        packed.weight,
        packed.scales,
        packed.zeros,
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
        FORMAT=packed.format,
        GROUP_SIZE=packed.group_size,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _sum_kernel[(cdiv(y.numel(), SUM_BLOCK),)](parts, bias, y, y.numel(), n, num_splits, SUM_BLOCK)
    return y


@cache
def count_splits(n: int, k: int, block_k: int) -> int:
    """Return into how many equal parts the sum over k of a whole weight, [n, k], is split."""
    splits = 1
    while n < MIN_UNSPLIT_FEATURES and k % (2 * splits * block_k) == 0 and k // (2 * splits) >= MIN_SPLIT_LENGTH:
        splits *= 2
    return splits


@cache
def _narrowed(tile: TileConfig, n: int) -> TileConfig:
    """Return the tile, no wider than a small whole weight, of n outputs; tl.dot needs a width of at least 16.

    A part gets the width of the whole: the width decides which MMA instruction is used.
    """
    return replace(tile, block_n=min(tile.block_n, max(16, next_power_of_2(n))))


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,
    x_scales,
    weight,
    scales,
    zeros,
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
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Compute y[split], the sum of x times weight over `length` values of k. IS_EVEN: whether BLOCK_K divides K."""
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    column_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    # GROUP_M neighbouring row blocks use a block of weights while it is in the L2 cache.
    group = pid // (GROUP_M * column_blocks)
    index = pid % (GROUP_M * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    rows = (group * GROUP_M + index % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = index // size * BLOCK_N + tl.arange(0, BLOCK_N)

    # Outside the bounds, read the last row again and store nothing: masks in the loop over k would cost more.
    clamped_rows = tl.minimum(rows, num_tokens - 1).to(tl.int64)
    clamped = tl.minimum(columns, N - 1).to(tl.int64)
    first_k = split * length
    total = gemm_tile(
        weight + first_k,
        scales,
        zeros,
        clamped,
        x + first_k,
        x_scales,
        clamped_rows,
        N,
        K,
        length,
        FORMAT,
        GROUP_SIZE,
        IS_EVEN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    total = tl.trans(total)

    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    stored = y + (split * num_tokens + rows.to(tl.int64))[:, None] * N + columns[None, :]
    tl.store(stored, total.to(y.dtype.element_ty), mask=(rows < num_tokens)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(parts, bias, y, size, N, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute y, the sum of parts, [NUM_SPLITS, size], in their order, and of the bias."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + split * size.to(tl.int64) + offsets, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + offsets % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=inside)


def linear_ref(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    tile: TileConfig | None = None,
    num_outputs: int | None = None,
) -> Tensor:
    """Compute `linear` slowly and obviously, in fp64."""
    packed = as_packed(weight)
    y = multiplied_rows_ref(x, packed).double() @ packed.dequantize()[0].double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return every tile with bf16 and a bias (Phi-3.5-MoE), and some with fp16 (phixtral), fp32 or without a bias.

    Without a bias are Mixtral's layers and the routers. One vocabulary is not divisible by 16, as in models with added
    tokens. Sizes are arguments, so layers of one dtype and format share programs.
    """
    shapes: dict[str, tuple[int, int, torch.dtype, bool, QuantizedCase | None]] = {
        "qkv_phi": (6144, 4096, torch.bfloat16, True, None),
        "router_phi": (16, 4096, torch.bfloat16, False, None),
        "qkv_phixtral": (7680, 2560, torch.float16, True, None),
        "router_phixtral": (4, 2560, torch.float16, False, None),
        "router_gpt_oss": (32, 2880, torch.bfloat16, True, None),
        "lm_head_32002": (32002, 4096, torch.bfloat16, False, None),
        "qkv_phi_fp32": (6144, 4096, torch.float32, True, None),
        "router_phi_fp32": (16, 4096, torch.float32, False, None),
    }
    shapes |= {f"qkv_phi{case_label(case)}": (6144, 4096, torch.bfloat16, True, case) for case in QUANTIZED}
    shapes |= {f"qkv_phixtral{case_label(case)}": (7680, 2560, torch.float16, True, case) for case in ON_LOAD}
    variants = []
    for name, (n, k, dtype, has_bias, case) in shapes.items():
        key = Key(n, k, dtype) if case is None else Key(n, k, dtype, 1, case.format, case.group_size)
        if not is_multiplied(key.format, gpu):
            continue
        pointer = f"*{POINTERS[dtype]}:16"
        types, missing = operand_types(dtype, case)
        sizes = {"num_tokens": "i32", "N": "i32:16" if n % 16 == 0 else "i32", "K": "i32:16", "length": "i32:16"}
        for tile in dict.fromkeys(_narrowed(tile, n) for tile in tiles_in_use("linear", key, gpu)):
            y = "*fp32:16" if count_splits(n, k, tile.block_k) > 1 else pointer
            blocks = {
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
            }
            constexprs = blocks | {"IS_EVEN": k % tile.block_k == 0} | missing | ({} if has_bias else {"bias": None})
            variant = Variant(
                f"linear {name} {tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}",
                _linear_kernel,
                types | {"bias": pointer, "y": y} | sizes,
                constexprs | {"FORMAT": key.format, "GROUP_SIZE": key.group_size},
                tile.num_warps,
                tile.num_stages,
                wants_wgmma=n >= MIN_UNSPLIT_FEATURES and dtype != torch.float32,
            )
            variants.append(variant)
    for name, pointer in (("bf16", "*bf16:16"), ("fp16", "*fp16:16"), ("fp32", "*fp32:16")):
        signature = {"parts": "*fp32:16", "y": pointer, "size": "i32", "N": "i32:16"}
        constexprs = {"bias": None, "NUM_SPLITS": 16, "BLOCK": SUM_BLOCK}
        label = f"linear sum of splits {name}"
        variants.append(Variant(label, _sum_kernel, signature, constexprs, has_wide_loads=False))
    return variants
