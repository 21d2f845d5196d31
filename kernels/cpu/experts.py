"""The experts of a mixture-of-experts layer on packed weights: tokens grouped by expert, a few GEMMs for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.compiled import array, compiled, narrow, widen
from kernels.cpu.cores import all_cores, each_on_one_core, each_share, num_cores
from kernels.cpu.linear import PackedLinear, linear, pack, padding

READ_ROWS = 10  # that one core computes while it reads an expert's weights
MOST_SHARES = 1.5  # of a core in all the work: an expert that takes more is worked on by all


@dataclass(frozen=True)
class PackedExpert:
    """One expert: down(silu(gate x) * (up x)), or down(gelu(up x)) where it has no gate."""

    gate: PackedLinear | None
    up: PackedLinear
    down: PackedLinear


def pack_expert(
    up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None, *, is_gated: bool
) -> PackedExpert:
    """Pack one expert, so that a load need not hold more than one in both forms.

    up:   [2 * intermediate_size, hidden_size], gate first; [intermediate_size, hidden_size] where not gated
    down: [hidden_size, intermediate_size]
    """
    if not is_gated:
        return PackedExpert(None, pack(up, up_bias), pack(down, down_bias))
    assert up_bias is None, "gated experts have no biases in any checkpoint we read"
    gate, up = up.chunk(2)
    return PackedExpert(pack(gate), pack(up), pack(down, down_bias))


def experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: Sequence[PackedExpert],
    tokens_per_expert: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum over each token's experts, in slot order, in fp32, rounded once.

    A row's result is bitwise independent of the other rows.

    x:            [num_tokens, hidden_size]
    topk_weights: [num_tokens, top_k] fp32
    topk_ids:     [num_tokens, top_k] int64
    tokens_per_expert: [num_experts] int64, added to in place
    returns:      [num_tokens, hidden_size], dtype of x
    """
    if len(x) == 0:
        return torch.empty_like(x)
    chosen = topk_ids.flatten().bincount(minlength=len(packed))
    if tokens_per_expert is not None:
        tokens_per_expert += chosen
    counts = chosen.tolist()
    padded = [count + padding(count) for count in counts]  # once, not for each linear
    tokens, places = _group(topk_ids, padded)
    rows = torch.split(x.index_select(0, tokens), padded)
    out = [x.new_empty(0, x.shape[1])] * len(packed)

    def run(e: int) -> None:
        out[e] = _expert(rows[e], packed[e])

    shared, apart = _share_out(counts, num_cores())
    each_on_one_core(run, apart)
    with all_cores():
        for e in shared:
            run(e)
    return _combine(torch.cat(out), places, topk_weights)


def _share_out(counts: list[int], num_cores: int) -> tuple[list[int], list[int]]:
    """Which experts all cores work on together, and which they take one each. Those with most rows come first.

    To part and meet again around each GEMM costs a third of an expert's time. So only those are shared that would keep
    a core busy for long when the others have nothing left to do.
    """
    costs = {e: count + READ_ROWS for e, count in enumerate(counts) if count}
    used = sorted(costs, key=lambda e: -costs[e])
    left = sum(costs.values())
    for i, e in enumerate(used):
        if costs[e] * num_cores <= left * MOST_SHARES:
            return used[:i], used[i:]
        left -= costs[e]
    return used, []


def _expert(rows: Tensor, packed: PackedExpert) -> Tensor:
    if packed.gate is None:
        return linear(linear(rows, packed.up, "gelu"), packed.down)
    return linear(linear(rows, packed.up, times=linear(rows, packed.gate, "silu")), packed.down)


def _group(topk_ids: Tensor, padded: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lay out rows by expert, each expert's in order of their tokens, with room for padded[e] of expert e.

    returns: the token of each row (any in those left over), [sum(padded)], and the row of each choice, [num_tokens,
             top_k]; both int64
    """
    tokens, places = topk_ids.new_zeros(sum(padded)), topk_ids.new_empty(topk_ids.shape)
    starts = torch.tensor([0, *accumulate(padded)])
    _place(array(topk_ids.contiguous()), array(starts), array(tokens), array(places))
    return tokens, places


@compiled
def _place(topk_ids: Any, starts: Any, tokens: Any, places: Any) -> None:
    for token in range(topk_ids.shape[0]):
        for slot in range(topk_ids.shape[1]):
            e = topk_ids[token, slot]
            tokens[starts[e]] = token
            places[token, slot] = starts[e]
            starts[e] += 1


def _combine(rows: Tensor, places: Tensor, topk_weights: Tensor) -> Tensor:
    """Add the rows of each token's experts, times their weights, in slot order."""
    out = rows.new_empty(len(places), rows.shape[1])
    arrays = [array(t) for t in (rows, places, topk_weights.contiguous(), out)]
    each_share(lambda start, stop: _add_up(*arrays, start, stop), *out.shape)
    return out


@compiled
def _add_up(rows: Any, places: Any, weights: Any, out: Any, start: int, stop: int) -> None:
    width = out.shape[1]
    total = np.empty(width, np.float32)
    for t in range(start, stop):
        for slot in range(places.shape[1]):
            row, weight = rows[places[t, slot]], weights[t, slot]
            if slot == 0:
                for d in range(width):
                    total[d] = widen(row[d]) * weight
            else:
                for d in range(width):
                    total[d] += widen(row[d]) * weight
        for d in range(width):
            out[t, d] = narrow(total[d], out[t, d])


def experts_ref(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    is_gated: bool = True,
) -> Tensor:
    """Slow and obvious `experts` from plain weights [num_experts, ...]: a token and a slot at a time, in fp32."""
    total = torch.zeros(x.shape)
    for token, (weights, ids) in enumerate(zip(topk_weights, topk_ids.tolist(), strict=True)):
        for weight, e in zip(weights, ids, strict=True):
            hidden = F.linear(x[token].float(), up[e].float(), None if up_bias is None else up_bias[e].float())
            if is_gated:
                gate, linear_part = hidden.chunk(2)
                hidden = F.silu(gate) * linear_part
            else:
                hidden = F.gelu(hidden, approximate="tanh")
            total[token] += weight * F.linear(
                hidden, down[e].float(), None if down_bias is None else down_bias[e].float()
            )
    return total.to(x.dtype)
