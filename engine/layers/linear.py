"""Linear: a linear layer. How its weight lies in memory is its weight format's matter."""

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend
from moray.engine.backends.communicator import ALONE, Communicator
from moray.engine.backends.formats import LinearKernel
from moray.engine.layers.parameters import unallocated
from moray.engine.partition import Partition, Rows
from moray.engine.quantization.weight import QuantizedWeight


class Linear(nn.Module):
    """Computes y = x W^T + b. Load `weight` (and `bias`) and call process_weights_after_loading(), or call
    pack_quantized() with a quantized weight.

    weight: [out_features, in_features], unallocated at first, None once it is packed; bias: [out_features]
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rows: Rows | None = None) -> None:
        """Make the layer.

        rows: the rows of the weight, and outputs, that this rank has; None = all
        """
        super().__init__()
        self._rows = rows or Rows.all(out_features)
        self.weight: nn.Parameter | None = unallocated(len(self._rows), in_features)
        self.bias = nn.Parameter(torch.empty(len(self._rows)), requires_grad=False) if bias else None
        self._kernel: LinearKernel | None = None

    def held_rows(self, parameter: str) -> Rows:
        """Return the rows of a parameter that this rank has."""
        return self._rows

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Pack the weight in the format that the backend has for its dtype."""
        assert self.weight is not None, "weights are processed once"
        weight_format = backend.weight_formats[self.weight.dtype]
        self._kernel = weight_format.pack_linear(self.weight.data, self._bias_data(), self._rows.total)
        self.weight = None

    def pack_quantized(self, weight: QuantizedWeight, backend: Backend) -> None:
        """Pack a quantized weight, in place of `weight`, in the format that the backend has for its kind."""
        assert self.weight is not None and self.weight.shape == weight.shape, "weights are processed once"
        quantized_format, dtype = backend.quantized_formats[weight.kind], self.weight.dtype
        self._kernel = quantized_format.pack_linear(weight, self._bias_data(), dtype, self._rows.total)
        self.weight = None

    def _bias_data(self) -> Tensor | None:
        return None if self.bias is None else self.bias.data

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer. x: [num_tokens, in_features]; the result: [num_tokens, out_features] of this rank"""
        assert self._kernel is not None, "process_weights_after_loading() comes before forward()"
        return self._kernel(x)


class GatheredLinear(Linear):
    """A linear layer whose outputs the ranks share if they can be divided equally; each rank then gets all of them."""

    def __init__(self, in_features: int, out_features: int, partition: Partition, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias, rows=partition.split_if_even(out_features))
        self._communicator: Communicator = ALONE

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Pack the weight, and keep the communicator."""
        super().process_weights_after_loading(backend)
        self._communicator = backend.communicator

    def pack_quantized(self, weight: QuantizedWeight, backend: Backend) -> None:
        """Pack a quantized weight, and keep the communicator."""
        super().pack_quantized(weight, backend)
        self._communicator = backend.communicator

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer. x: [num_tokens, in_features]; the result: [num_tokens, out_features]"""
        out = super().forward(x)
        return out if self._rows.is_whole else self._communicator.gather(out)
