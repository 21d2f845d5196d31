"""Routing: router logits -> experts and weights a token, and tokens sorted by expert for the experts' GEMMs."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu.route import softmax_topk_ref, sparsemixer_ref
from kernels.gpu.aot import Variant

# Programs hold [assignments, experts] in registers: so many elements at once. What fits one program takes one launch.
LARGEST_PROGRAM = 16384
USUAL_PROGRAM = 4096


@dataclass(frozen=True)
class Routing:
    """Assignments (token * top_k + slot) by expert, each expert's filled up to whole tiles of block_m rows.

    topk_weights: [num_tokens, top_k] fp32; 0 for padding tokens
    topk_ids:     [num_tokens, top_k] int32; -1 for padding tokens
    sorted_rows:  [max_tiles * block_m] int32: assignments; num_tokens * top_k where a tile is not full
    tile_experts: [max_tiles] int32: each tile's expert; -1 for the tiles behind, where padding tokens stand
    expert_tiles: [num_experts + 1] int32: each expert's first tile, then the number of tiles that have an expert
    """

    topk_weights: Tensor
    topk_ids: Tensor
    sorted_rows: Tensor
    tile_experts: Tensor
    expert_tiles: Tensor
    block_m: int


def route(
    router_logits: Tensor,
    *,
    method: Literal["sparsemixer", "softmax"],
    top_k: int,
    jitter: float,
    block_m: int,
    num_tokens: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
) -> Routing:
    """Choose experts as kernels/cpu/route.py does and sort by them, assignments of an expert in ascending order.

    The sizes of what is returned follow from the arguments' sizes alone, for the worst case.

    router_logits: [rows, num_experts], rounded to the model's dtype
    num_tokens:    [1] int32 on the device: rows from there on are padding and go to no expert; None: no padding
    tokens_per_expert: [num_experts] int64, added to in place
    """
    assert method == "softmax" or top_k == 2, f"sparsemixer chooses 2 experts, not {top_k}"
    assert router_logits.is_contiguous(), "route reads contiguous rows"
    rows, num_experts = router_logits.shape
    max_tiles = _max_tiles(rows * top_k, num_experts + (num_tokens is not None), block_m)
    new = router_logits.new_empty
    routing = Routing(
        topk_weights=new(rows, top_k, dtype=torch.float32),
        topk_ids=new(rows, top_k, dtype=torch.int32),
        sorted_rows=new(max_tiles * block_m, dtype=torch.int32),
        tile_experts=new(max_tiles, dtype=torch.int32),
        expert_tiles=new(num_experts + 1, dtype=torch.int32),
        block_m=block_m,
    )
    launch = _launch(rows, num_experts, top_k)
    counts = new(launch.num_programs, num_experts, dtype=torch.int32) if launch.num_programs > 1 else None
    sizes = {"E": num_experts, "TOP_K": top_k, "BLOCK_M": block_m, "BLOCK_T": launch.block_t}
    padded = {"E_PAD": triton.next_power_of_2(num_experts), "K_PAD": triton.next_power_of_2(top_k)}
    _route_kernel[(launch.num_programs,)](
        router_logits,
        num_tokens,
        _rounded(2 * jitter, router_logits.dtype),
        routing.topk_weights,
        routing.topk_ids,
        routing.sorted_rows,
        routing.tile_experts,
        routing.expert_tiles,
        tokens_per_expert,
        counts,
        rows,
        max_tiles,
        **sizes,
        **padded,
        IS_SPARSEMIXER=method == "sparsemixer",
        num_warps=launch.num_warps,
    )
    if counts is not None:
        _sort_kernel[(launch.num_programs,)](
            num_tokens,
            routing.topk_ids,
            routing.sorted_rows,
            routing.tile_experts,
            routing.expert_tiles,
            tokens_per_expert,
            counts,
            rows,
            max_tiles,
            launch.num_programs,
            **sizes,
            **padded,
            BLOCK_C=triton.next_power_of_2(launch.num_programs),
            num_warps=launch.num_warps,
        )
    return routing


@dataclass(frozen=True)
class _Launch:
    block_t: int
    num_programs: int
    num_warps: int


def _launch(rows: int, num_experts: int, top_k: int) -> _Launch:
    row_size = triton.next_power_of_2(num_experts) * triton.next_power_of_2(top_k)
    block_t = max(16, triton.next_power_of_2(rows))
    if block_t * row_size > LARGEST_PROGRAM:
        block_t = max(1, USUAL_PROGRAM // row_size)
    return _Launch(block_t, triton.cdiv(rows, block_t), min(8, max(1, block_t * row_size // 1024)))


def _max_tiles(num_assignments: int, num_groups: int, block_m: int) -> int:
    """Each group leaves at most block_m - 1 rows of its last tile empty."""
    return (num_assignments + min(num_assignments, num_groups) * (block_m - 1)) // block_m


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """The gap is compared in the logits' dtype, in which 0.02 is 0.02001953125 (bf16)."""
    return torch.tensor(value, dtype=dtype).item()


