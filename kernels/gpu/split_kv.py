"""Helpers of the attention kernels: find a program's queries, and merge the results of splits of the keys."""

import triton
import triton.language as tl

from moray.kernels.gpu.sizes import next_power_of_2

LOWEST = tl.constexpr(-1e30)  # below any score; not -inf, because -inf - -inf would be NaN
MANY_SPLITS = 64  # from so many on, a query waits for its merge more than for the start of a program
LOG2_E = tl.constexpr(1.4426950408889634)  # times this, scores are exponents of 2, whose powers are computed


@triton.jit
def find_tile(query_starts, context_lens, num_seqs, tile, TILE_TOKENS: tl.constexpr):
    """Return a tile's sequence, first token in the step, position of that token, and tokens left in the sequence.

    A tile without queries has 0 or fewer tokens left.
    """
    count = 0
    for start in range(0, num_seqs, 256):
        seqs = start + tl.arange(0, 256)
        first = tl.load(query_starts + seqs, mask=seqs < num_seqs, other=0)
        count += tl.sum(((first // TILE_TOKENS + seqs <= tile) & (seqs < num_seqs)).to(tl.int32))
    seq = count - 1
    first = tl.load(query_starts + seq)
    last = tl.load(query_starts + seq + 1)
    token = first + (tile - first // TILE_TOKENS - seq) * TILE_TOKENS
    num_left = last - token
    return seq, token, tl.load(context_lens + seq) - num_left, num_left


@triton.jit
def first_state(sinks, heads, is_row):
    """Return the largest score and the sum of weights before any key: those of the sinks, whose values are 0.

    Whoever merges the splits of a row begins with this, so that a sink counts once.
    """
    if sinks is None:
        return tl.full(heads.shape, LOWEST, tl.float32), tl.zeros(heads.shape, tl.float32)
    else:
        return tl.load(sinks + heads, mask=is_row, other=0.0) * LOG2_E, tl.full(heads.shape, 1.0, tl.float32)


@triton.jit
def merge_states(row_max, row_sum, sums, new_max, new_row_sum, new_sums):
    """Merge two parts of a softmax.

    A part has row_max (largest scores), row_sum (sums of 2^(score - largest)) and sums (of values with these weights).
    """
    joint_max = tl.maximum(row_max, new_max)
    weight = tl.exp2(row_max - joint_max)
    new_weight = tl.exp2(new_max - joint_max)
    row_sum = tl.fma(row_sum, weight, new_row_sum * new_weight)
    sums = tl.fma(sums, tl.broadcast_to(weight[:, None], sums.shape), new_sums * new_weight[:, None])
    return joint_max, row_sum, sums


@triton.jit
def merge_run(
    row_max, row_sum, sums, stats, new_sums, split, D: tl.constexpr, D_PAD: tl.constexpr, COUNT: tl.constexpr
):
    """Merge COUNT splits from `split` on, in their order. Their results are loaded first: no load waits for a merge.

    stats, new_sums: where the rows' results of split 0 are
    """
    run_max, run_row_sum, run_sums = (), (), ()
    for i in tl.static_range(COUNT):
        run_max += (tl.load(stats + (split + i) * 2),)  # type: ignore[assignment]  # Triton's tuples grow
        run_row_sum += (tl.load(stats + (split + i) * 2 + 1),)  # type: ignore[assignment]
        if D == D_PAD:
            loaded = tl.load(new_sums + (split + i) * D)
        else:
            loaded = tl.load(new_sums + (split + i) * D, mask=(tl.arange(0, D_PAD) < D)[None, :], other=0.0)
        run_sums += (loaded,)  # type: ignore[assignment]
    for i in tl.static_range(COUNT):
        row_max, row_sum, sums = merge_states(row_max, row_sum, sums, run_max[i], run_row_sum[i], run_sums[i])
    return row_max, row_sum, sums


def merge_options(group: int, head_dim: int, max_splits: int) -> dict[str, int]:
    """Return RUN, the splits that are loaded at once, and num_warps of merge_splits_kernel. They change no bit.

    A run of 16 takes 127 registers a thread with a warp for 128 numbers of each split, so fewer programs run at once.
    """
    if max_splits < MANY_SPLITS:
        return {"RUN": 4, "num_warps": 1}
    numbers = next_power_of_2(group) * next_power_of_2(head_dim)
    return {"RUN": 16, "num_warps": max(1, min(8, numbers // 128))}


@triton.jit(do_not_specialize=["num_seqs", "max_splits"])
def merge_splits_kernel(
    split_sums,
    split_stats,
    query_starts,
    context_lens,
    sinks,
    out,
    num_seqs,
    max_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    RUN: tl.constexpr,
):
    """Run program (tile of one token, KV head): merge the splits that the token attends to, in order."""
    _, token, position, num_left = find_tile(query_starts, context_lens, num_seqs, tl.program_id(0), 1)
    if num_left <= 0:
        return
    rows = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, D_PAD)
    is_row = rows < GROUP
    is_value = is_row[:, None] & (dims < D)[None, :]
    out_rows = token.to(tl.int64) * (KV_HEADS * GROUP) + tl.program_id(1) * GROUP + rows

    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(position - WINDOW + 1, 0)
    row_max, row_sum = first_state(sinks, tl.program_id(1) * GROUP + rows, is_row)
    sums = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    # Rows that do not exist read those of the token's first head, and are not stored.
    results = tl.where(is_row, out_rows, token.to(tl.int64) * (KV_HEADS * GROUP)) * max_splits
    stats = split_stats + results * 2
    new_sums = split_sums + results[:, None] * D + dims[None, :]
    stop = position // SPLIT_KEYS + 1
    split = begin // SPLIT_KEYS
    while stop - split >= RUN:
        row_max, row_sum, sums = merge_run(row_max, row_sum, sums, stats, new_sums, split, D, D_PAD, RUN)
        split += RUN
    while split < stop:
        row_max, row_sum, sums = merge_run(row_max, row_sum, sums, stats, new_sums, split, D, D_PAD, 1)
        split += 1
    result = sums * (1.0 / tl.where(is_row, row_sum, 1.0))[:, None]
    tl.store(out + out_rows[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=is_value)
