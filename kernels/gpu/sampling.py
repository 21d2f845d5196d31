"""Draw tokens from logits on the device, without a sort: the tokens that kernels/cpu/sampling.py draws.

A token's score is (its logit - the largest) / temperature, its weight floor(2**40 * exp(score)). Weights are integers:
their sums are exact in any order. top_k and top_p both keep the first tokens of one and the same order, by falling
score, lowest id first among equals, so what they keep ends at one token. A search that halves the range of scores with
every pass of the row finds it. One program a row: 3 passes without filters, some 10 to 20 more for each search.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu.philox import uniform_bits
from kernels.gpu.aot import Variant
from kernels.gpu.philox import random_bits

SCALE: tl.constexpr = tl.constexpr(2.0**40)
MAX_BLOCK = 4096
NUM_WARPS = 16


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream_keys: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token a row; each filter applied to what the one before it kept: top_k, top_p, min_p.

    logits:       [num_rows, vocab_size], any floating dtype, contiguous
    temperature:  [num_rows] fp32; 0: the token of the largest logit, the lowest id among equals
    top_k:        [num_rows] int32; the k likeliest tokens; 0 = all
    top_p:        [num_rows] fp64, in (0, 1]; the fewest likeliest tokens whose weights reach this share
    min_p:        [num_rows] fp64; tokens whose weight is at least this share of the largest
    stream_keys:  [num_rows] int64, of the requests' random streams
    samples:      [num_rows] int32, which of a request's samples
    positions:    [num_rows] int64, tokens generated before this one; -1: a row of padding
    returns:      [num_rows] int64; -1 where logits are not numbers (NaN, or the largest is infinite), and for padding
    """
    assert logits.is_contiguous(), "sampling reads contiguous rows"
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows > 0:
        _sample_kernel[(num_rows,)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            stream_keys,
            samples,
            positions,
            token_ids,
            vocab_size,
            BLOCK=min(triton.next_power_of_2(vocab_size), MAX_BLOCK),
            num_warps=NUM_WARPS,
        )
    return token_ids


