"""The first GEMM of the experts: gather each expert's tokens, multiply, and apply the activation before storing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.activation import ALPHA, Activation, activate_ref
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.gemm_tile import gemm_tile
from moray.kernels.gpu.grouped_gemm import gemm_variants, locate, offsets_of
from moray.kernels.gpu.packed_weight import PackedWeight, as_packed
from moray.kernels.gpu.quantize_rows import multiplied_rows, multiplied_rows_ref
from moray.kernels.gpu.route import Routing
from moray.kernels.gpu.sizes import cdiv
from moray.kernels.gpu.tuning import Gpu, TileConfig, select_tile

GATE_FACTOR = tl.constexpr(ALPHA)
ROWS_TOGETHER = 8  # rows of the gate that are next to each other, before as many of up


def experts_up(
    x: Tensor,
    up: Tensor | PackedWeight,
    routing: Routing,
    bias: Tensor | None,
    activation: Activation,
    tile: TileConfig | None = None,
    *,
    in_order: bool = False,
) -> Tensor:
    """Return the activation of (up x + bias) for each assignment, rounded once.

    x:        [num_tokens, hidden_size]
    up:       [num_experts, 2 * intermediate_size, hidden_size], with rows in the order of `interleave`, if gated;
              [num_experts, intermediate_size, hidden_size] if not; dense or packed
    bias:     [num_experts, rows of up] in the order of these rows, or None
    tile:     None = the tuned or default tile
    in_order: put the rows in the order of the assignments, without those that pad the experts' tiles. They are fewer to
              send to other ranks; experts_down must then be told so.
    returns:  [len(routing.sorted_rows), intermediate_size], in the order of sorted_rows, or if in_order
              [num_tokens * top_k, intermediate_size]; rows without an assignment to an expert are undefined
    """
    up, is_gated = as_packed(up), activation.is_gated
    assert x.is_contiguous() and up.weight.is_contiguous(), "experts read contiguous rows"
    n, k = up.sizes.n, up.sizes.k
    assert not is_gated or n % (2 * ROWS_TOGETHER) == 0, f"gate and up are interleaved in eights; {n} rows are not"
    tile = tile or select_tile("experts_up", up.key(x.dtype), routing.topk_ids.numel())
    num_rows = routing.topk_ids.numel() if in_order else len(routing.sorted_rows)
    hidden = x.new_empty(num_rows, n // 2 if is_gated else n)
    codes, x_scales = multiplied_rows(x, up)
    _experts_up_kernel[(len(routing.tile_experts) * cdiv(n, tile.block_n),)](
        codes,
        x_scales,
        up.weight,
        up.scales,
        up.zeros,
        bias,
        routing.sorted_rows,
        routing.tile_experts,
        routing.expert_tiles,
        hidden,
        x.shape[0],
        TOP_K=routing.topk_ids.shape[1],
        N=n,
        K=k,
        BLOCK_M=routing.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        ACTIVATION=activation.kind,
        LIMIT=activation.limit,
        IN_ORDER=in_order,
        FORMAT=up.format,
        GROUP_SIZE=up.group_size,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return hidden


@triton.jit(do_not_specialize=["num_tokens"])
def _experts_up_kernel(
    x,
    x_scales,
    up,
    scales,
    zeros,
    bias,
    sorted_rows,
    tile_experts,
    expert_tiles,
    hidden,
    num_tokens,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    IS_GATED: tl.constexpr = ACTIVATION != "gelu"
    WIDTH: tl.constexpr = N // 2 if IS_GATED else N
    expert, row_block, column_block = locate(tile_experts, expert_tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    if expert < 0:
        return
    rows = tl.arange(0, BLOCK_M)
    assignments = tl.load(sorted_rows + row_block * BLOCK_M + rows)
    # Outside the bounds, read valid memory and store nothing: masks in the loop over k would cost more.
    tokens = tl.minimum(assignments // TOP_K, num_tokens - 1).to(tl.int64)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.minimum(columns, N - 1)
    weight_offset, scales_offset = offsets_of(expert, N, K, BLOCK_K, FORMAT, GROUP_SIZE)
    total = gemm_tile(
        up + weight_offset,
        None if scales is None else scales + scales_offset,
        None if zeros is None else zeros + scales_offset,
        clamped,
        x,
        x_scales,
        tokens,
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
    if IS_GATED:
        in_eights = tl.permute(tl.reshape(total, [BLOCK_N // 16, 2, 8, BLOCK_M]), [0, 2, 3, 1])
        gate, linear = tl.split(in_eights)
        gate, linear = tl.reshape(gate, [BLOCK_N // 2, BLOCK_M]), tl.reshape(linear, [BLOCK_N // 2, BLOCK_M])
        if ACTIVATION == "clamped_swiglu":
            gate = tl.where(gate > LIMIT, LIMIT, gate)  # these comparisons keep NaN
            linear = tl.where(linear > LIMIT, LIMIT, linear)
            linear = tl.where(linear < -LIMIT, -LIMIT, linear) + 1.0
            result = gate * tl.sigmoid(gate * GATE_FACTOR) * linear
        else:
            result = gate * tl.sigmoid(gate) * linear
        columns = column_block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        # x * (1 + tanh(u)) / 2 is x * sigmoid(2u).
        result = total * tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    is_stored = (columns < WIDTH)[:, None] & (assignments < num_tokens * TOP_K)[None, :]
    result = result.to(hidden.dtype.element_ty)
    if IN_ORDER:
        tl.store(hidden + assignments.to(tl.int64)[None, :] * WIDTH + columns[:, None], result, mask=is_stored)
    else:
        tile = hidden + row_block.to(tl.int64) * BLOCK_M * WIDTH  # offsets in the tile fit in 32 bits
        tl.store(tile + rows[None, :] * WIDTH + columns[:, None], result, mask=is_stored)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Interleave eight rows of the gate with eight rows of up: the MMA gives rows that are 8 apart to the same thread.

    gate, up: [.., intermediate_size, hidden_size]; returns [.., 2 * intermediate_size, hidden_size]
    """
    eights = [part.unflatten(-2, (-1, ROWS_TOGETHER)) for part in (gate, up)]
    return torch.stack(eights, dim=-3).flatten(-4, -2)


