"""The second GEMM of the experts: multiply each row by its routing weight and scatter it back to token order."""

import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.gemm_tile import gemm_tile
from moray.kernels.gpu.grouped_gemm import gemm_variants, locate, offsets_of
from moray.kernels.gpu.packed_weight import PackedWeight, as_packed
from moray.kernels.gpu.quantize_rows import multiplied_rows, multiplied_rows_ref
from moray.kernels.gpu.route import Routing
from moray.kernels.gpu.sizes import cdiv
from moray.kernels.gpu.tuning import Gpu, TileConfig, select_tile


def experts_down(
    hidden: Tensor,
    down: Tensor | PackedWeight,
    routing: Routing,
    bias: Tensor | None,
    tile: TileConfig | None = None,
    *,
    in_order: bool = False,
) -> Tensor:
    """Return (down hidden + bias) * routing weight, in fp32, rounded once; `combine` adds up the rows of a token.

    hidden:   [len(routing.sorted_rows), intermediate_size], in the order of sorted_rows, or if in_order
              [num_tokens * top_k, intermediate_size]
    down:     [num_experts, hidden_size, intermediate_size], dense or packed
    bias:     [num_experts, hidden_size] or None
    tile:     None = the tuned or default tile
    in_order: as experts_up was told
    returns:  [num_tokens * top_k, hidden_size]; zeros for padding tokens
    """
    down = as_packed(down)
    assert hidden.is_contiguous() and down.weight.is_contiguous(), "experts read contiguous rows"
    n, k = down.sizes.n, down.sizes.k
    num_assignments = routing.topk_ids.numel()
    tile = tile or select_tile("experts_down", down.key(hidden.dtype), num_assignments)
    out = hidden.new_empty(num_assignments, n)
    codes, hidden_scales = multiplied_rows(hidden, down)
    _experts_down_kernel[(len(routing.tile_experts) * cdiv(n, tile.block_n),)](
        codes,
        hidden_scales,
        down.weight,
        down.scales,
        down.zeros,
        bias,
        routing.topk_weights,
        routing.sorted_rows,
        routing.tile_experts,
        routing.expert_tiles,
        out,
        num_assignments,
        N=n,
        K=k,
        BLOCK_M=routing.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        IN_ORDER=in_order,
        FORMAT=down.format,
        GROUP_SIZE=down.group_size,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit(do_not_specialize=["num_assignments"])
def _experts_down_kernel(
    hidden,
    hidden_scales,
    down,
    scales,
    zeros,
    bias,
    topk_weights,
    sorted_rows,
    tile_experts,
    expert_tiles,
    out,
    num_assignments,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    expert, row_block, column_block = locate(tile_experts, expert_tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    first_row = row_block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    assignments = tl.load(sorted_rows + rows)
    is_assignment = assignments < num_assignments
    if expert < 0:  # a tile with rows of padding tokens, if any
        zero = tl.zeros([BLOCK_N, BLOCK_M], out.dtype.element_ty)
        _scatter(out, zero, assignments, columns, num_assignments, N)
        return
    # Rows without an assignment were never written, so read the tile's first row, which was.
    if IN_ORDER:
        clamped_rows = tl.where(is_assignment, assignments, tl.load(sorted_rows + first_row)).to(tl.int64)
    else:
        clamped_rows = tl.where(is_assignment, rows, first_row).to(tl.int64)
    clamped = tl.minimum(columns, N - 1)
    weight_offset, scales_offset = offsets_of(expert, N, K, BLOCK_K, FORMAT, GROUP_SIZE)
    total = gemm_tile(
        down + weight_offset,
        None if scales is None else scales + scales_offset,
        None if zeros is None else zeros + scales_offset,
        clamped,
        hidden,
        hidden_scales,
        clamped_rows,
        N,
        K,
        K,
        FORMAT,
        GROUP_SIZE,
        K % BLOCK_K == 0,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if bias is not None:
        total += tl.load(bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)[:, None]
    total *= tl.load(topk_weights + assignments, mask=is_assignment, other=0.0)[None, :]
    _scatter(out, total.to(out.dtype.element_ty), assignments, columns, num_assignments, N)


@triton.jit
def _scatter(out, values, assignments, columns, num_assignments, N: tl.constexpr):
    """Store values, [columns, assignments]: addresses are computed here, where no loop needs the registers."""
    offsets = assignments.to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(out + offsets, values, mask=(columns < N)[:, None] & (assignments < num_assignments)[None, :])


def experts_down_ref(
    hidden: Tensor,
    down: Tensor | PackedWeight,
    routing: Routing,
    bias: Tensor | None,
    tile: TileConfig | None = None,
    *,
    in_order: bool = False,
) -> Tensor:
    """Compute `experts_down` slowly and obviously, one row at a time, in fp32."""
    down = as_packed(down)
    num_assignments = routing.topk_ids.numel()
    out = hidden.new_zeros(num_assignments, down.sizes.n)
    weights, inputs = down.dequantize(), multiplied_rows_ref(hidden, down)
    for row, assignment in enumerate(routing.sorted_rows.tolist()):
        expert = int(routing.tile_experts[row // routing.block_m])
        if expert < 0 or assignment == num_assignments:
            continue
        product = weights[expert] @ inputs[assignment if in_order else row]
        product = product if bias is None else product + bias[expert].float()
        out[assignment] = product * routing.topk_weights.flatten()[assignment]
    return out


def aot_variants(gpu: Gpu) -> list[Variant]:
    signature = {
        **dict.fromkeys(["bias", "out"], "*model:16"),
        **dict.fromkeys(["sorted_rows", "tile_experts", "expert_tiles"], "*i32:16"),
        "topk_weights": "*fp32:16",
        "num_assignments": "i32",
    }
    operands = {"x": "hidden", "x_scales": "hidden_scales", "weight": "down"}
    return gemm_variants("experts_down", _experts_down_kernel, operands, signature, is_up=False, gpu=gpu)