@triton.jit
def _sample_kernel(
    logits,
    temperatures,
    top_k,
    top_p,
    min_p,
    stream_keys,
    samples,
    positions,
    token_ids,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    position = tl.load(positions + row)
    token = tl.full((), -1, tl.int32)
    if position >= 0:
        largest, token = _largest(logits, vocab_size, BLOCK)
        temperature = tl.load(temperatures + row)
        if (token >= 0) & (temperature > 0):
            bits = random_bits(tl.load(stream_keys + row), tl.load(samples + row), position)
            k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
            token = _draw(logits, vocab_size, largest, temperature, k, p, least, bits, BLOCK)
    tl.store(token_ids + row, token.to(tl.int64))


@triton.jit
def _largest(logits, vocab_size, BLOCK: tl.constexpr):
    """The largest logit and the lowest id that has it; -1 where the largest is no number, or there is a NaN."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    ids = lanes
    is_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + lanes
        values = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        is_nan |= (values != values).to(tl.int32)
        ids = tl.where(values > largest, tokens, ids)
        largest = tl.where(values > largest, values, largest)
    best = tl.max(largest)
    token = tl.min(tl.where(largest == best, ids, vocab_size))
    is_number = (tl.abs(best) < float("inf")) & (tl.max(is_nan) == 0)
    return best, tl.where(is_number, token, -1)


@triton.jit
def _weigh(logits, tokens, vocab_size, largest, temperature):
    """Keys, int32, that rise as scores fall (the bits of -score), and weights, int64, 0 beyond the vocabulary."""
    values = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    scores = tl.div_rn(values - largest, temperature)
    return tl.abs(scores).to(tl.int32, bitcast=True), (tl.exp(scores) * SCALE).to(tl.int64)


@triton.jit
def _first_past(amounts, target, start, token):
    """The block's first token at which the sum of amounts exceeds the target (else `token`), and the target from there
    on; negative once it has been exceeded."""
    amount = tl.sum(amounts)
    if (target >= 0) & (target < amount):
        token = start + tl.sum((tl.cumsum(amounts) <= target).to(tl.int32))
    return token, target - amount


@triton.jit
def _count(logits, vocab_size, largest, temperature, BLOCK: tl.constexpr):
    """Sum of the weights, number of those above 0, and the largest key among these."""
    sums = tl.zeros([BLOCK], tl.int64)
    counts = tl.zeros([BLOCK], tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        keys, weights = _weigh(logits, start + tl.arange(0, BLOCK), vocab_size, largest, temperature)
        sums += weights
        counts += (weights > 0).to(tl.int32)
        last = tl.where(weights > 0, tl.maximum(last, keys), last)
    return tl.sum(sums), tl.sum(counts), tl.max(last)


@triton.jit
def _amounts(is_in, weights, BY_COUNT: tl.constexpr):
    return is_in.to(tl.int64) if BY_COUNT else tl.where(is_in, weights, 0)


@triton.jit
def _search(logits, vocab_size, largest, temperature, last, limit, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Key and id of the token at which amounts, summed by falling score, reach the limit.

    An amount is 1 if BY_COUNT, else the token's weight. last: a token's key, up to which the limit is reached.
    """
    lanes = tl.arange(0, BLOCK)
    first = tl.zeros_like(last)
    before = tl.zeros_like(limit)
    # `first` and `last` are keys of tokens, the one searched for is among them or between; `before` is the sum of the
    # amounts of all keys below `first`.
    while first < last:
        middle = first + (last - first) // 2
        sums = tl.zeros([BLOCK], tl.int64)
        below = tl.zeros([BLOCK], tl.int32) + first
        above = tl.zeros([BLOCK], tl.int32) + last
        for start in range(0, vocab_size, BLOCK):
            keys, weights = _weigh(logits, start + lanes, vocab_size, largest, temperature)
            is_below = keys <= middle
            sums += _amounts(is_below, weights, BY_COUNT)
            below = tl.where(is_below, tl.maximum(below, keys), below)
            above = tl.where(is_below, above, tl.minimum(above, keys))
        amount = tl.sum(sums)
        if amount >= limit:
            last = tl.max(below)
        else:
            first = tl.min(above)
            before = amount

    token = tl.zeros_like(last) + vocab_size
    target = limit - before - 1
    for start in range(0, vocab_size, BLOCK):
        keys, weights = _weigh(logits, start + lanes, vocab_size, largest, temperature)
        token, target = _first_past(_amounts(keys == last, weights, BY_COUNT), target, start, token)
    return last, token


@triton.jit
def _kept(logits, tokens, vocab_size, largest, temperature, last, last_id, least):
    """Weights, 0 for tokens that come after (last, last_id) in order, or weigh less than the least."""
    keys, weights = _weigh(logits, tokens, vocab_size, largest, temperature)
    is_first = (keys < last) | ((keys == last) & (tokens <= last_id))
    return tl.where(is_first & (weights >= least), weights, 0)


@triton.jit
def _sum_kept(logits, vocab_size, largest, temperature, last, last_id, least, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        sums += _kept(logits, tokens, vocab_size, largest, temperature, last, last_id, least)
    return tl.sum(sums)


@triton.jit
def _ceil(x):
    """Of a double that is not negative, as int64."""
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


@triton.jit
def _draw(logits, vocab_size, largest, temperature, top_k, top_p, min_p, bits, BLOCK: tl.constexpr):
    """One token of a row whose largest logit is a number."""
    total, count, last = _count(logits, vocab_size, largest, temperature, BLOCK)
    last_id = tl.zeros_like(last) + vocab_size
    if (top_k > 0) & (top_k < count):
        k = top_k.to(tl.int64)
        last, last_id = _search(logits, vocab_size, largest, temperature, last, k, True, BLOCK)
        total = _sum_kept(logits, vocab_size, largest, temperature, last, last_id, tl.zeros_like(total), BLOCK)
    if top_p < 1:
        share = tl.minimum(tl.maximum(_ceil(total.to(tl.float64) * top_p), 1), total)
        last, last_id = _search(logits, vocab_size, largest, temperature, last, share, False, BLOCK)
    least = _ceil(min_p * SCALE)
    if (top_p < 1) | (min_p > 0):
        total = _sum_kept(logits, vocab_size, largest, temperature, last, last_id, least, BLOCK)

    token = tl.zeros_like(last) - 1
    target = tl.umulhi(total.to(tl.uint64), bits).to(tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights = _kept(logits, tokens, vocab_size, largest, temperature, last, last_id, least)
        token, target = _first_past(weights, target, start, token)
    return token


def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream_keys: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:
    """Slow and obvious `sample`: sorts, a row at a time."""
    params = (temperature, top_k, top_p, min_p, stream_keys, samples, positions)
    rows = zip(logits.float(), *(column.tolist() for column in params), strict=True)
    return torch.tensor([_sample_row_ref(*row) for row in rows], device=logits.device)


def _sample_row_ref(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, key: int, sample: int, position: int
) -> int:
    largest = logits.max()
    if position < 0 or not largest.isfinite():
        return -1
    if temperature == 0:
        return int((logits == largest).nonzero()[0])
    scores = (logits - largest) / logits.new_tensor(temperature)
    ids = scores.argsort(descending=True, stable=True)
    weights = (scores[ids].exp() * 2**40).long()
    if top_k > 0:
        weights[top_k:] = 0
    if top_p < 1:
        limit = max(1, math.ceil(float(weights.sum()) * top_p))
        weights[weights.cumsum(0) - weights >= limit] = 0
    weights[weights < min_p * 2**40] = 0
    by_id = torch.zeros_like(weights).scatter(0, ids, weights).cumsum(0)
    target = int(by_id[-1]) * uniform_bits(key, sample, position) >> 64
    return int((by_id > target).nonzero()[0])


def aot_variants() -> list[Variant]:
    signature = {
        "logits": "*bf16:16",
        "temperatures": "*fp32:16",
        "top_k": "*i32:16",
        "top_p": "*fp64:16",
        "min_p": "*fp64:16",
        "stream_keys": "*i64:16",
        "samples": "*i32:16",
        "positions": "*i64:16",
        "token_ids": "*i64:16",
        "vocab_size": "i32:16",
    }
    return [
        Variant(f"sample {name}", _sample_kernel, signature | {"logits": pointer}, {"BLOCK": MAX_BLOCK}, NUM_WARPS)
        for name, pointer in (("bf16", "*bf16:16"), ("fp16", "*fp16:16"), ("penalized", "*fp32:16"))
    ]
