"""The weight format of float weights on the CPU: packed for the kernels of kernels/cpu/linear.py."""

from collections.abc import Sequence
from functools import partial
from itertools import repeat

from torch import Tensor

from moray.engine.backends.formats import ExpertsKernel, ExpertWeights, LinearKernel, RoutingRule
from moray.kernels.cpu.experts import PackedExpert, experts, pack_expert
from moray.kernels.cpu.linear import linear
from moray.kernels.cpu.route import softmax_topk, sparsemixer
from moray.kernels.cpu.self_check import checked_pack


class PackedFormat:
    """Copies each weight into the layout of the best kernel that passes the check for its shape."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> LinearKernel:
        """Pack a linear layer; the original is not kept, except where the kernel reads it as it is."""
        return partial(linear, packed=checked_pack(weight, bias))

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        """Pack the experts one by one; the originals are not kept, except where the kernel reads them as they are."""
        parts = [
            repeat(None) if part is None else part
            for part in (weights.up, weights.down, weights.up_bias, weights.down_bias)
        ]
        tensors = zip(*parts, strict=False)  # repeat has no end
        return partial(run_experts, packed=[pack_expert(*expert, is_gated=weights.is_gated) for expert in tensors])


def run_experts(
    x: Tensor,
    router_logits: Tensor,
    rule: RoutingRule,
    num_tokens: Tensor | None,
    tokens_per_expert: Tensor | None,
    *,
    packed: Sequence[PackedExpert],
) -> Tensor:
    """Choose each token's experts and run them; an ExpertsKernel."""
    assert num_tokens is None, "steps on the CPU have no padding"
    weights, ids = choose_experts(router_logits, rule)
    return experts(x, weights, ids, packed, tokens_per_expert)


def choose_experts(router_logits: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Return the weights, [num_tokens, top_k] fp32, and the ids, int64, of each token's experts."""
    if rule.method == "sparsemixer":
        return sparsemixer(router_logits, rule.jitter)
    return softmax_topk(router_logits, rule.top_k)
