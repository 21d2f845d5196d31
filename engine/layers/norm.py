"""LayerNorm and RMSNorm layers. Their parameters have the checkpoints' names."""

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend, NormKernel
from moray.engine.backends.formats import ExpertOutput


class Norm(nn.Module):
    """Normalises rows; `add` adds them to the residual first.

    weight: [hidden_size]
    bias:   [hidden_size] for a LayerNorm, None for an RMSNorm
    """

    def __init__(
        self, hidden_size: int, eps: float, *, bias: bool, multiplier: float = 1.0, rounds_last: bool = False
    ) -> None:
        """Make the layer.

        multiplier:   of what `add` adds to the residual
        rounds_last:  see ModelConfig.norm_rounds_last
        """
        super().__init__()
        self.multiplier, self.rounds_last = multiplier, rounds_last
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if bias else None
        self.eps = eps
        self._kernel: NormKernel | None = None

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Choose the kernel."""
        self._kernel = backend.norm(self.weight, self.bias, self.eps, rounds_last=self.rounds_last)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise rows. x and the result: [num_tokens, hidden_size]"""
        assert self._kernel is not None, "process_weights_after_loading() comes before forward()"
        return self._kernel(x)

    def add(self, x: Tensor | ExpertOutput, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add the output of the block before this norm, times the multiplier, to the residual; normalise the sum.

        x:         the output of attention or experts; of the embedding before the first block
        residual:  [num_tokens, hidden_size], or None before the first block

        Returns the normalised sum, which the next block reads, and the sum, which is the next residual; both are
        [num_tokens, hidden_size].
        """
        if residual is None:
            assert not isinstance(x, ExpertOutput), "experts come after a residual"
            return self(x), x
        assert self._kernel is not None, "process_weights_after_loading() comes before forward()"
        total, normed = self._kernel.add(x, residual, self.multiplier)
        return normed, total


class LayerNorm(Norm):
    """Subtracts the mean, divides by the standard deviation and applies weight and bias."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, bias=True)


class RMSNorm(Norm):
    """Divides by the root mean square and applies a weight."""

    def __init__(self, hidden_size: int, eps: float, multiplier: float = 1.0, rounds_last: bool = False) -> None:
        super().__init__(hidden_size, eps, bias=False, multiplier=multiplier, rounds_last=rounds_last)