def experts_up_ref(
    x: Tensor,
    up: Tensor | PackedWeight,
    routing: Routing,
    bias: Tensor | None,
    activation: Activation,
    tile: TileConfig | None = None,
    *,
    in_order: bool = False,
) -> Tensor:
    """Compute `experts_up` slowly and obviously, one row at a time, in fp32; undefined rows are zeros."""
    up = as_packed(up)
    num_assignments, top_k = routing.topk_ids.numel(), routing.topk_ids.shape[1]
    num_rows = num_assignments if in_order else len(routing.sorted_rows)
    is_gated = activation.is_gated
    hidden = x.new_zeros(num_rows, up.sizes.n // 2 if is_gated else up.sizes.n)
    weights, inputs = up.dequantize(), multiplied_rows_ref(x, up)
    for row, assignment in enumerate(routing.sorted_rows.tolist()):
        expert = int(routing.tile_experts[row // routing.block_m])
        if expert < 0 or assignment == num_assignments:
            continue
        product = weights[expert] @ inputs[assignment // top_k]
        product = product if bias is None else product + bias[expert].float()
        if is_gated:  # back from the order of `interleave`
            product = product.view(-1, 2, ROWS_TOGETHER).transpose(0, 1).flatten()
        hidden[assignment if in_order else row] = activate_ref(activation, product)
    return hidden


def aot_variants(gpu: Gpu) -> list[Variant]:
    signature = {
        **dict.fromkeys(["bias", "hidden"], "*model:16"),
        **dict.fromkeys(["sorted_rows", "tile_experts", "expert_tiles"], "*i32:16"),
        "num_tokens": "i32",
    }
    return gemm_variants("experts_up", _experts_up_kernel, {"weight": "up"}, signature, is_up=True, gpu=gpu)
