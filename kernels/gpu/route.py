"""Routing: choose each token's experts and weights, and sort tokens by expert for the experts' GEMMs."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.cpu.route import choose_ref
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import cdiv, next_power_of_2
from moray.kernels.gpu.tuning import Gpu
from moray.kernels.routing import RoutingMethod, sparsemixer_threshold

# A program holds [assignments, experts] in registers. Steps up to MAX_PROGRAM_ELEMENTS take one program and one launch;
# larger ones take several programs of PROGRAM_ELEMENTS each, and a second launch. Of up to MAX_COUNTS counts, of a
# program and an expert, each program of the second launch adds up those that it needs; of more, a third launch does.
MAX_PROGRAM_ELEMENTS = 16384
PROGRAM_ELEMENTS = 4096
MAX_COUNTS = 4096


@dataclass(frozen=True)
class Routing:
    """Holds assignments (token * top_k + slot) by expert; each expert's are padded to whole tiles of block_m rows.

    topk_weights: [num_tokens, top_k] fp32; 0 for padding tokens
    topk_ids:     [num_tokens, top_k] int32; -1 for padding tokens
    sorted_rows:  [max_tiles * block_m] int32: assignments; num_tokens * top_k in rows that are not used
    tile_experts: [max_tiles] int32: each tile's expert; -1 for the tiles after the last expert's, which hold padding
                  tokens
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
    method: RoutingMethod,
    top_k: int,
    jitter: float,
    block_m: int,
    num_tokens: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
) -> Routing:
    """Choose experts as kernels/cpu/route.py does, and sort by expert; an expert's assignments are in ascending order.

    The sizes of the results are those of the worst case and depend on the sizes of the arguments alone.

    router_logits: [rows, num_experts], rounded to the model's dtype
    num_tokens:    [1] int32 on the device: rows from there on are padding and go to no expert; None = no padding
    tokens_per_expert: [num_experts] int64, to which the tokens of each expert are added in place; None = not counted
    """
    assert method != "sparsemixer" or top_k == 2, f"sparsemixer chooses 2 experts, not {top_k}"
    assert method != "sigmoid" or router_logits.shape[1] == top_k == 1, "a sigmoid weights a single expert"
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
    # In the row after those of the programs, the third launch puts the sums.
    counts = new(launch.num_programs + 1, num_experts, dtype=torch.int32) if launch.num_programs > 1 else None
    sizes = {"E": num_experts, "TOP_K": top_k, "BLOCK_M": block_m, "BLOCK_T": launch.block_t}
    paddings = {"E_PAD": next_power_of_2(num_experts), "K_PAD": next_power_of_2(top_k)}
    _route_kernel[(launch.num_programs,)](
        router_logits,
        num_tokens,
        sparsemixer_threshold(jitter, router_logits.dtype),
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
        **paddings,
        METHOD=method,
        num_warps=launch.num_warps,
    )
    if counts is not None:
        if launch.has_prefixes:
            _prefix_kernel[(1,)](counts, launch.num_programs, num_experts, E_PAD=paddings["E_PAD"], num_warps=4)
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
            **paddings,
            BLOCK_C=launch.block_c,
            num_warps=launch.num_warps,
        )
    return routing


@dataclass(frozen=True)
class _Launch:
    """Holds the shape of a launch: tokens per program, number of programs, warps per program.

    block_c: rows of counts that a program of the second launch adds up; 0 = a third launch has done it
    """

    block_t: int
    num_programs: int
    num_warps: int
    block_c: int

    @property
    def has_prefixes(self) -> bool:
        """Return whether there is a third launch, between the two."""
        return self.block_c == 0


