"""The weight format of float weights on the CPU: packed for the kernels of kernels/cpu/linear.py."""

from collections.abc import Callable
from functools import partial
from itertools import repeat

from torch import Tensor

from moray.engine.backends.communicator import ALONE, Communicator, gather_of
from moray.engine.backends.formats import ExpertsKernel, ExpertWeights, LinearKernel, RoutingRule
from moray.engine.errors import DeviceError
from moray.kernels.cpu.experts import PackedExperts, experts, experts_of_rank, pack_expert
from moray.kernels.cpu.linear import ONEDNN, PLAIN, PackedLinear, linear, paths
from moray.kernels.cpu.quantized import PackedQuantized
from moray.kernels.cpu.route import sigmoid_one, softmax_all, softmax_topk, sparsemixer
from moray.kernels.cpu.self_check import checked_pack


class PackedFormat:
    """Copies each weight into the layout of the best kernel that passes the check for its shape."""

    def __init__(self, communicator: Communicator = ALONE) -> None:
        self._communicator = communicator

    def pack_linear(self, weight: Tensor, bias: Tensor | None, num_outputs: int) -> LinearKernel:
        """Pack a linear layer; the original is not kept, except where the kernel reads it as it is.

        Raises DeviceError if the weight is split among ranks and the kernel does not allow that.
        """
        return partial(linear, packed=self._allowed(checked_pack(weight, bias), weight))

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        """Pack the experts one by one; the originals are not kept, except where the kernel reads them as they are.

        Raises DeviceError if the weights are split among ranks and a kernel does not allow that.
        """
        parts = [
            repeat(None) if part is None else part
            for part in (weights.up, weights.down, weights.up_bias, weights.down_bias)
        ]
        tensors = zip(*parts, strict=False)  # repeat has no end
        packed = PackedExperts(pack_expert(*expert, activation=weights.activation) for expert in tensors)
        if self._communicator.partition.expert_parallel:
            return partial(run_whole_experts, packed=packed, communicator=self._communicator)
        for part in (packed[0].up, packed[0].down):
            assert isinstance(part, PackedLinear)
            self._allowed(part, weights.up)
        return partial(run_experts, packed=packed, gather=gather_of(self._communicator))

    def _allowed(self, packed: PackedLinear, weight: Tensor) -> PackedLinear:
        """Return a packed weight, if its kernel allows what the ranks have of it."""
        kind = str(weight.dtype).removeprefix("torch.")
        check_parts(self._communicator, packed, packed.path, paths(weight.dtype)[0], kind)
        return packed


def check_parts(
    communicator: Communicator, packed: PackedLinear | PackedQuantized, path: str | None, best: str, kind: str
) -> None:
    """Check that a product has the same bits in parts, if ranks have parts of it.

    All shapes must have the best kernel: with another one for a part's shape, the bits could be other ones.

    path, best: the path that multiplies the packed weight, and the best one of this CPU
    kind:       what the weights are, for the error

    Raises DeviceError if the sums of the path may depend on the number of outputs.
    """
    if communicator.partition.size > 1 and (path != best or best in (ONEDNN, PLAIN)):
        raise DeviceError(
            f"engine.tensor_parallel is {communicator.partition.size}, but this CPU multiplies {kind} weights "
            f"[{packed.out_features}, {packed.in_features}] by {path}, whose sums may depend on the number of outputs. "
            "Set it to 1."
        )


def run_experts(
    x: Tensor,
    router_logits: Tensor,
    rule: RoutingRule,
    num_tokens: Tensor | None,
    tokens_per_expert: Tensor | None,
    *,
    packed: PackedExperts,
    gather: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Choose each token's experts and run them; an ExpertsKernel."""
    assert num_tokens is None, "steps on the CPU have no padding"
    weights, ids = choose_experts(router_logits, rule)
    return experts(x, weights, ids, packed, tokens_per_expert, gather)


def run_whole_experts(
    x: Tensor,
    router_logits: Tensor,
    rule: RoutingRule,
    num_tokens: Tensor | None,
    tokens_per_expert: Tensor | None,
    *,
    packed: PackedExperts,
    communicator: Communicator,
) -> Tensor:
    """Choose each token's experts and run those that this rank has whole; an ExpertsKernel."""
    assert num_tokens is None, "steps on the CPU have no padding"
    weights, ids = choose_experts(router_logits, rule)
    rank = communicator.partition.rank
    return experts_of_rank(
        x, weights, ids, packed, rank, router_logits.shape[1], communicator.gather, tokens_per_expert
    )


def choose_experts(router_logits: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Return the weights, [num_tokens, top_k] fp32, and the ids, int64, of each token's experts."""
    match rule.method:
        case "sparsemixer":
            return sparsemixer(router_logits, rule.jitter)
        case "softmax":
            return softmax_topk(router_logits, rule.top_k)
        case "softmax_all":
            return softmax_all(router_logits, rule.top_k)
        case "sigmoid":
            return sigmoid_one(router_logits)
