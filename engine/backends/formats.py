"""The interface of weight formats: how weights lie in memory and are multiplied, on one device.

A format is a file in the folder of its backend and a row in the backend's `weight_formats`, or in `quantized_formats`.
The layers Linear and Experts give it their weights once, and call what it returns at every step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moray.engine.float_dtypes import ITEM_BYTES
from moray.engine.quantization.weight import QuantizedWeight
from moray.kernels.activation import GELU as GELU  # layers have no other access to kernels
from moray.kernels.activation import SWIGLU as SWIGLU
from moray.kernels.activation import Activation as Activation
from moray.kernels.routing import RoutingMethod as RoutingMethod

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}


@dataclass(frozen=True)
class ExpertWeights:
    """Holds the loaded weights of a layer's experts.

    up:         [num_experts, 2 * intermediate_size, hidden_size], gate first; [num_experts, intermediate_size,
                hidden_size] if not gated
    down:       [num_experts, hidden_size, intermediate_size]
    up_bias:    [num_experts, outputs of up] or None
    down_bias:  [num_experts, hidden_size] or None
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation


@dataclass(frozen=True)
class QuantizedExpert:
    """Holds the quantized weights of one expert.

    up:         [2 * intermediate_size, hidden_size], gate first; [intermediate_size, hidden_size] if not gated
    down:       [hidden_size, intermediate_size]
    up_bias:    [outputs of up] or None
    down_bias:  [hidden_size] or None
    """

    up: QuantizedWeight
    down: QuantizedWeight
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True)
class RoutingRule:
    """States how a token's experts are chosen from its router logits. kernels/cpu/route.py has the arithmetic.

    method: the weights are those of sparsemixer; a softmax over the chosen experts ("softmax") or over all of them
            ("softmax_all"); or the sigmoid of the logit, of a single expert ("sigmoid")
    jitter: sparsemixer's eps
    """

    method: RoutingMethod
    top_k: int
    jitter: float = 0.0


@dataclass(frozen=True)
class ExpertOutput:
    """Holds the output of experts before each token's rows are added up; the norm that follows adds them in its pass.

    rows: [num_tokens * top_k, hidden_size], weighted, a token's rows one after the other
    """

    rows: Tensor
    top_k: int


class LinearKernel(Protocol):
    """Runs a linear layer on packed weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T + b. x: [num_tokens, in_features]; the result: [num_tokens, out_features]"""


class ExpertsKernel(Protocol):
    """Runs the experts of a layer on packed weights."""

    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor,
        rule: RoutingRule,
        num_tokens: Tensor | None,
        tokens_per_expert: Tensor | None,
    ) -> Tensor | ExpertOutput:
        """Return the weighted sum of each token's experts, [num_rows, hidden_size], or its terms.

        x:                  [num_rows, hidden_size]
        router_logits:      [num_rows, num_experts]
        num_tokens:         see ModelInputs
        tokens_per_expert:  [num_experts] int64, to which the tokens of each expert are added; None = not counted
        """


class WeightFormat(Protocol):
    """Packs loaded weights. The caller drops its references to them afterwards, so what is not kept here is freed."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None, num_outputs: int) -> LinearKernel:
        """Pack a linear layer, or the part of it that this rank has.

        weight:       [out_features, in_features]
        bias:         [out_features] or None
        num_outputs:  of the whole layer; out_features are this rank's
        """

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        """Pack the experts of a layer, one expert at a time: a layer is never in memory twice because of a format."""


class QuantizedFormat(Protocol):
    """Packs quantized weights. The caller keeps no references to them, so what is not kept here is freed."""

    def pack_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, num_outputs: int
    ) -> LinearKernel:
        """Pack a linear layer, or the part of it that this rank has.

        bias:         [out_features] or None
        dtype:        of the activations
        num_outputs:  of the whole layer; the rows of the weight are this rank's
        """

    def pack_experts(
        self, experts: Iterable[QuantizedExpert], dtype: torch.dtype, *, num_experts: int, activation: Activation
    ) -> ExpertsKernel:
        """Pack the experts of a layer.

        experts: in order; each is read and quantized when it is asked for, so that no layer is in memory as a whole
                 beside its packed form. Keep no reference to one when the next is asked for.
        dtype:   of the activations
        """
