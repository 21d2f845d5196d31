"""The experts of a mixture-of-experts layer on packed weights: tokens grouped by expert, one GEMM pair each."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import PackedLinear, linear, pack


@dataclass(frozen=True)
class PackedExperts:
    """One layer's experts. up[e] makes the intermediate (gate rows first where gated), down[e] brings it back."""

    up: tuple[PackedLinear, ...]
    down: tuple[PackedLinear, ...]
    is_gated: bool

    @property
    def num_experts(self) -> int:
        return len(self.up)


def pack_expert(
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
) -> tuple[PackedLinear, PackedLinear]:
    """Pack one expert: up [2I or I, H], down [H, I]. Pack expert by expert to keep the load's peak memory low."""
    return pack(up, up_bias), pack(down, down_bias)


def experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, packed: PackedExperts) -> Tensor:
    """Return the weighted sum over each token's experts, in slot order, accumulated in fp32.

    Gated: down(silu(gate) * up). Not gated: down(gelu_tanh(up)).

    x:            [num_tokens, hidden_size]
    topk_weights: [num_tokens, top_k] fp32
    topk_ids:     [num_tokens, top_k] int64
    returns:      [num_tokens, hidden_size], dtype of x
    """
    top_k = topk_ids.shape[1]
    flat = topk_ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=packed.num_experts).tolist()
    rows = x[order // top_k]
    out = x.new_empty(rows.shape)
    start = 0
    for e, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            out[part] = linear(_intermediate(rows[part], packed, e), packed.down[e])
            start += count
    per_slot = torch.empty_like(out)
    per_slot[order] = out
    weighted = per_slot.view(-1, top_k, x.shape[1]).float() * topk_weights[:, :, None]
    total = weighted[:, 0]
    for slot in range(1, top_k):
        total = total + weighted[:, slot]
    return total.to(x.dtype)


def _intermediate(rows: Tensor, packed: PackedExperts, e: int) -> Tensor:
    if not packed.is_gated:
        return linear(rows, packed.up[e], "gelu")
    gate, up = linear(rows, packed.up[e]).chunk(2, dim=-1)
    return F.silu(gate) * up
