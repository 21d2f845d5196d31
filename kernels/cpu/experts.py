"""Run the experts of a mixture-of-experts layer on packed weights: group tokens by expert, then multiply."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.activation import SWIGLU, Activation, activate_ref
from moray.kernels.cpu import quantized_calls
from moray.kernels.cpu.epilogue import OF_PRODUCTS
from moray.kernels.cpu.expert_step import DOWN, GATE, UP, add_up, run_experts, run_split_experts
from moray.kernels.cpu.linear import PackedLinear, linear
from moray.kernels.cpu.numba_intrinsics import array, compiled
from moray.kernels.cpu.quantized import PackedQuantized, quantized_linear
from moray.kernels.cpu.self_check import checked_pack
from moray.kernels.cpu.thread_pool import all_cores, num_cores, parallel_for, parallel_rows

WEIGHT_READ_COST_ROWS = 10  # cost of reading an expert's weights, in rows that one core computes in the same time
MAX_CORE_SHARE = 1.5  # times one core's share of all work: an expert that costs more is computed by all cores together


@dataclass(frozen=True)
class PackedExpert:
    """Holds the packed weights of one expert, whose gate is None if its activation has none."""

    gate: PackedLinear | PackedQuantized | None
    up: PackedLinear | PackedQuantized
    down: PackedLinear | PackedQuantized
    activation: Activation


def pack_expert(
    up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None, *, activation: Activation
) -> PackedExpert:
    """Pack one expert. Experts are packed one by one, so that only one is in memory in both forms.

    up:   [2 * intermediate_size, hidden_size], gate first; [intermediate_size, hidden_size] if not gated
    down: [hidden_size, intermediate_size]
    up_bias, down_bias: [outputs of up] and [hidden_size], or None
    """
    packed_down, gate = checked_pack(down, down_bias), None
    if activation.is_gated:
        of_gate, up = up.chunk(2)
        gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        gate = checked_pack(of_gate, gate_bias)
    return PackedExpert(gate, checked_pack(up, up_bias), packed_down, activation)


class PackedExperts(Sequence[PackedExpert]):
    """Holds the packed experts of a layer, which `experts` runs in one compiled call if their kernels allow it."""

    def __init__(self, packed: Iterable[PackedExpert]) -> None:
        self._packed = tuple(packed)
        self._tables: dict[torch.dtype, _Table] = {}

    def table(self, dtype: torch.dtype) -> Any:
        """Return the table for expert_step.run_experts and rows of a dtype; None if there is a kernel without entry."""
        if dtype not in self._tables:
            self._tables[dtype] = _Table(self._packed, dtype)
        return self._tables[dtype].addresses

    @overload
    def __getitem__(self, index: int) -> PackedExpert: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PackedExpert]: ...

    def __getitem__(self, index: int | slice) -> PackedExpert | Sequence[PackedExpert]:
        return self._packed[index]

    def __len__(self) -> int:
        return len(self._packed)


class _Table:
    """Holds the descriptions of all weights and their addresses, [num_experts, 3]; None if a kernel has no entry."""

    def __init__(self, packed: Sequence[PackedExpert], dtype: torch.dtype) -> None:
        self.addresses: Any = None
        parts = [[_describe(part, dtype) for part in (e.up, e.down, e.gate) if part is not None] for e in packed]
        if any(description is None for of_expert in parts for description in of_expert):
            return
        self._descriptions = parts
        self.addresses = np.zeros((len(packed), 3), np.uint64)
        for row, of_expert in zip(self.addresses, parts, strict=True):
            for column, description in zip((UP, DOWN, GATE), of_expert, strict=False):
                row[column] = description.ctypes.data


def _describe(packed: PackedLinear | PackedQuantized, dtype: torch.dtype) -> Any:
    return quantized_calls.describe(packed, dtype) if isinstance(packed, PackedQuantized) else packed.description


def experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: Sequence[PackedExpert],
    tokens_per_expert: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, added in the order of topk_ids in fp32 and rounded once.

    A row's result is bitwise independent of the other rows.

    x:            [num_tokens, hidden_size]
    topk_weights: [num_tokens, top_k] fp32
    topk_ids:     [num_tokens, top_k] int64
    tokens_per_expert: [num_experts] int64, to which the tokens of each expert are added in place; None = not counted
    gather:       of weights that hold a part of the outputs alone: puts the columns of all parts next to each other,
                  first those of the hidden rows, then those of the result. None = the weights are whole
    returns:      [num_tokens, hidden_size], dtype of x
    """
    if len(x) == 0:
        return torch.empty_like(x)
    table = packed.table(x.dtype) if isinstance(packed, PackedExperts) else None
    if table is not None:
        if gather is None:
            return run_experts(x, topk_weights, topk_ids, table, packed[0].activation, tokens_per_expert)
        widths = packed[0].up.out_features, packed[0].down.out_features
        activation = packed[0].activation
        return run_split_experts(x, topk_weights, topk_ids, table, activation, tokens_per_expert, gather, widths)
    tokens_of_expert = topk_ids.flatten().bincount(minlength=len(packed))
    if tokens_per_expert is not None:
        tokens_per_expert += tokens_of_expert
    counts = tokens_of_expert.tolist()
    tokens, places = _group(topk_ids, counts)
    rows = x.index_select(0, tokens)
    if gather is None:
        return _combine(_run_each(_expert, rows, packed, counts), places, topk_weights)
    hidden = gather(_run_each(_hidden, rows, packed, counts))
    return gather(_combine(_run_each(_down, hidden, packed, counts), places, topk_weights))


