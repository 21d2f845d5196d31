"""Linear layers on packed weights: `pack` once at load (the packed weight replaces the original), `linear` every step.

A row's result is bitwise the same whatever the other rows, the number of rows and the number of threads. There are
several ways to compute it, called paths, best first: a kernel of our own for each instruction set, whose order of sums
is fixed by construction; oneDNN; and torch in fp32, always with blocks of the same number of rows. self_check.py finds
out whether a path keeps this promise on the present CPU; the last path is not checked.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.activation import ALPHA
from moray.kernels.cpu import onednn, panels, product
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.thread_pool import parallel_for

BLOCK_ROWS = 16  # rows that the plain path multiplies at a time
ONEDNN, PLAIN = "onednn", "plain"


@dataclass(frozen=True)
class PackedLinear:
    """Holds a weight in the layout of its path, with its bias.

    weight: in the layout of panels.pack_panels for a kernel of our own, in an opaque layout for oneDNN, and
            [out_features, in_features] for the plain path
    bias:   [out_features] or None; fp32 for a kernel of our own
    path:   the name of the path
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    path: str

    @cached_property
    def description(self) -> Any:
        """Return the description of the weight for product.py; None if compiled code cannot call the path's kernel."""
        kernel = panels.KERNELS.get((self.path, self.weight.dtype))
        if kernel is None or kernel.entry is None:
            return None
        return panels.describe(kernel, self.weight, self.bias, self.out_features, self.in_features)

    @cached_property
    def address(self) -> int | None:
        """Return the address of the description, or None."""
        return None if self.description is None else int(self.description.ctypes.data)


def paths(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the paths for a dtype on this CPU, within the limits of MORAY_CPU_ISA, best first."""
    own = [isa for isa in isas() if (isa, dtype) in panels.KERNELS]
    return (*own, *([ONEDNN] if onednn.is_supported(dtype) else []), PLAIN)


def pack(weight: Tensor, bias: Tensor | None = None, path: str | None = None) -> PackedLinear:
    """Pack a weight, [out_features, in_features], for a path.

    Free the original afterwards: the packed weight is a copy, except for the plain path.

    path: one of paths(weight.dtype); None = the first of them
    """
    out_features, in_features = weight.shape
    path = path or paths(weight.dtype)[0]
    if path == ONEDNN:
        weight = onednn.pack(weight)
    elif path != PLAIN:
        weight = panels.pack_panels(weight)
        bias = None if bias is None else bias.float()
    return PackedLinear(weight, bias, out_features, in_features, path)


def linear(
    x: Tensor, packed: PackedLinear, activation: str = "none", times: Tensor | None = None, limit: float = 0.0
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once; each row bitwise independent of the other rows.

    oneDNN rounds the sums too where it does not know the activation.

    x:          [num_tokens, in_features]
    activation: "none" | "silu" | "gelu" (tanh form) | "clamped_silu" | "clamped_plus_one", see epilogue.py; "none" or
                the last if `times` is given
    times:      [num_tokens, out_features], dtype of x, or None
    limit:      of the last two activations
    returns:    [num_tokens, out_features], dtype of x
    """
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    if packed.address is not None:
        return product.multiply(x, packed.address, packed.out_features, activation, times, limit)
    if packed.path == PLAIN:
        return _plain_linear(x, packed, activation, times, limit)
    if packed.path == ONEDNN:
        operands = x, packed.weight, packed.bias, packed.out_features
        if activation in onednn.ALGORITHMS:
            return onednn.multiply(*operands, activation, times)
        return activate(onednn.multiply(*operands, "none", None).float(), activation, times, limit).to(x.dtype)
    kernel = panels.KERNELS[packed.path, x.dtype]
    return panels.multiply(kernel, x, packed.weight, packed.bias, packed.out_features, activation, times, limit)


def _plain_linear(x: Tensor, packed: PackedLinear, activation: str, times: Tensor | None, limit: float) -> Tensor:
    """Multiply blocks of 16 rows, the last one padded with zeros, each with a separate call on one core.

    MKL may choose the order of sums by the number of rows and of threads; here both are the same in every call.
    """
    num_tokens, in_features = x.shape
    blocks = F.pad(x.float(), (0, 0, 0, -num_tokens % BLOCK_ROWS)).view(-1, BLOCK_ROWS, in_features)
    weight, bias = packed.weight.float(), None if packed.bias is None else packed.bias.float()
    sums = blocks.new_empty(len(blocks), BLOCK_ROWS, packed.out_features)

    def multiply(block: int) -> None:
        sums[block] = F.linear(blocks[block], weight, bias)

    parallel_for(multiply, range(len(blocks)))
    y = sums.view(-1, packed.out_features)[:num_tokens]
    return activate(y, activation, times, limit).to(x.dtype)


def activate(y: Tensor, activation: str, times: Tensor | None, limit: float) -> Tensor:
    """Return activation(y) * times in fp32; each element is bitwise independent of the rest of the tensor."""
    if activation == "silu":
        y = silu(y)
    elif activation == "gelu":
        y = gelu(y)
    elif activation == "clamped_silu":
        y = y.clamp(max=limit)
        y = y / (y * -ALPHA).exp_().add_(1.0)
    elif activation == "clamped_plus_one":
        y = y.clamp(-limit, limit) + 1.0
    return y if times is None else y * times


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x) in fp32; each element is bitwise independent of the rest of the tensor.

    F.silu does not promise that: it computes the elements that fill no whole vector differently, and which elements
    those are depends on the tensor's length and the number of threads.
    """
    return x / x.neg().exp_().add_(1.0)


def gelu(x: Tensor) -> Tensor:
    """Return the tanh form of GELU in fp32; each element is bitwise independent of the rest of the tensor."""
    return x / (x * x * 0.044715 + 1.0).mul_(x).mul_(-2.0 * math.sqrt(2.0 / math.pi)).exp_().add_(1.0)


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    times: Tensor | None = None,
    limit: float = 0.0,
) -> Tensor:
    """Compute `linear` slowly and obviously, in fp32 from the plain weight."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if activation == "silu":
        y = F.silu(y)
    elif activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    elif activation == "clamped_silu":
        y = y.clamp(max=limit) * (1.702 * y.clamp(max=limit)).sigmoid()
    elif activation == "clamped_plus_one":
        y = y.clamp(-limit, limit) + 1
    return (y if times is None else y * times.float()).to(x.dtype)