@triton.jit
def _pick(
    logits_ptr,
    tokens,
    is_live,
    threshold,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    IS_SPARSEMIXER: tl.constexpr,
):
    """weights, expert ids [tokens, K_PAD]; 0 and -1 where there is no assignment"""
    experts = tl.arange(0, E_PAD)[None, :]
    slots = tl.arange(0, K_PAD)[None, :]
    in_model = tl.load(logits_ptr + tokens[:, None] * E + experts, mask=is_live[:, None] & (experts < E), other=0.0)
    logits = in_model.to(tl.float32)
    left = tl.where(experts < E, logits, float("-inf"))
    weights = tl.full([tokens.shape[0], K_PAD], float("-inf"), tl.float32)
    ids = tl.full([tokens.shape[0], K_PAD], -1, tl.int32)
    for slot in tl.static_range(TOP_K):
        best, expert = tl.max(left, axis=1, return_indices=True)
        best = best[:, None]
        expert = tl.minimum(expert, E - 1)[:, None]  # NaN logits, too, must stay within the weights
        weight = best
        if IS_SPARSEMIXER:
            scale = tl.maximum(tl.abs(logits), best)
            # A scale of 0 means a gap of 0, where the reference has 0/0, which drops nothing either.
            gap = tl.div_rn(best - logits, tl.where(scale == 0, 1.0, scale)).to(in_model.dtype).to(tl.float32)
            kept = tl.where(gap > threshold, 0.0, tl.exp(left - best))
            weight = (1.0 / tl.sum(kept, axis=1))[:, None]
        weights = tl.where(slots == slot, weight, weights)
        ids = tl.where(slots == slot, expert, ids)
        left = tl.where(experts == expert, float("-inf"), left)
    if not IS_SPARSEMIXER:
        weights = tl.exp(weights - tl.max(weights, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
    is_real = is_live[:, None] & (slots < TOP_K)
    return tl.where(is_real, weights, 0.0), tl.where(is_real, ids, -1)


@triton.jit
def _count(ids, E_PAD: tl.constexpr):
    """[assignments, E_PAD]: 1 at an assignment's expert"""
    return (ids[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit
def _place(assignments, is_of, before, counts, num_live, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """These assignments' rows, given each expert's counts in all and before them; where each expert's tiles end."""
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, axis=0)
    rank = tl.cumsum(is_of, axis=0) - 1
    row = tl.sum(is_of * (rank + ((ends - tiles) * BLOCK_M + before)[None, :]), axis=1)
    row_behind = tl.sum(tiles, axis=0) * BLOCK_M + assignments - num_live * TOP_K
    return tl.where(assignments < num_live * TOP_K, row, row_behind), ends


@triton.jit
def _store_tiles(ends, tile_experts, expert_tiles, max_tiles, E: tl.constexpr, E_PAD: tl.constexpr):
    experts = tl.arange(0, E_PAD)
    tl.store(expert_tiles + experts + 1, ends, mask=experts < E)
    tl.store(expert_tiles, 0)
    num_tiles = tl.max(ends, axis=0)
    for start in range(0, max_tiles, 64):
        tile = start + tl.arange(0, 64)
        expert = tl.sum((tile[:, None] >= ends[None, :]).to(tl.int32), axis=1)
        tl.store(tile_experts + tile, tl.where(tile < num_tiles, expert, -1), mask=tile < max_tiles)


@triton.jit
def _add(tokens_per_expert, counts, E: tl.constexpr, E_PAD: tl.constexpr):
    """By one program of one launch: launches of a stream follow each other, so there is no need of atomics."""
    experts = tl.arange(0, E_PAD)
    sums = tl.load(tokens_per_expert + experts, mask=experts < E, other=0) + counts
    tl.store(tokens_per_expert + experts, sums, mask=experts < E)


@triton.jit(do_not_specialize=["rows", "max_tiles"])
def _route_kernel(
    logits,
    num_tokens,
    threshold,
    topk_weights,
    topk_ids,
    sorted_rows,
    tile_experts,
    expert_tiles,
    tokens_per_expert,
    counts,
    rows,
    max_tiles,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    IS_SPARSEMIXER: tl.constexpr,
):
    """Choose experts for BLOCK_T tokens; the only program sorts as well, others leave their counts to _sort_kernel."""
    num_live = rows if num_tokens is None else tl.load(num_tokens)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, K_PAD)
    weights, ids = _pick(logits, tokens, tokens < num_live, threshold, E, TOP_K, E_PAD, K_PAD, IS_SPARSEMIXER)
    assignments = tokens[:, None] * TOP_K + slots[None, :]
    is_assignment = (tokens < rows)[:, None] & (slots < TOP_K)[None, :]
    tl.store(topk_weights + assignments, weights, mask=is_assignment)
    tl.store(topk_ids + assignments, ids, mask=is_assignment)
    # All rows are empty until an assignment is written there.
    max_rows = max_tiles * BLOCK_M
    for start in range(tl.program_id(0) * 1024, max_rows, tl.num_programs(0) * 1024):
        row = start + tl.arange(0, 1024)
        tl.store(sorted_rows + row, tl.full([1024], 0, tl.int32) + rows * TOP_K, mask=row < max_rows)
    is_of = _count(tl.reshape(ids, [BLOCK_T * K_PAD]), E_PAD)
    if counts is None:
        tl.debug_barrier()
        flat = tl.reshape(assignments, [BLOCK_T * K_PAD])
        in_all = tl.sum(is_of, axis=0)
        row, ends = _place(flat, is_of, in_all * 0, in_all, num_live, TOP_K, BLOCK_M)
        tl.store(sorted_rows + row, flat, mask=tl.reshape(is_assignment, [BLOCK_T * K_PAD]))
        _store_tiles(ends, tile_experts, expert_tiles, max_tiles, E, E_PAD)
        if tokens_per_expert is not None:
            _add(tokens_per_expert, in_all, E, E_PAD)
    else:
        experts = tl.arange(0, E_PAD)
        tl.store(counts + tl.program_id(0) * E + experts, tl.sum(is_of, axis=0), mask=experts < E)


@triton.jit(do_not_specialize=["rows", "max_tiles", "num_chunks"])
def _sort_kernel(
    num_tokens,
    topk_ids,
    sorted_rows,
    tile_experts,
    expert_tiles,
    tokens_per_expert,
    counts,
    rows,
    max_tiles,
    num_chunks,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sort the assignments of BLOCK_T tokens among those of all other programs' tokens."""
    num_live = rows if num_tokens is None else tl.load(num_tokens)
    chunks = tl.arange(0, BLOCK_C)[:, None]
    experts = tl.arange(0, E_PAD)[None, :]
    of_chunks = tl.load(counts + chunks * E + experts, mask=(chunks < num_chunks) & (experts < E), other=0)
    before = tl.sum(tl.where(chunks < tl.program_id(0), of_chunks, 0), axis=0)
    # In the memory's order: what of K_PAD is not TOP_K need not be stepped over again.
    place = tl.arange(0, BLOCK_T * K_PAD)
    assignments = tl.program_id(0) * BLOCK_T * TOP_K + place
    is_assignment = (place < BLOCK_T * TOP_K) & (assignments < rows * TOP_K)
    is_of = _count(tl.load(topk_ids + assignments, mask=is_assignment, other=-1), E_PAD)
    in_all = tl.sum(of_chunks, axis=0)
    row, ends = _place(assignments, is_of, before, in_all, num_live, TOP_K, BLOCK_M)
    tl.store(sorted_rows + row, assignments, mask=is_assignment)
    if tl.program_id(0) == 0:
        _store_tiles(ends, tile_experts, expert_tiles, max_tiles, E, E_PAD)
        if tokens_per_expert is not None:
            _add(tokens_per_expert, in_all, E, E_PAD)


def route_ref(
    router_logits: Tensor,
    *,
    method: Literal["sparsemixer", "softmax"],
    top_k: int,
    jitter: float,
    block_m: int,
    num_tokens: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
) -> Routing:
    """Slow and obvious `route`: the CPU's rules, then a list of assignments an expert."""
    rows, num_experts = router_logits.shape
    num_live = rows if num_tokens is None else int(num_tokens)
    sparse = method == "sparsemixer"
    choose = sparsemixer_ref(router_logits, jitter) if sparse else softmax_topk_ref(router_logits, top_k)
    weights, ids = choose[0].clone(), choose[1].int()
    weights[num_live:], ids[num_live:] = 0, -1
    if tokens_per_expert is not None:
        tokens_per_expert += ids[:num_live].flatten().bincount(minlength=num_experts)
    max_tiles = _max_tiles(rows * top_k, num_experts + (num_tokens is not None), block_m)
    sorted_rows: list[int] = []
    tile_experts: list[int] = []
    expert_tiles = [0]
    for expert in [*range(num_experts), -1]:
        assignments = (ids.flatten() == expert).nonzero().flatten().tolist()
        num_tiles = triton.cdiv(len(assignments), block_m)
        sorted_rows += assignments + [rows * top_k] * (num_tiles * block_m - len(assignments))
        tile_experts += [expert] * num_tiles
        expert_tiles.append(len(tile_experts))
    sorted_rows += [rows * top_k] * (max_tiles * block_m - len(sorted_rows))
    tile_experts += [-1] * (max_tiles - len(tile_experts))
    new = router_logits.new_tensor
    return Routing(
        weights,
        ids,
        new(sorted_rows, dtype=torch.int32),
        new(tile_experts, dtype=torch.int32),
        new(expert_tiles[: num_experts + 1], dtype=torch.int32),
        block_m,
    )


def aot_variants() -> list[Variant]:
    """A decode step of one token, the largest single launch, and two launches, for Phi-3.5-MoE and for Mixtral."""
    int32s = ["topk_ids", "sorted_rows", "tile_experts", "expert_tiles", "counts", "num_tokens"]
    signature = {
        **dict.fromkeys(int32s, "*i32:16"),
        **dict.fromkeys(["rows", "max_tiles", "num_chunks"], "i32"),
        "logits": "*bf16:16",
        "tokens_per_expert": "*i64:16",
        "topk_weights": "*fp32:16",
        "threshold": "fp32",
    }
    variants = []
    for name, num_experts, is_sparsemixer in (("phi-3.5-moe", 16, True), ("mixtral-8x7b", 8, False)):
        sizes = {"E": num_experts, "E_PAD": num_experts, "TOP_K": 2, "K_PAD": 2, "BLOCK_M": 16}
        for rows in (1, LARGEST_PROGRAM // (2 * num_experts), 2048):
            launch = _launch(rows, num_experts, 2)
            chunk = sizes | {"BLOCK_T": launch.block_t}
            alone: dict[str, Any] = {"counts": None} if launch.num_programs == 1 else {}
            pick = chunk | {"IS_SPARSEMIXER": is_sparsemixer} | alone
            label = f"{name} {rows} rows"
            about: dict[str, Any] = {"num_warps": launch.num_warps, "has_wide_loads": False}
            variants.append(Variant(f"route {label}", _route_kernel, signature, pick, **about))
            if not alone:
                sort = chunk | {"BLOCK_C": triton.next_power_of_2(launch.num_programs)}
                variants.append(Variant(f"route sort {label}", _sort_kernel, signature, sort, **about))
    return variants
