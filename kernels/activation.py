"""Activation: what an expert computes between its two matrices, named alike for the kernels of every device."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

# Of a clamped SwiGLU: x * sigmoid(1.702 x) is close to the GELU of x. The CPU's kernels are compiled with it, and the
# cache of machine code does not look at this file (code_cache.py).
ALPHA = 1.702

ActivationKind = Literal["swiglu", "clamped_swiglu", "gelu"]


@dataclass(frozen=True)
class Activation:
    """Names the activation of experts.

    kind:  "swiglu":         silu(gate) * up
           "clamped_swiglu": g * sigmoid(ALPHA g) * (u + 1), of g = min(gate, limit) and of u = up between -limit and
                             limit
           "gelu":           gelu(up) in the tanh form; there is no gate
    limit: of a clamped SwiGLU
    """

    kind: ActivationKind
    limit: float = 0.0

    @property
    def is_gated(self) -> bool:
        """Return whether the first matrix has the rows of a gate before those of what it multiplies."""
        return self.kind != "gelu"


SWIGLU, GELU = Activation("swiglu"), Activation("gelu")


def activate_ref(activation: Activation, first: Tensor) -> Tensor:
    """Return the activation slowly and obviously. first: the first matrix' outputs, fp32, [.., outputs], gate first"""
    if activation.kind == "gelu":
        return F.gelu(first, approximate="tanh")
    gate, up = first.chunk(2, dim=-1)
    if activation.kind == "swiglu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * (ALPHA * gate).sigmoid() * (up + 1)
