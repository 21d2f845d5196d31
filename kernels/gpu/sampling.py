"""Sample tokens from logits on the device, without a sort: the same tokens as kernels/cpu/sampling.py.

A token's score is (its logit - the largest logit) / temperature, and its weight is floor(2**40 * exp(score)). Weights
are integers whose sums are exact in any order. top_k and top_p both keep the first tokens of the same order, by falling
score, lowest id first among equals, so the tokens they keep end at one token. A binary search over the range of scores
finds it, with a pass over the row per step. One program per row: 3 passes without filters, some 10 to 20 more for each
search.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.cpu.philox import uniform_bits
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.philox import random_bits
from moray.kernels.gpu.sizes import next_power_of_2
from moray.kernels.gpu.tuning import Gpu

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
    """Sample one token per row. The filters top_k, top_p and min_p apply one after the other in this order.

    logits:       [num_rows, vocab_size], any floating dtype, contiguous
    temperature:  [num_rows] fp32; 0 = the token of the largest logit, the lowest id among equals
    top_k:        [num_rows] int32; keep the k most likely tokens; 0 = all
    top_p:        [num_rows] fp64, in (0, 1]; keep the fewest most likely tokens whose weights reach this share
    min_p:        [num_rows] fp64; keep tokens whose weight is at least this share of the largest weight
    stream_keys:  [num_rows] int64, the requests' random streams
    samples:      [num_rows] int32, numbers of the samples in their requests
    positions:    [num_rows] int64, number of tokens generated before this one; -1 = a row of padding
    returns:      [num_rows] int64; -1 if logits are not finite (NaN, or the largest is infinite), and for padding
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
            BLOCK=min(next_power_of_2(vocab_size), MAX_BLOCK),
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
            k, p, min_weight = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
            token = _sample_row(logits, vocab_size, largest, temperature, k, p, min_weight, bits, BLOCK)
    tl.store(token_ids + row, token.to(tl.int64))


@triton.jit
def _largest(logits, vocab_size, BLOCK: tl.constexpr):
    """Return the largest logit and the lowest id that has it; id -1 if the largest is not finite or there is a NaN."""
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
def _keys_and_weights(logits, tokens, vocab_size, largest, temperature):
    """Return int32 keys that rise as scores fall (the bits of -score), and int64 weights, 0 beyond the vocabulary."""
    values = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    scores = tl.div_rn(values - largest, temperature)
    return tl.abs(scores).to(tl.int32, bitcast=True), (tl.exp(scores) * SCALE).to(tl.int64)


@triton.jit
def _find_crossing(amounts, target, start, token):
    """Return the block's first token at which the sum of amounts exceeds the target (else `token`), and the new target.

    The new target is the target minus the block's sum, negative once the target has been exceeded.
    """
    amount = tl.sum(amounts)
    if (target >= 0) & (target < amount):
        token = start + tl.sum((tl.cumsum(amounts) <= target).to(tl.int32))
    return token, target - amount


@triton.jit
def _summarize(logits, vocab_size, largest, temperature, BLOCK: tl.constexpr):
    """Return the sum of the weights, the number of weights above 0, and the largest key among those."""
    sums = tl.zeros([BLOCK], tl.int64)
    counts = tl.zeros([BLOCK], tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        keys, weights = _keys_and_weights(logits, start + tl.arange(0, BLOCK), vocab_size, largest, temperature)
        sums += weights
        counts += (weights > 0).to(tl.int32)
        last = tl.where(weights > 0, tl.maximum(last, keys), last)
    return tl.sum(sums), tl.sum(counts), tl.max(last)


@triton.jit
def _select_amounts(is_in, weights, BY_COUNT: tl.constexpr):
    return is_in.to(tl.int64) if BY_COUNT else tl.where(is_in, weights, 0)


@triton.jit
def _search(logits, vocab_size, largest, temperature, last, limit, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return key and id of the token at which amounts, summed by falling score, reach the limit.

    An amount is 1 if BY_COUNT, else the token's weight. last: the key of a token, up to which the limit is reached.
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
            keys, weights = _keys_and_weights(logits, start + lanes, vocab_size, largest, temperature)
            is_below = keys <= middle
            sums += _select_amounts(is_below, weights, BY_COUNT)
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
        keys, weights = _keys_and_weights(logits, start + lanes, vocab_size, largest, temperature)
        token, target = _find_crossing(_select_amounts(keys == last, weights, BY_COUNT), target, start, token)
    return last, token


@triton.jit
def _kept_weights(logits, tokens, vocab_size, largest, temperature, last, last_id, min_weight):
    """Return weights, 0 for tokens that come after (last, last_id) in order and for weights below min_weight."""
    keys, weights = _keys_and_weights(logits, tokens, vocab_size, largest, temperature)
    is_first = (keys < last) | ((keys == last) & (tokens <= last_id))
    return tl.where(is_first & (weights >= min_weight), weights, 0)


@triton.jit
def _sum_kept(logits, vocab_size, largest, temperature, last, last_id, min_weight, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        sums += _kept_weights(logits, tokens, vocab_size, largest, temperature, last, last_id, min_weight)
    return tl.sum(sums)


@triton.jit
def _ceil(x):
    """Round a non-negative double up, to int64."""
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


@triton.jit
def _sample_row(logits, vocab_size, largest, temperature, top_k, top_p, min_p, bits, BLOCK: tl.constexpr):
    """Sample one token of a row whose largest logit is finite."""
    total, count, last = _summarize(logits, vocab_size, largest, temperature, BLOCK)
    last_id = tl.zeros_like(last) + vocab_size
    if (top_k > 0) & (top_k < count):
        k = top_k.to(tl.int64)
        last, last_id = _search(logits, vocab_size, largest, temperature, last, k, True, BLOCK)
        total = _sum_kept(logits, vocab_size, largest, temperature, last, last_id, tl.zeros_like(total), BLOCK)
    if top_p < 1:
        share = tl.minimum(tl.maximum(_ceil(total.to(tl.float64) * top_p), 1), total)
        last, last_id = _search(logits, vocab_size, largest, temperature, last, share, False, BLOCK)
    min_weight = _ceil(min_p * SCALE)
    if (top_p < 1) | (min_p > 0):
        total = _sum_kept(logits, vocab_size, largest, temperature, last, last_id, min_weight, BLOCK)

    token = tl.zeros_like(last) - 1
    target = tl.umulhi(total.to(tl.uint64), bits).to(tl.int64)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights = _kept_weights(logits, tokens, vocab_size, largest, temperature, last, last_id, min_weight)
        token, target = _find_crossing(weights, target, start, token)
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
    """Compute `sample` slowly and obviously: sort, one row at a time."""
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


def aot_variants(gpu: Gpu) -> list[Variant]:
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
    }
    return [
        Variant(
            f"sample {name}",
            _sample_kernel,
            signature | {"logits": pointer, "vocab_size": vocab_size},
            {"BLOCK": MAX_BLOCK},
            NUM_WARPS,
            has_wide_loads=vocab_size == "i32:16",
        )
        for name, pointer, vocab_size in (
            ("bf16", "*bf16:16", "i32:16"),
            ("fp16", "*fp16:16", "i32:16"),
            ("penalized or fp32", "*fp32:16", "i32:16"),
            ("bf16, vocabulary of 32002", "*bf16:16", "i32"),
            ("penalized, vocabulary of 32002", "*fp32:16", "i32"),
        )
    ]
