"""Sample tokens from logits for a batch of rows: penalties, filters and the inverse CDF.

A token's score is (its logit - the largest logit) / temperature, and its weight is floor(2**40 * exp(score)). Weights
are integers whose sums are exact in any order, so a row's token depends neither on the other rows nor on how a sum is
split. Filters consider tokens in order of falling score, lowest token id first among equals; the final choice goes
through the tokens in order of their ids.
"""

import torch
from torch import Tensor

SCALE = 2**40  # a token less likely than 2**-40 times the best token has weight 0 and is never sampled
NUM_BUCKETS = 4096  # buckets of scores in the histogram of keep_first
BUCKETS_PER_UNIT = 147  # per unit of score: weight 0 begins at score -40 ln 2 = -27.73, the last bucket at -27.86
UNLIMITED = 2**62  # a limit that no sum of weights reaches
NUM_CANDIDATES = 64  # best tokens that are tried first: with top_k or top_p, the sampled token is mostly among them
ROWS_AT_ONCE = 16  # rows per pass, so that intermediate tensors stay in the CPU's cache


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Apply penalties, in place, to the logits of tokens that have been seen. Each (row, token) pair must be unique.

    logits:      [num_rows, vocab_size], fp32, contiguous
    rows:        [num_seen] int64, the row of each seen token
    token_ids:   [num_seen] int64
    counts:      [num_seen] fp32, how often the token was generated; 0 if it is only in the prompt
    repetition:  [num_rows] fp32; divides positive logits and multiplies negative ones, as in Hugging Face
    presence:    [num_rows] fp32; subtracted once from generated tokens, as in OpenAI's API
    frequency:   [num_rows] fp32; subtracted once for each time the token was generated
    """
    index = rows * logits.shape[1] + token_ids
    seen = logits.view(-1)[index]
    factor = repetition[rows]
    seen = torch.where(seen < 0, seen * factor, seen / factor)
    logits.view(-1)[index] = seen - counts * frequency[rows] - (counts > 0) * presence[rows]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, bits: list[int]) -> Tensor:
    """Sample one token per row. The filters top_k, top_p and min_p apply one after the other in this order.

    logits:       [num_rows, vocab_size], fp32; the largest of each row is finite
    temperature:  [num_rows] fp32, above 0
    top_k:        [num_rows] int64; keep the k most likely tokens; 0 = all
    top_p:        [num_rows] fp64, in (0, 1]; keep the fewest most likely tokens whose weights reach this share
    min_p:        [num_rows] fp64; keep tokens whose weight is at least this share of the largest weight
    bits:         num_rows random 64-bit numbers
    returns:      [num_rows] int64
    """
    sampled = []
    for start in range(0, len(bits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        sampled.append(_sample_rows(logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows], bits[rows]))
    return torch.cat(sampled)


def _sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, bits: list[int]
) -> Tensor:
    scores = (logits - logits.amax(1, keepdim=True)).div_(temperature[:, None])
    weights = scores.exp().mul_(SCALE).long()
    if weights.shape[1] <= NUM_CANDIDATES or not bool(((top_k > 0) | (top_p < 1)).any()):
        return choose_tokens(filter_weights(scores, weights, weights.sum(1), top_k, top_p, min_p), bits)

    token_ids, is_final = _sample_candidates(scores, weights, top_k, top_p, min_p, bits)
    rest = (~is_final).nonzero().squeeze(1)
    if len(rest) > 0:
        scores, weights, top_k, top_p, min_p = (t[rest] for t in (scores, weights, top_k, top_p, min_p))
        kept = filter_weights(scores, weights, weights.sum(1), top_k, top_p, min_p)
        token_ids[rest] = choose_tokens(kept, [bits[i] for i in rest.tolist()])
    return token_ids


def _sample_candidates(
    scores: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, bits: list[int]
) -> tuple[Tensor, Tensor]:
    """Sample from each row's NUM_CANDIDATES best tokens.

    Returns the tokens, and the rows for which sampling from all tokens gives the same result: those where top_k or
    top_p cuts off among tokens that are better than the last candidate.
    """
    totals = weights.sum(1)
    ids = scores.topk(NUM_CANDIDATES, sorted=False).indices.sort(1).values
    scores, weights = scores.gather(1, ids), weights.gather(1, ids)
    better = scores > scores.amin(1, keepdim=True)
    enough = (better * weights).sum(1) >= share_limits(totals, top_p)
    is_final = torch.where(top_k > 0, better.sum(1) >= top_k, enough & (top_p < 1))
    kept = filter_weights(scores, weights, totals, top_k, top_p, min_p)
    return ids.gather(1, choose_tokens(kept, bits)[:, None]).squeeze(1), is_final


def filter_weights(
    scores: Tensor, weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Return the weights, with 0 for the tokens that the filters drop.

    totals: [num_rows], the sum of weights that top_p is a share of if top_k is 0
    """
    has_top_k, has_top_p = top_k > 0, top_p < 1
    if bool(has_top_k.any()):
        weights = weights * keep_first(scores, (weights > 0).long(), torch.where(has_top_k, top_k, UNLIMITED))
        totals = torch.where(has_top_k, weights.sum(1), totals)
    if bool(has_top_p.any()):
        limits = torch.where(has_top_p, share_limits(totals, top_p), UNLIMITED)
        weights = weights * keep_first(scores, weights, limits)
    if bool((min_p > 0).any()):
        weights = weights * (weights >= (min_p * SCALE).ceil().long()[:, None])
    return weights


