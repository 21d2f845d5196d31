"""What programs of attention share: where their queries are, and how results of splits of the keys are joined."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below any score. Not -inf, from which the first score's difference would be NaN.


@triton.jit
def find_tile(query_starts, context_lens, num_seqs, tile, TILE_TOKENS: tl.constexpr):
    """The tile's sequence, first token in the step, that token's position, and tokens left from it (none: <= 0)."""
    count = 0
    for start in range(0, num_seqs, 256):
        seqs = start + tl.arange(0, 256)
        first = tl.load(query_starts + seqs, mask=seqs < num_seqs, other=0)
        count += tl.sum(((first // TILE_TOKENS + seqs <= tile) & (seqs < num_seqs)).to(tl.int32))
    seq = count - 1
    first = tl.load(query_starts + seq)
    last = tl.load(query_starts + seq + 1)
    token = first + (tile - first // TILE_TOKENS - seq) * TILE_TOKENS
    left = last - token
    return seq, token, tl.load(context_lens + seq) - left, left


@triton.jit
def fold(top, total, sums, new_top, new_total, new_sums):
    """Join two parts of a softmax: largest scores, sums of 2^(score - largest), sums of values so weighed."""
    both = tl.maximum(top, new_top)
    weight = tl.exp2(top - both)
    new_weight = tl.exp2(new_top - both)
    total = tl.fma(total, weight, new_total * new_weight)
    sums = tl.fma(sums, tl.broadcast_to(weight[:, None], sums.shape), new_sums * new_weight[:, None])
    return both, total, sums


@triton.jit(do_not_specialize=["num_seqs", "max_splits"])
def fold_kernel(
    shared_sums,
    shared_tops,
    query_starts,
    context_lens,
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
    """Program (tile of one token, KV head): fold the splits that the token sees."""
    _, token, position, left = find_tile(query_starts, context_lens, num_seqs, tl.program_id(0), 1)
    if left <= 0:
        return
    rows = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, D_PAD)
    is_row = rows < GROUP
    is_value = is_row[:, None] & (dims < D)[None, :]
    out_rows = token.to(tl.int64) * (KV_HEADS * GROUP) + tl.program_id(1) * GROUP + rows

    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(position - WINDOW + 1, 0)
    top = tl.full([GROUP_PAD], LOWEST, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    sums = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for split in tl.range(begin // SPLIT_KEYS, position // SPLIT_KEYS + 1, loop_unroll_factor=4):
        places = out_rows * max_splits + split
        new_top = tl.load(shared_tops + places * 2, mask=is_row, other=LOWEST)
        new_total = tl.load(shared_tops + places * 2 + 1, mask=is_row, other=0.0)
        new_sums = tl.load(shared_sums + places[:, None] * D + dims[None, :], mask=is_value, other=0.0)
        top, total, sums = fold(top, total, sums, new_top, new_total, new_sums)
    result = sums * (1.0 / tl.where(is_row, total, 1.0))[:, None]
    tl.store(out + out_rows[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=is_value)
