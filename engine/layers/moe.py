"""A layer's mixture of experts: SparseMoe, of a Router and Experts; and the MLPs that all tokens go through."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend
from moray.engine.backends.formats import (
    GELU,
    SWIGLU,
    Activation,
    ExpertOutput,
    ExpertsKernel,
    ExpertWeights,
    QuantizedExpert,
    RoutingMethod,
    RoutingRule,
)
from moray.engine.config import ModelConfig
from moray.engine.layers.linear import Linear
from moray.engine.layers.parameters import unallocated
from moray.engine.partition import WHOLE, Partition, Rows
from moray.engine.quantization.scheme import WeightKind
from moray.engine.quantization.weight import QuantizedWeight


class Router(Linear):
    """Scores the experts for each token, and names the rule by which they are chosen from the scores.

    weight: [num_experts, hidden_size]
    """

    def __init__(self, config: ModelConfig, method: RoutingMethod) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.rule = RoutingRule(method, config.num_experts_per_tok, config.router_jitter)


class Experts(nn.Module, ABC):
    """Runs each token through its experts. The subclasses define the kind of experts and their parameters.

    A rank has its share of the outputs of each expert's gate, up and down, and all of the router; the kernel gathers
    the hidden rows and the result. Or it has some experts whole, and the kernel gathers the rows of all experts.

    up, down:           names of the parameters that hold the experts' weights, [num_experts, out_features, in_features]
    activation:         if it has a gate, the rows of `up` are those of the gate and then those of what it multiplies
    tokens_per_expert:  [num_experts] int64, to which each forward adds its tokens; None = tokens are not counted
    """

    up: ClassVar[str]
    down: ClassVar[str]
    activation: Activation
    tokens_per_expert: Tensor | None = None

    def __init__(self, held: range, up_rows: Rows, down_rows: Rows) -> None:
        """Make the layer.

        held: the experts that this rank has, which are those in the parameters
        up_rows, down_rows: the rows of each expert's `up` and `down` that this rank has
        """
        super().__init__()
        self.held = held
        self._up_rows, self._down_rows = up_rows, down_rows
        self._kernel: ExpertsKernel | None = None

    def held_rows(self, parameter: str) -> Rows:
        """Return the rows, of each expert, of a parameter that this rank has."""
        return self._up_rows if parameter.startswith(self.up) else self._down_rows

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Pack the experts in the format that the backend has for the dtype of their weights."""
        weights = self.take_weights()
        self._kernel = backend.weight_formats[weights.up.dtype].pack_experts(weights)

    def pack_quantized(
        self, kind: WeightKind, weights: Iterable[tuple[QuantizedWeight, QuantizedWeight]], backend: Backend
    ) -> None:
        """Pack quantized experts, in place of the parameters, in the format that the backend has for their kind.

        weights: `up` and `down` of each held expert in order; each is asked for when the one before it is packed
        """
        pairs = iter(weights)

        def take() -> Iterator[QuantizedExpert]:
            for place in range(len(self.held)):
                yield QuantizedExpert(*next(pairs), *self.expert_biases(place))  # kept in no variable

        dtype = getattr(self, self.up).dtype
        self._kernel = backend.quantized_formats[kind].pack_experts(
            take(), dtype, num_experts=len(self.held), activation=self.activation
        )
        for name in (self.up, self.down):
            setattr(self, name, None)

    @abstractmethod
    def take_weights(self) -> ExpertWeights:
        """Return the loaded weights, and drop the parameters that hold them."""

    def expert_biases(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the biases of a held expert's `up` and `down`. place: its place in the parameters"""
        return None, None

    def forward(
        self, x: Tensor, router_logits: Tensor, rule: RoutingRule, num_tokens: Tensor | None
    ) -> Tensor | ExpertOutput:
        """Run the experts.

        x:              [num_rows, hidden_size]
        router_logits:  [num_rows, num_experts]
        rule:           how a token's experts are chosen from its logits
        num_tokens:     see ModelInputs

        Returns the weighted sum of each token's experts for Norm.add, [num_rows, hidden_size], or its terms.
        """
        assert self._kernel is not None, "process_weights_after_loading() comes before forward()"
        return self._kernel(x, router_logits, rule, num_tokens, self.tokens_per_expert)


class GatedExperts(Experts):
    """Runs experts with a gate: down(silu(gate x) * (up x)), or with another activation that has one.

    gate_up_proj: [held experts, 2 * intermediate_size, hidden_size], gate first
    down_proj:    [held experts, hidden_size, intermediate_size]
    gate_up_proj_bias, down_proj_bias: [held experts, outputs], or None
    """

    up, down = "gate_up_proj", "down_proj"

    def __init__(
        self,
        config: ModelConfig,
        partition: Partition = WHOLE,
        *,
        held: range | None = None,
        intermediate_size: int | None = None,
        activation: Activation = SWIGLU,
        bias: bool = False,
    ) -> None:
        """Make the layer.

        held:              the experts that this rank has; None = its share of the config's
        intermediate_size: None = the config's
        bias:              whether both matrices have biases
        """
        held = partition.split_experts(config.num_experts) if held is None else held
        i, h = intermediate_size or config.intermediate_size, config.hidden_size
        up_rows, down_rows = partition.split_in_expert(i, i), partition.split_in_expert(h)
        super().__init__(held, up_rows, down_rows)
        self.activation = activation
        e = len(held)
        self.gate_up_proj: nn.Parameter | None = unallocated(e, len(up_rows), h)
        self.down_proj: nn.Parameter | None = unallocated(e, len(down_rows), i)
        self.gate_up_proj_bias = _bias(e, up_rows) if bias else None
        self.down_proj_bias = _bias(e, down_rows) if bias else None

    def take_weights(self) -> ExpertWeights:
        """Return the loaded weights, and drop the parameters that hold them, except for the small biases."""
        assert self.gate_up_proj is not None and self.down_proj is not None, "weights are processed once"
        biases = self.gate_up_proj_bias, self.down_proj_bias
        weights = ExpertWeights(self.gate_up_proj.data, self.down_proj.data, *biases, activation=self.activation)
        self.gate_up_proj = self.down_proj = None
        return weights

    def expert_biases(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the biases of a held expert's two matrices."""
        if self.gate_up_proj_bias is None or self.down_proj_bias is None:
            return None, None
        return self.gate_up_proj_bias.data[place], self.down_proj_bias.data[place]


class SingleExpert(GatedExperts):
    """Runs an MLP that all tokens go through with the kernels of experts: one expert, whose load is not counted."""

    def __init__(self, config: ModelConfig, intermediate_size: int, partition: Partition = WHOLE) -> None:
        super().__init__(config, partition, held=range(1), intermediate_size=intermediate_size)


class UngatedExperts(Experts):
    """Runs experts with the MLP of Phi-2 and biases: fc2(gelu_new(fc1 x)).

    fc1: [held experts, intermediate_size, hidden_size]; fc2: [held experts, hidden_size, intermediate_size]
    """

    up, down, activation = "fc1", "fc2", GELU

    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        held, i, h = partition.split_experts(config.num_experts), config.intermediate_size, config.hidden_size
        up_rows, down_rows = partition.split_in_expert(i), partition.split_in_expert(h)
        super().__init__(held, up_rows, down_rows)
        e = len(held)
        self.fc1: nn.Parameter | None = unallocated(e, len(up_rows), h)
        self.fc2: nn.Parameter | None = unallocated(e, len(down_rows), i)
        self.fc1_bias, self.fc2_bias = _bias(e, up_rows), _bias(e, down_rows)

    def take_weights(self) -> ExpertWeights:
        """Return the loaded weights, and drop the parameters that hold them, except for the small biases."""
        assert self.fc1 is not None and self.fc2 is not None, "weights are processed once"
        biases = self.fc1_bias.data, self.fc2_bias.data
        weights = ExpertWeights(self.fc1.data, self.fc2.data, *biases, activation=GELU)
        self.fc1 = self.fc2 = None
        return weights

    def expert_biases(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the biases of a held expert's `fc1` and `fc2`."""
        return self.fc1_bias.data[place], self.fc2_bias.data[place]


def _bias(num_experts: int, rows: Rows) -> nn.Parameter:
    return nn.Parameter(torch.empty(num_experts, len(rows)), requires_grad=False)


class SparseMoe(nn.Module):
    """Runs a mixture of experts, of which each token uses few."""

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor, num_tokens: Tensor | None) -> Tensor | ExpertOutput:
        """Route each token and run its experts; see Experts.forward. x: [num_rows, hidden_size]"""
        return self.experts(x, self.router(x), self.router.rule, num_tokens)


class DenseMlp(nn.Module):
    """Runs the MLP of a layer that has no experts to choose from."""

    rule = RoutingRule("softmax", 1)  # the weight of a single expert is 1

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.expert = SingleExpert(config, config.dense_intermediate_size, partition)

    def forward(self, x: Tensor, num_tokens: Tensor | None) -> Tensor | ExpertOutput:
        """Run the MLP; see Experts.forward. x: [num_rows, hidden_size]"""
        return self.expert(x, x.new_zeros(len(x), 1), self.rule, num_tokens)


class SharedExpert(nn.Module):
    """Runs the expert that all tokens go through besides those they choose, weighted by the sigmoid of its gate."""

    rule = RoutingRule("sigmoid", 1)

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, 1, bias=False)
        self.expert = SingleExpert(config, config.shared_intermediate_size, partition)

    def forward(self, x: Tensor, num_tokens: Tensor | None) -> Tensor:
        """Return the weighted output of the expert. x and the result: [num_rows, hidden_size]"""
        out = self.expert(x, self.gate(x), self.rule, num_tokens)
        return out.rows if isinstance(out, ExpertOutput) else out
