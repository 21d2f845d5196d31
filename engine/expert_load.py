"""ExpertLoad: how many tokens each expert of each layer was given."""

import torch
from torch import Tensor, nn

from engine.layers.moe import Experts


class ExpertLoad:
    """Counted where the model runs, by the steps themselves, captured ones too; the host waits only when it asks.

    Each token that goes through the model counts top_k times a layer, recomputed ones again, cached ones and padding
    not at all.
    """

    def __init__(self, model: nn.Module, num_experts: int, device: torch.device) -> None:
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        self._tokens = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        for layer, tokens_per_expert in zip(layers, self._tokens, strict=True):
            layer.tokens_per_expert = tokens_per_expert

    def read(self) -> Tensor:
        """[num_layers, num_experts] int64, on the host; of all steps launched so far."""
        return self._tokens.to("cpu", copy=True)

    def reset(self) -> None:
        self._tokens.zero_()
