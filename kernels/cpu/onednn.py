"""Matrix products by oneDNN, for CPUs without a kernel of our own.

oneDNN may choose its kernel, and with it the order of sums, by the number of rows; self_check.py finds out whether it
does. It always splits the long sums of a single row differently, so a single row is padded to two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.cpu.huge_pages import collapse
from moray.kernels.cpu.thread_pool import all_cores, is_large_product, num_cores

MAX_ROW_STEP = 32  # largest step to which a number of rows is rounded up, see padding()
# Of activations that oneDNN applies to the sums.
ALGORITHMS = {"none": ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "tanh")}


def is_supported(dtype: torch.dtype) -> bool:
    """Return whether this CPU and this build of torch support packed products in `dtype`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """Return a weight, [out_features, in_features], in oneDNN's own layout and in huge pages."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    collapse(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    return packed


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str, times: Tensor | None
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once, for a weight from `pack`."""
    if torch.get_num_threads() < num_cores() and is_large_product(x.shape[0], out_features * x.shape[1]):
        with all_cores():
            return multiply(x, weight, bias, out_features, activation, times)
    num_tokens = x.shape[0]
    if num_added := padding(num_tokens):
        x = F.pad(x, (0, 0, 0, num_added))
        times = None if times is None else F.pad(times, (0, 0, 0, num_added))
    pointwise = torch.ops.mkldnn._linear_pointwise  # its overload is named below: resolving it takes 10 us
    if times is None:
        attr, algorithm = ALGORITHMS[activation]
        y: Tensor = pointwise.default(x, weight, bias, attr, [], algorithm)
    else:
        y = pointwise.binary(x, times, weight, bias, "mul")
    return y[:num_tokens] if num_added else y


def padding(num_tokens: int) -> int:
    """Return how many rows of padding to add, so that few different numbers of rows occur.

    oneDNN takes a millisecond to compile a kernel for each number. The padded numbers are 2, 4, .. 16, 20, .. 32, 40,
    .. 64, 80, .. 128, 160, 192, ..; from three rows on, padding adds less than a quarter.
    """
    step = 1 << max(1, (num_tokens - 1).bit_length() - 3)
    return -num_tokens % min(step, MAX_ROW_STEP)
