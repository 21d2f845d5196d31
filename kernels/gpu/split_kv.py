"""Helpers of the attention kernels: find a program's queries, and merge the results of splits of the keys."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below any score; not -inf, because -inf - -inf would be NaN
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
):
    """Run program (tile of one token, KV head): merge the splits that the token attends to."""
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
    for split in tl.range(begin // SPLIT_KEYS, position // SPLIT_KEYS + 1, loop_unroll_factor=4):
        offsets = out_rows * max_splits + split
        new_max = tl.load(split_stats + offsets * 2, mask=is_row, other=LOWEST)
        new_row_sum = tl.load(split_stats + offsets * 2 + 1, mask=is_row, other=0.0)
        new_sums = tl.load(split_sums + offsets[:, None] * D + dims[None, :], mask=is_value, other=0.0)
        row_max, row_sum, sums = merge_states(row_max, row_sum, sums, new_max, new_row_sum, new_sums)
    result = sums * (1.0 / tl.where(is_row, row_sum, 1.0))[:, None]
    tl.store(out + out_rows[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=is_value)
