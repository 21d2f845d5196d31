"""The experts of a mixture-of-experts layer on packed weights: tokens grouped by expert, two GEMMs for each."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import PackedLinear, linear, pack, silu

ROWS_AT_ONCE = 64  # of the intermediate in fp32: intermediate tensors stay in the CPU's cache


@dataclass(frozen=True)
class PackedExperts:
    """One layer's experts. up[e] makes the intermediate (gate first where gated), down[e] brings it back."""

    up: tuple[PackedLinear, ...]
    down: tuple[PackedLinear, ...]
    is_gated: bool


def pack_expert(
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
) -> tuple[PackedLinear, PackedLinear]:
    """Pack one expert, so that a load need not hold more than one in both forms.

    up:   [2 * intermediate_size, hidden_size], gate first; [intermediate_size, hidden_size] where not gated
    down: [hidden_size, intermediate_size]
    """
    return pack(up, up_bias), pack(down, down_bias)


def experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: PackedExperts) -> Tensor:
    """Return the weighted sum over each token's experts, in slot order, in fp32, rounded once.

    Gated: down(silu(gate) * up). Not gated: down(gelu(up)), the tanh form. A row's result is bitwise independent of
    the other rows.

    x:            [num_tokens, hidden_size]
    topk_weights: [num_tokens, top_k] fp32
    topk_ids:     [num_tokens, top_k] int64
    returns:      [num_tokens, hidden_size], dtype of x
    """
    top_k = topk_ids.shape[1]
    if len(x) == 0:
        return torch.empty_like(x)
    order = topk_ids.flatten().argsort(stable=True)
    counts = topk_ids.flatten().bincount(minlength=len(packed.up)).tolist()
    rows = x.index_select(0, order // top_k)
    hidden = _swiglu(_each(rows, counts, packed.up)) if packed.is_gated else _each(rows, counts, packed.up, "gelu")
    return _combine(_each(hidden, counts, packed.down), order, topk_weights).to(x.dtype)


def _each(rows: Tensor, counts: list[int], packed: tuple[PackedLinear, ...], activation: str = "none") -> Tensor:
    """Apply each expert's linear to its rows, which stand in the order of the experts."""
    parts = zip(torch.split(rows, counts), counts, packed, strict=True)
    return torch.cat([linear(part, of_expert, activation) for part, count, of_expert in parts if count])


def _swiglu(gate_up: Tensor) -> Tensor:
    hidden = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows, of_rows in zip(torch.split(gate_up, ROWS_AT_ONCE), torch.split(hidden, ROWS_AT_ONCE), strict=True):
        gate, up = rows.float().chunk(2, dim=-1)
        of_rows.copy_(silu(gate).mul_(up))
    return hidden


def _combine(out: Tensor, order: Tensor, topk_weights: Tensor) -> Tensor:
    """Bring rows back from expert order and add each token's, in slot order."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    weighted = out.index_select(0, place).view(*topk_weights.shape, -1) * topk_weights.unsqueeze(-1)
    total = weighted[:, 0]
    for slot in range(1, topk_weights.shape[1]):
        total = total + weighted[:, slot]
    return total


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
