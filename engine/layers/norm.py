"""Normalisation layers, named as in the checkpoints."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.layers.backend import Backend
from kernels.cpu.norms import layer_norm, rms_norm


class Norm(nn.Module):
    """Normalises rows; `add` does it to a sum, which it gives back too: the next residual.

    weight: [hidden_size]; bias: [hidden_size] for a LayerNorm, None for an RMSNorm
    """

    def __init__(self, hidden_size: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if bias else None
        self.eps = eps
        self._run: Callable[[Tensor], Tensor] | None = None
        self._run_add: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def prepare(self, backend: Backend) -> None:
        of_layer: dict[str, Any] = {"weight": self.weight, "eps": self.eps}
        if self.bias is not None:
            of_layer["bias"] = self.bias
        if backend == "triton":
            from kernels.gpu import norms as gpu

            self._run = partial(gpu.rms_norm if self.bias is None else gpu.layer_norm, **of_layer)
            self._run_add = partial(gpu.add_rms_norm if self.bias is None else gpu.add_layer_norm, **of_layer)
        else:
            self._run = partial(rms_norm if self.bias is None else layer_norm, **of_layer)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape"""
        assert self._run is not None, "prepare() comes before the first forward"
        return self._run(x)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, and that normalised; all [num_tokens, hidden_size]"""
        if self._run_add is not None:
            return self._run_add(x, residual)
        total = residual + x
        return total, self(total)


class LayerNorm(Norm):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, bias=True)


class RMSNorm(Norm):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, bias=False)
