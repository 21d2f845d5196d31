"""Draw tokens from logits: penalties, filters and the inverse CDF, for a batch of rows.

A token's score is (its logit - the largest) / temperature, its weight floor(2**40 * exp(score)). Weights are integers:
their sums are exact in any order, so a row's token depends neither on the rows around it nor on how a sum is split.
Filters go by falling score, lowest token id first among equals; the draw itself goes by token id.
"""

import torch
from torch import Tensor

SCALE = 2**40  # what is less likely than 2**-40 of the best token has weight 0 and is never drawn
NUM_BUCKETS = 4096
BUCKETS_PER_UNIT = 147  # weight 0 begins at score -40 ln 2 = -27.73, the last bucket at -27.86
UNLIMITED = 2**62
NUM_FEW = 64  # most draws that are filtered end among so many best tokens
ROWS_AT_ONCE = 16  # intermediate tensors stay in the CPU's cache


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Lower, in place, the logits of tokens that have been seen; no (row, token) pair may come twice.

    logits:      [num_rows, vocab_size], fp32, contiguous
    rows:        [num_seen] int64, the row of each seen token
    token_ids:   [num_seen] int64
    counts:      [num_seen] fp32, how often the token was generated; 0 where it is only in the prompt
    repetition:  [num_rows] fp32; divides positive logits and multiplies negative ones, as in Hugging Face
    presence:    [num_rows] fp32; subtracted once from tokens generated, as in OpenAI's API
    frequency:   [num_rows] fp32; subtracted as often as the token was generated
    """
    index = rows * logits.shape[1] + token_ids
    seen = logits.view(-1)[index]
    factor = repetition[rows]
    seen = torch.where(seen < 0, seen * factor, seen / factor)
    logits.view(-1)[index] = seen - counts * frequency[rows] - (counts > 0) * presence[rows]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, bits: list[int]) -> Tensor:
    """Draw one token a row, each filter applied to what the one before it kept: top_k, top_p, min_p.

    logits:       [num_rows, vocab_size], fp32; the largest of a row finite
    temperature:  [num_rows] fp32, above 0
    top_k:        [num_rows] int64; the k likeliest tokens; 0 = all
    top_p:        [num_rows] fp64, in (0, 1]; the fewest likeliest tokens whose weights reach this share
    min_p:        [num_rows] fp64; tokens whose weight is at least this share of the largest
    bits:         num_rows random 64-bit numbers
    returns:      [num_rows] int64
    """
    drawn = []
    for start in range(0, len(bits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        drawn.append(_sample_rows(logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows], bits[rows]))
    return torch.cat(drawn)


def _sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, bits: list[int]
) -> Tensor:
    scores = (logits - logits.amax(1, keepdim=True)).div_(temperature[:, None])
    weights = scores.exp().mul_(SCALE).long()
    if weights.shape[1] <= NUM_FEW or not bool(((top_k > 0) | (top_p < 1)).any()):
        return draw(filter_weights(scores, weights, weights.sum(1), top_k, top_p, min_p), bits)

    token_ids, settled = _sample_few(scores, weights, top_k, top_p, min_p, bits)
    rest = (~settled).nonzero().squeeze(1)
    if len(rest) > 0:
        scores, weights, top_k, top_p, min_p = (t[rest] for t in (scores, weights, top_k, top_p, min_p))
        kept = filter_weights(scores, weights, weights.sum(1), top_k, top_p, min_p)
        token_ids[rest] = draw(kept, [bits[i] for i in rest.tolist()])
    return token_ids


def _sample_few(
    scores: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, bits: list[int]
) -> tuple[Tensor, Tensor]:
    """The tokens drawn from each row's NUM_FEW best, and the rows for which that is the same as from all: those where
    top_k or top_p cuts among tokens better than the last of the few."""
    totals = weights.sum(1)
    ids = scores.topk(NUM_FEW, sorted=False).indices.sort(1).values
    scores, weights = scores.gather(1, ids), weights.gather(1, ids)
    better = scores > scores.amin(1, keepdim=True)
    enough = (better * weights).sum(1) >= share_limits(totals, top_p)
    settled = torch.where(top_k > 0, better.sum(1) >= top_k, enough & (top_p < 1))
    kept = filter_weights(scores, weights, totals, top_k, top_p, min_p)
    return ids.gather(1, draw(kept, bits)[:, None]).squeeze(1), settled


def filter_weights(
    scores: Tensor, weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The weights, with 0 for the tokens that the filters drop. totals: [num_rows], what top_p is a share of where
    top_k is 0."""
    by_count, by_share = top_k > 0, top_p < 1
    if bool(by_count.any()):
        weights = weights * keep_first(scores, (weights > 0).long(), torch.where(by_count, top_k, UNLIMITED))
        totals = torch.where(by_count, weights.sum(1), totals)
    if bool(by_share.any()):
        limits = torch.where(by_share, share_limits(totals, top_p), UNLIMITED)
        weights = weights * keep_first(scores, weights, limits)
    if bool((min_p > 0).any()):
        weights = weights * (weights >= (min_p * SCALE).ceil().long()[:, None])
    return weights


def share_limits(totals: Tensor, top_p: Tensor) -> Tensor:
    """Smallest weight that is at least the share top_p of the total, 1 or more."""
    return (totals.double() * top_p).ceil().long().clamp(min=1)


def keep_first(scores: Tensor, amounts: Tensor, limits: Tensor) -> Tensor:
    """Keep tokens by falling score, lowest id first among equals, while the amounts before them are below the limit.

    A histogram finds the one bucket of scores in which a row's limit falls; only that bucket's tokens are sorted.

    scores:   [num_rows, num_tokens], 0 or less, in order of token ids
    amounts:  [num_rows, num_tokens] int64; what has amount 0 may be kept or dropped
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


def draw(weights: Tensor, bits: list[int]) -> Tensor:
    """First token whose running sum, by token id, exceeds bits / 2**64 of the row's sum. [num_rows] int64."""
    sums = weights.cumsum(1)
    targets = [total * b >> 64 for total, b in zip(sums[:, -1].tolist(), bits, strict=True)]
    return torch.searchsorted(sums, sums.new_tensor(targets)[:, None], right=True).squeeze(1)


def top_tokens(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best tokens a row, best first, lowest id first among equals (torch.topk takes any of them).

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
        # Equals of the k-th may be among those not fetched.
        for row in (values[:, k - 1] == values[:, -1]).nonzero().flatten().tolist():
            ids[row, :k] = scores[row].sort(descending=True, stable=True).indices[:k]
            values[row, :k] = scores[row, ids[row, :k]]
    return values[:, :k], ids[:, :k]
