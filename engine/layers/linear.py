"""Linear: a linear layer. How its weight lies in memory is its weight format's matter."""

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend
from moray.engine.backends.formats import LinearKernel


class Linear(nn.Module):
    """Computes y = x W^T + b. Load `weight` (and `bias`), then call process_weights_after_loading().

    weight: [out_features, in_features], None once it is packed; bias: [out_features]
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._kernel: LinearKernel | None = None

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Pack the weight in the format that the backend has for its dtype."""
        assert self.weight is not None, "weights are processed once"
        bias = None if self.bias is None else self.bias.data
        self._kernel = backend.weight_formats[self.weight.dtype].pack_linear(self.weight.data, bias)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer. x: [num_tokens, in_features]; the result: [num_tokens, out_features]"""
        assert self._kernel is not None, "process_weights_after_loading() comes before forward()"
        return self._kernel(x)
