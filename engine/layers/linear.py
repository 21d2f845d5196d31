"""Linear layers. They own how a weight lies in memory; the models do not know."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from engine.layers.backend import Backend
from kernels.cpu.linear import linear, pack


class Linear(nn.Module):
    """y = x W^T + b. Load `weight` (and `bias`), then call `prepare`.

    weight: [out_features, in_features]; bias: [out_features]
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._run: Callable[[Tensor], Tensor] | None = None

    def prepare(self, backend: Backend) -> None:
        assert self.weight is not None, "a layer is prepared once"
        bias = None if self.bias is None else self.bias.data
        if backend == "triton":
            from kernels.gpu import linear as gpu

            self._run = partial(gpu.linear, weight=self.weight.data, bias=bias)
        else:
            self._run = partial(linear, packed=pack(self.weight.data, bias))
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]"""
        assert self._run is not None, "prepare() comes before the first forward"
        return self._run(x)