def share_limits(totals: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest weight, 1 or more, that is at least the share top_p of the total."""
    return (totals.double() * top_p).ceil().long().clamp(min=1)


def keep_first(scores: Tensor, amounts: Tensor, limits: Tensor) -> Tensor:
    """Keep the best tokens of each row while the amounts of all better tokens together are below the row's limit.

    Tokens are in order of falling score, lowest id first among equals. A histogram finds the one bucket of scores in
    which a row's limit falls, and only the tokens of that bucket are sorted.

    scores:   [num_rows, num_tokens], 0 or less, in order of token ids
    amounts:  [num_rows, num_tokens] int64; a token with amount 0 may be kept or dropped
    limits:   [num_rows] int64, 1 or more
    returns:  [num_rows, num_tokens] bool
    """
    buckets = (scores * -BUCKETS_PER_UNIT).clamp_(max=NUM_BUCKETS - 1).long()
    sums = amounts.new_zeros(len(amounts), NUM_BUCKETS).scatter_add_(1, buckets, amounts)
    before = sums.cumsum(1) - sums
    last = (before < limits[:, None]).sum(1, keepdim=True) - 1
    keep = buckets < last

    rows, token_ids = ((buckets == last) & (amounts > 0)).nonzero(as_tuple=True)
    order = scores[rows, token_ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    rows, token_ids = rows[order], token_ids[order]
    inside = amounts[rows, token_ids]
    ahead = inside.cumsum(0) - inside
    first_of_row = torch.searchsorted(rows, rows)
    ahead = ahead - ahead[first_of_row] + before.gather(1, last).squeeze(1)[rows]
    keep[rows, token_ids] = ahead < limits[rows]
    return keep


def choose_tokens(weights: Tensor, bits: list[int]) -> Tensor:
    """Return the first token of each row whose running sum, by token id, exceeds bits / 2**64 of the row's sum.

    The result is [num_rows] int64.
    """
    sums = weights.cumsum(1)
    targets = [total * b >> 64 for total, b in zip(sums[:, -1].tolist(), bits, strict=True)]
    return torch.searchsorted(sums, sums.new_tensor(targets)[:, None], right=True).squeeze(1)


def top_tokens(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best tokens per row, best first, lowest id first among equals (torch.topk returns any of them).

    scores:   [num_rows, vocab_size]
    returns:  scores and int64 ids, [num_rows, min(k, vocab_size)]
    """
    vocab_size = scores.shape[1]
    k = min(k, vocab_size)
    values, ids = scores.topk(min(k + 16, vocab_size))
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if k > 0 and values.shape[1] < vocab_size:
        # Tokens equal to the k-th may be among those that topk did not return.
        for row in (values[:, k - 1] == values[:, -1]).nonzero().flatten().tolist():
            ids[row, :k] = scores[row].sort(descending=True, stable=True).indices[:k]
            values[row, :k] = scores[row, ids[row, :k]]
    return values[:, :k], ids[:, :k]