@lru_cache(1024)
def _launch(rows: int, num_experts: int, top_k: int) -> _Launch:
    row_size = next_power_of_2(num_experts) * next_power_of_2(top_k)
    block_t = max(16, next_power_of_2(rows))
    if block_t * row_size > MAX_PROGRAM_ELEMENTS:
        block_t = max(1, PROGRAM_ELEMENTS // row_size)
    # With few experts a program has many tokens, for which the threads of 8 warps have too few registers.
    max_warps = 16 if block_t >= 2048 else 8
    num_programs = cdiv(rows, block_t)
    block_c = next_power_of_2(num_programs)
    block_c = block_c if block_c * next_power_of_2(num_experts) <= MAX_COUNTS else 0
    return _Launch(block_t, num_programs, min(max_warps, max(1, block_t * row_size // 1024)), block_c)


def _max_tiles(num_assignments: int, num_groups: int, block_m: int) -> int:
    """Return the number of tiles in the worst case, where each group leaves block_m - 1 rows of its last tile empty."""
    return (num_assignments + min(num_assignments, num_groups) * (block_m - 1)) // block_m


@triton.constexpr_function
def _log2(size: int) -> int:
    return size.bit_length() - 1


@triton.jit
def _choose_experts(
    logits_ptr,
    tokens,
    is_valid,
    threshold,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    METHOD: tl.constexpr,
):
    """Return weights and expert ids, [tokens, K_PAD]; 0 and -1 where there is no assignment.

    A softmax is added up in an order that the code gives: that of a reduction could depend on the number of tokens.
    """
    experts = tl.arange(0, E_PAD)[None, :]
    slots = tl.arange(0, K_PAD)[None, :]
    in_model = tl.load(logits_ptr + tokens[:, None] * E + experts, mask=is_valid[:, None] & (experts < E), other=0.0)
    logits = in_model.to(tl.float32)
    available = tl.where(experts < E, logits, float("-inf"))
    weights = tl.zeros([tokens.shape[0], K_PAD], tl.float32)
    ids = tl.full([tokens.shape[0], K_PAD], -1, tl.int32)
    top = tl.max(available, axis=1)[:, None]
    total = tl.zeros([tokens.shape[0], 1], tl.float32)
    for slot in tl.static_range(TOP_K):
        best, expert = tl.max(available, axis=1, return_indices=True)
        best = best[:, None]
        expert = tl.minimum(expert, E - 1)[:, None]  # NaN logits too must give a valid expert
        weight = tl.exp(best - top)
        total += weight
        if METHOD == "sigmoid":
            weight = tl.sigmoid(best)
        if METHOD == "sparsemixer":
            scale = tl.maximum(tl.abs(logits), best)
            # A scale of 0 means a gap of 0; the reference computes 0/0, which drops nothing either.
            gap = tl.div_rn(best - logits, tl.where(scale == 0, 1.0, scale)).to(in_model.dtype).to(tl.float32)
            kept = tl.where(gap > threshold, 0.0, tl.exp(available - best))
            weight = (1.0 / tl.sum(kept, axis=1))[:, None]
        weights = tl.where(slots == slot, weight, weights)
        ids = tl.where(slots == slot, expert, ids)
        available = tl.where(experts == expert, float("-inf"), available)
    if METHOD == "softmax_all":
        total = _sum_pairs(tl.where(experts < E, tl.exp(logits - top), 0.0), E_PAD)
    if METHOD == "softmax" or METHOD == "softmax_all":
        weights = weights / total
    is_chosen = is_valid[:, None] & (slots < TOP_K)
    return tl.where(is_chosen, weights, 0.0), tl.where(is_chosen, ids, -1)


@triton.jit
def _sum_pairs(x, SIZE: tl.constexpr):
    """Return the sums of the rows of x, [rows, SIZE], as [rows, 1]: of neighbours, then of neighbouring sums, ..."""
    ROWS: tl.constexpr = x.shape[0]
    LEVELS: tl.constexpr = _log2(SIZE)
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(x, [ROWS, SIZE >> (level + 1), 2]))
        x = even + odd
    return tl.reshape(x, [ROWS, 1])


@triton.jit
def _one_hot(ids, E_PAD: tl.constexpr):
    """Return [assignments, E_PAD]: 1 at an assignment's expert, else 0."""
    return (ids[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit
def _find_rows(assignments, one_hot, before, counts, num_valid, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the rows of some assignments, and where each expert's tiles end.

    one_hot: the experts of the assignments
    before:  each expert's number of assignments before these
    counts:  each expert's number of assignments in all
    """
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, axis=0)
    rank = tl.cumsum(one_hot, axis=0) - 1
    row = tl.sum(one_hot * (rank + ((ends - tiles) * BLOCK_M + before)[None, :]), axis=1)
    padding_row = tl.sum(tiles, axis=0) * BLOCK_M + assignments - num_valid * TOP_K
    return tl.where(assignments < num_valid * TOP_K, row, padding_row), ends


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
def _add_counts(tokens_per_expert, counts, E: tl.constexpr, E_PAD: tl.constexpr):
    """Add counts to tokens_per_expert.

    One program does it, and the launches of a stream run one after the other, so no atomics are needed.
    """
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
    METHOD: tl.constexpr,
):
    """Choose experts for BLOCK_T tokens. A single program also sorts; several leave their counts to _sort_kernel."""
    num_valid = rows if num_tokens is None else tl.load(num_tokens)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, K_PAD)
    weights, ids = _choose_experts(logits, tokens, tokens < num_valid, threshold, E, TOP_K, E_PAD, K_PAD, METHOD)
    assignments = tokens[:, None] * TOP_K + slots[None, :]
    is_assignment = (tokens < rows)[:, None] & (slots < TOP_K)[None, :]
    tl.store(topk_weights + assignments, weights, mask=is_assignment)
    tl.store(topk_ids + assignments, ids, mask=is_assignment)
    # Mark all rows as empty before assignments are written.
    max_rows = max_tiles * BLOCK_M
    for start in range(tl.program_id(0) * 1024, max_rows, tl.num_programs(0) * 1024):
        row = start + tl.arange(0, 1024)
        tl.store(sorted_rows + row, tl.full([1024], 0, tl.int32) + rows * TOP_K, mask=row < max_rows)
    one_hot = _one_hot(tl.reshape(ids, [BLOCK_T * K_PAD]), E_PAD)
    if counts is None:
        tl.debug_barrier()
        flat = tl.reshape(assignments, [BLOCK_T * K_PAD])
        total_counts = tl.sum(one_hot, axis=0)
        row, ends = _find_rows(flat, one_hot, total_counts * 0, total_counts, num_valid, TOP_K, BLOCK_M)
        tl.store(sorted_rows + row, flat, mask=tl.reshape(is_assignment, [BLOCK_T * K_PAD]))
        _store_tiles(ends, tile_experts, expert_tiles, max_tiles, E, E_PAD)
        if tokens_per_expert is not None:
            _add_counts(tokens_per_expert, total_counts, E, E_PAD)
    else:
        experts = tl.arange(0, E_PAD)
        tl.store(counts + tl.program_id(0) * E + experts, tl.sum(one_hot, axis=0), mask=experts < E)


PREFIX_CHUNKS = tl.constexpr(32)  # rows of counts that _prefix_kernel adds up at a time


@triton.jit(do_not_specialize=["num_chunks"])
def _prefix_kernel(counts, num_chunks, E, E_PAD: tl.constexpr):
    """Replace each program's counts by the sums of those of the programs before it; the last row is that of all."""
    chunks, experts = tl.arange(0, PREFIX_CHUNKS)[:, None], tl.arange(0, E_PAD)[None, :]
    before = tl.zeros([1, E_PAD], tl.int32)
    for start in range(0, num_chunks, PREFIX_CHUNKS):
        at = counts + (start + chunks) * E + experts
        inside = (start + chunks < num_chunks) & (experts < E)
        own = tl.load(at, mask=inside, other=0)
        sums = tl.cumsum(own, axis=0)
        tl.store(at, before + sums - own, mask=inside)
        before += tl.sum(own, axis=0)[None, :]
    tl.store(counts + num_chunks * E + experts, before, mask=experts < E)


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
    """Sort the assignments of BLOCK_T tokens into their rows among those of all other programs' tokens."""
    num_valid = rows if num_tokens is None else tl.load(num_tokens)
    if BLOCK_C == 0:
        expert = tl.arange(0, E_PAD)
        before = tl.load(counts + tl.program_id(0) * E + expert, mask=expert < E, other=0)
        total_counts = tl.load(counts + num_chunks * E + expert, mask=expert < E, other=0)
    else:
        chunks = tl.arange(0, BLOCK_C)[:, None]
        experts = tl.arange(0, E_PAD)[None, :]
        chunk_counts = tl.load(counts + chunks * E + experts, mask=(chunks < num_chunks) & (experts < E), other=0)
        before = tl.sum(tl.where(chunks < tl.program_id(0), chunk_counts, 0), axis=0)
        total_counts = tl.sum(chunk_counts, axis=0)
    # In the order of memory, which has TOP_K rather than K_PAD assignments per token.
    index = tl.arange(0, BLOCK_T * K_PAD)
    assignments = tl.program_id(0) * BLOCK_T * TOP_K + index
    is_assignment = (index < BLOCK_T * TOP_K) & (assignments < rows * TOP_K)
    one_hot = _one_hot(tl.load(topk_ids + assignments, mask=is_assignment, other=-1), E_PAD)
    row, ends = _find_rows(assignments, one_hot, before, total_counts, num_valid, TOP_K, BLOCK_M)
    tl.store(sorted_rows + row, assignments, mask=is_assignment)
    if tl.program_id(0) == 0:
        _store_tiles(ends, tile_experts, expert_tiles, max_tiles, E, E_PAD)
        if tokens_per_expert is not None:
            _add_counts(tokens_per_expert, total_counts, E, E_PAD)


def route_ref(
    router_logits: Tensor,
    *,
    method: RoutingMethod,
    top_k: int,
    jitter: float,
    block_m: int,
    num_tokens: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
) -> Routing:
    """Compute `route` slowly and obviously: the CPU's rules, then a list of assignments per expert."""
    rows, num_experts = router_logits.shape
    num_valid = rows if num_tokens is None else int(num_tokens)
    chosen = choose_ref(router_logits, method, top_k, jitter)
    weights, ids = chosen[0].clone(), chosen[1].int()
    weights[num_valid:], ids[num_valid:] = 0, -1
    if tokens_per_expert is not None:
        tokens_per_expert += ids[:num_valid].flatten().bincount(minlength=num_experts)
    max_tiles = _max_tiles(rows * top_k, num_experts + (num_tokens is not None), block_m)
    sorted_rows: list[int] = []
    tile_experts: list[int] = []
    expert_tiles = [0]
    for expert in [*range(num_experts), -1]:
        assignments = (ids.flatten() == expert).nonzero().flatten().tolist()
        num_tiles = cdiv(len(assignments), block_m)
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


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return, for each model, a decode step of one token, the largest single launch and a step of two launches.

    Each comes with padding, as a captured graph launches it, and without, as a step that has no graph does.
    """
    int32s = ["topk_ids", "sorted_rows", "tile_experts", "expert_tiles", "counts", "num_tokens"]
    signature = {
        **dict.fromkeys(int32s, "*i32:16"),
        **dict.fromkeys(["rows", "max_tiles", "num_chunks"], "i32"),
        "tokens_per_expert": "*i64:16",
        "topk_weights": "*fp32:16",
        "threshold": "fp32",
    }
    variants = []
    for name, num_experts, top_k, method, dtype in (
        ("phi-3.5-moe", 16, 2, "sparsemixer", "bf16"),
        ("mixtral-8x7b", 8, 2, "softmax", "bf16"),
        ("phixtral-4x2_8", 4, 2, "softmax", "fp16"),
        ("qwen3-30b-a3b", 128, 8, "softmax", "bf16"),
        ("olmoe-1b-7b", 64, 8, "softmax_all", "bf16"),
        ("qwen1.5-moe-a2.7b", 60, 4, "softmax_all", "bf16"),
        ("granite-3.1-3b-a800m", 40, 8, "softmax", "bf16"),
        ("gpt-oss-20b", 32, 4, "softmax", "bf16"),
        ("a shared expert", 1, 1, "sigmoid", "bf16"),
        ("phi-3.5-moe fp32", 16, 2, "sparsemixer", "fp32"),
    ):
        sizes = {"E": num_experts, "TOP_K": top_k, "BLOCK_M": 16}
        sizes |= {"E_PAD": next_power_of_2(num_experts), "K_PAD": next_power_of_2(top_k)}
        rows_of = dict.fromkeys((1, MAX_PROGRAM_ELEMENTS // (sizes["E_PAD"] * sizes["K_PAD"]), 2048))
        for rows, padded in product(rows_of, (True, False)):
            launch = _launch(rows, num_experts, top_k)
            chunk = sizes | {"BLOCK_T": launch.block_t} | ({} if padded else {"num_tokens": None})
            alone: dict[str, Any] = {"counts": None} if launch.num_programs == 1 else {}
            pick = chunk | {"METHOD": method} | alone
            label = f"{name} {rows} rows{' padded' if padded else ''}"
            options: dict[str, Any] = {"num_warps": launch.num_warps, "has_wide_loads": False}
            types = signature | {"logits": f"*{dtype}:16"}
            variants.append(Variant(f"route {label}", _route_kernel, types, pick, **options))
            if not alone:
                sort = chunk | {"BLOCK_C": launch.block_c}
                if launch.has_prefixes and padded:  # which makes no difference to it
                    prefix = {"E_PAD": sizes["E_PAD"]}
                    types |= {"E": "i32"}
                    variants.append(
                        Variant(f"route prefix {name}", _prefix_kernel, types, prefix, has_wide_loads=False)
                    )
                variants.append(Variant(f"route sort {label}", _sort_kernel, types, sort, **options))
    return variants
