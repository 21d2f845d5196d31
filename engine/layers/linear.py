"""Linear layers. They own how a weight lies in memory; the models do not know."""

import torch
from torch import Tensor, nn

from kernels.cpu.linear import PackedLinear, linear, pack


class Linear(nn.Module):
    """y = x W^T + b. Load `weight` (and `bias`), then call `pack` once; the original weight is given up for the packed.

    weight: [out_features, in_features]; bias: [out_features]
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: PackedLinear | None = None

    def pack(self) -> None:
        assert self.weight is not None, "a layer is packed once"
        self._packed = pack(self.weight.data, None if self.bias is None else self.bias.data)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]"""
        assert self._packed is not None, "pack() comes before the first forward"
        return linear(x, self._packed)