def experts_of_rank(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: Sequence[PackedExpert],
    rank: int,
    num_experts: int,
    gather: Callable[[Tensor], Tensor],
    tokens_per_expert: Tensor | None = None,
) -> Tensor:
    """Return what `experts` returns, bit by bit, where each of several ranks holds as many experts whole.

    A rank runs the rows of its experts. The rows of all ranks are gathered, and each rank adds up all of them.

    packed:      experts rank * len(packed) .. (rank + 1) * len(packed) - 1
    num_experts: of all ranks
    gather:      puts the columns of all ranks next to each other
    The rest is as for `experts`.
    """
    counts = topk_ids.flatten().bincount(minlength=num_experts)
    if tokens_per_expert is not None:
        tokens_per_expert += counts
    tokens, places = _group(topk_ids, counts.tolist())
    held, size = len(packed), num_experts // len(packed)
    rows_of_rank = counts.view(size, held).sum(1)
    starts = rows_of_rank.cumsum(0) - rows_of_rank  # the first row of each rank
    first, num_rows = int(starts[rank]), int(rows_of_rank[rank])
    own = x.index_select(0, tokens[first : first + num_rows])
    ids = torch.arange(held).repeat_interleave(counts[rank * held : (rank + 1) * held])
    # Each row as a token of one expert, whose weight of 1 changes no bit. The rows after a rank's own are never read.
    part = x.new_empty(int(rows_of_rank.max()), x.shape[1])
    part[:num_rows] = experts(own, torch.ones(num_rows, 1), ids[:, None], packed)
    rows = gather(part).view(-1, x.shape[1])  # row i of rank r is at i * size + r
    rank_of = topk_ids // held
    return _combine(rows, (places - starts[rank_of]) * size + rank_of, topk_weights)


def _run_each(
    function: Callable[[Tensor, PackedExpert], Tensor], rows: Tensor, packed: Sequence[PackedExpert], counts: list[int]
) -> Tensor:
    """Call a function with the rows of each expert that has some; return its results one after the other."""
    of_expert, out = torch.split(rows, counts), dict[int, Tensor]()

    def run(e: int) -> None:
        out[e] = function(of_expert[e], packed[e])

    on_all_cores, on_one_core = _partition_experts(counts, num_cores())
    parallel_for(run, on_one_core)
    with all_cores():
        for e in on_all_cores:
            run(e)
    return torch.cat([out[e] for e in sorted(out)])


def _partition_experts(counts: list[int], num_cores: int) -> tuple[list[int], list[int]]:
    """Return the experts that all cores compute together, and those that one core computes alone, most rows first.

    Starting and joining threads around each GEMM costs a third of an expert's time. So the cores share only those
    experts that would keep one core busy long after the other cores have finished.
    """
    costs = {e: count + WEIGHT_READ_COST_ROWS for e, count in enumerate(counts) if count}
    used = sorted(costs, key=lambda e: -costs[e])
    remaining = sum(costs.values())
    for i, e in enumerate(used):
        if costs[e] * num_cores <= remaining * MAX_CORE_SHARE:
            return used[:i], used[i:]
        remaining -= costs[e]
    return used, []


def _expert(rows: Tensor, packed: PackedExpert) -> Tensor:
    return _down(_hidden(rows, packed), packed)


def _hidden(rows: Tensor, packed: PackedExpert) -> Tensor:
    of_gate, of_up = OF_PRODUCTS[packed.activation.kind]
    limit = packed.activation.limit
    gate = None if packed.gate is None else _multiply(rows, packed.gate, of_gate, limit=limit)
    return _multiply(rows, packed.up, of_up, gate, limit)


def _down(hidden: Tensor, packed: PackedExpert) -> Tensor:
    return _multiply(hidden, packed.down)


def _multiply(
    x: Tensor,
    packed: PackedLinear | PackedQuantized,
    activation: str = "none",
    times: Tensor | None = None,
    limit: float = 0.0,
) -> Tensor:
    if isinstance(packed, PackedQuantized):
        return quantized_linear(x, packed, activation, times, limit)
    return linear(x, packed, activation, times, limit)


def _group(topk_ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Group rows by expert, in order of their tokens within an expert; expert e has counts[e] rows.

    returns: the token of each row, [sum(counts)], and the row of each (token, slot), [num_tokens, top_k]; both int64
    """
    tokens, places = topk_ids.new_empty(sum(counts)), topk_ids.new_empty(topk_ids.shape)
    starts = torch.tensor([0, *accumulate(counts)])
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
    """Add up the rows of each token's experts times their weights, in slot order."""
    out = rows.new_empty(len(places), rows.shape[1])
    arrays = [array(t) for t in (rows, places, topk_weights.contiguous(), out)]
    parallel_rows(lambda start, stop: _add_up(*arrays, start, stop), *out.shape)
    return out


@compiled
def _add_up(rows: Any, places: Any, weights: Any, out: Any, start: int, stop: int) -> None:
    add_up(rows, places, weights, out, start, stop)


def experts_ref(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Activation = SWIGLU,
) -> Tensor:
    """Compute `experts` slowly and obviously in fp32 from plain weights [num_experts, ...], one slot at a time."""
    total = torch.zeros(x.shape)
    for token, (weights, ids) in enumerate(zip(topk_weights, topk_ids.tolist(), strict=True)):
        for weight, e in zip(weights, ids, strict=True):
            first = F.linear(x[token].float(), up[e].float(), None if up_bias is None else up_bias[e].float())
            hidden = activate_ref(activation, first)
            total[token] += weight * F.linear(
                hidden, down[e].float(), None if down_bias is None else down_bias[e].float()
            )
    return total.to(x.dtype)
