"""ExpertLoad: counts how many tokens are routed to each expert of each layer."""

import torch
from torch import Tensor, nn

from moray.engine.layers.moe import Experts, SingleExpert


class ExpertLoad:
    """Counts the tokens of each expert on the device; the host waits for the device only in read().

    The steps count by themselves, captured graphs too. Each token that goes through the model counts top_k times per
    layer that has experts to choose from. Recomputed tokens count again; cached tokens and padding do not count.
    """

    def __init__(self, model: nn.Module, num_experts: int, device: torch.device) -> None:
        layers = [m for m in model.modules() if isinstance(m, Experts) and not isinstance(m, SingleExpert)]
        self._tokens = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        for layer, tokens_per_expert in zip(layers, self._tokens, strict=True):
            layer.tokens_per_expert = tokens_per_expert

    @property
    def counters(self) -> Tensor:
        """Return the counts on the device, which each step adds to: [num_layers, num_experts] int64."""
        return self._tokens

    def read(self) -> Tensor:
        """Return the counts of all steps launched so far: [num_layers, num_experts] int64, on the host."""
        return self._tokens.to("cpu", copy=True)

    def copy(self) -> Tensor:
        """Return a copy of the counts, on the device, for restore()."""
        return self._tokens.clone()

    def restore(self, tokens: Tensor) -> None:
        """Set the counts back to a copy: a step that failed half way counts when it runs again."""
        self._tokens.copy_(tokens)

    def reset(self) -> None:
        """Set all counts to zero."""
        self._tokens.zero_()
