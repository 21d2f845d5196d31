"""Linear layers on packed weights: `pack` once at load (the pack replaces the weight), `linear` every step.

oneDNN reads a packed bf16 or fp32 weight about twice as fast as a plain one. A row's result is bitwise the same
whatever the other rows, their number and the number of threads: measured for oneDNN from two rows up (a single row's
long sums it cuts elsewhere), for MKL in multiples of four.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.cores import all_cores, num_cores
from kernels.cpu.huge_pages import collapse

LARGEST_ROW_STEP = 32
PLAIN_ROW_STEP = 16
# Products of fewer multiplications (reading a weight counts as 16 rows) take less than waking the other cores.
FEW_PRODUCTS = 2**26

ACTIVATIONS = {"none": ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "tanh")}


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
        collapse(torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight))
    return PackedLinear(weight, bias, out_features, in_features)


def linear(x: Tensor, packed: PackedLinear, activation: str = "none", times: Tensor | None = None) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once; each row bitwise independent of the other rows.

    x:          [num_tokens, in_features]
    activation: "none" | "silu" | "gelu" (tanh form); "none" where `times` is given
    times:      [num_tokens, out_features], dtype of x, or None
    returns:    [num_tokens, out_features], dtype of x
    """
    is_large = (x.shape[0] + 16) * packed.out_features * packed.in_features > FEW_PRODUCTS
    if is_large and torch.get_num_threads() < num_cores():
        with all_cores():
            return _linear(x, packed, activation, times)
    return _linear(x, packed, activation, times)


def _linear(x: Tensor, packed: PackedLinear, activation: str, times: Tensor | None) -> Tensor:
    num_tokens = x.shape[0]
    if not packed.weight.is_mkldnn:
        return _plain_linear(x, packed, activation, times)
    if num_tokens == 0:
        return x.new_empty(0, packed.out_features)
    if added := padding(num_tokens):
        x = F.pad(x, (0, 0, 0, added))
        times = None if times is None else F.pad(times, (0, 0, 0, added))
    pointwise = torch.ops.mkldnn._linear_pointwise  # named with its overload: to try one after the other takes 10 us
    if times is None:
        attr, algorithm = ACTIVATIONS[activation]
        y: Tensor = pointwise.default(x, packed.weight, packed.bias, attr, [], algorithm)
    else:
        y = pointwise.binary(x, times, packed.weight, packed.bias, "mul")
    return y[:num_tokens] if added else y


def padding(num_tokens: int) -> int:
    """Return how many rows to add so that few numbers of rows occur: oneDNN takes a millisecond to compile each.

    They become 2, 4, .. 16, 20, .. 32, 40, .. 64, 80, .. 128, 160, 192, ..: from three on less than a quarter more.
    """
    step = 1 << max(1, (num_tokens - 1).bit_length() - 3)
    return -num_tokens % min(step, LARGEST_ROW_STEP)


def _plain_linear(x: Tensor, packed: PackedLinear, activation: str, times: Tensor | None) -> Tensor:
    num_tokens = x.shape[0]
    padded = F.pad(x.float(), (0, 0, 0, -num_tokens % PLAIN_ROW_STEP))
    bias = None if packed.bias is None else packed.bias.float()
    y = F.linear(padded, packed.weight.float(), bias)[:num_tokens]
    if times is not None:
        y = y * times
    elif activation != "none":
        y = silu(y) if activation == "silu" else gelu(y)
    return y.to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of fp32, bitwise independent of what else is in the tensor, unlike F.silu: of that, elements left
    over from whole vectors go another way, and which those are depends on the tensor's length and the threads."""
    return x / x.neg().exp_().add_(1.0)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU of fp32, bitwise independent of what else is in the tensor."""
    return x / (x * x * 0.044715 + 1.0).mul_(x).mul_(-2.0 * math.sqrt(2.0 / math.pi)).exp_().add_(1.0)


def linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", times: Tensor | None = None
) -> Tensor:
    """Slow and obvious `linear`, in fp32 from the plain weight."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if activation == "silu":
        y = F.silu(y)
    elif activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    return (y if times is None else y * times.float()).to(x.dtype)
