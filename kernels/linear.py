"""Linear layers on packed weights: `pack` once at load (the pack replaces the weight), `linear` every step.

oneDNN reads a packed bf16 or fp32 weight about twice as fast as a plain one. A row's result is bitwise the same
whatever the other rows and their number: measured for oneDNN from two rows up, for MKL in multiples of four.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# One oneDNN primitive is made and cached for each number of rows. Rounding large numbers up keeps them few.
EXACT_ROWS = 128
ROW_STEP = 32
PLAIN_ROW_STEP = 16

ACTIVATIONS = {"none": ("none", ""), "gelu": ("gelu", "tanh")}


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the layout the GEMM reads, with its bias.

    weight: opaque if it `is_mkldnn`, else [out_features, in_features]
    bias:   [out_features] or None
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU and this build of torch have packed GEMMs in `dtype`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack `weight` [out_features, in_features]. Drop the original afterwards: the pack is a copy.

    Where this CPU cannot pack the dtype (float16 on most), the weight is kept as it is and `linear` computes in fp32.
    """
    out_features, in_features = weight.shape
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return PackedLinear(weight, bias, out_features, in_features)


def linear(x: Tensor, packed: PackedLinear, activation: str = "none") -> Tensor:
    """Return activation(x @ weight.T + bias), each row bitwise independent of the other rows and of their number.

    x:          [num_tokens, in_features]
    activation: "none" | "gelu" (tanh form), applied before the result is rounded to x's dtype
    returns:    [num_tokens, out_features], dtype of x
    """
    num_tokens = x.shape[0]
    if not packed.weight.is_mkldnn:
        return _plain_linear(x, packed, activation)
    if num_tokens == 0:
        return x.new_empty(0, packed.out_features)
    padding = _padding(num_tokens, x.dtype == torch.bfloat16 and activation == "none")
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    attr, algorithm = ACTIVATIONS[activation]
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, attr, [], algorithm)
    return y[:num_tokens] if padding else y


def _padding(num_tokens: int, is_one_exact: bool) -> int:
    if num_tokens == 1 and not is_one_exact:
        return 1
    return -num_tokens % ROW_STEP if num_tokens > EXACT_ROWS else 0


def _plain_linear(x: Tensor, packed: PackedLinear, activation: str) -> Tensor:
    num_tokens = x.shape[0]
    padded = F.pad(x.float(), (0, 0, 0, -num_tokens % PLAIN_ROW_STEP))
    bias = None if packed.bias is None else packed.bias.float()
    y = F.linear(padded, packed.weight.float(), bias)[:num_tokens]
    return (gelu(y) if activation == "gelu" else y).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of fp32, bitwise independent of what else is in the tensor, unlike F.silu: of that, elements left
    over from whole vectors go another way, and which those are depends on the tensor's length and the threads."""
    return x / x.neg().exp_().add_(1.0)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU of fp32, bitwise independent of what else is in the tensor."""
    return x / (x * x * 0.044715 + 1.0).mul_(x).mul_(-2.0 * math.sqrt(2.0 / math.pi)).exp_().add_(1.0)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Slow and obvious `linear`, in fp32 from the plain weight."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    return (F.gelu(y, approximate="tanh") if activation == "gelu" else y).to(x.dtype)
