"""Expert layers: the weights of all experts of a layer, fused, and the call into the grouped kernel."""

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from kernels.cpu.experts import PackedExpert, experts, pack_expert


class GatedExperts(nn.Module):
    """SwiGLU experts without bias: down(silu(gate x) * (up x)).

    gate_up_proj: [num_experts, 2 * intermediate_size, hidden_size], gate first
    down_proj:    [num_experts, hidden_size, intermediate_size]
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, i, h = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj: nn.Parameter | None = nn.Parameter(torch.empty(e, 2 * i, h), requires_grad=False)
        self.down_proj: nn.Parameter | None = nn.Parameter(torch.empty(e, h, i), requires_grad=False)
        self._packed: list[PackedExpert] | None = None

    def pack(self) -> None:
        assert self.gate_up_proj is not None and self.down_proj is not None, "a layer is packed once"
        weights = zip(self.gate_up_proj, self.down_proj, strict=True)
        self._packed = [pack_expert(*of_expert, is_gated=True) for of_expert in weights]
        self.gate_up_proj = self.down_proj = None

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; topk_*: [num_tokens, k] -> [num_tokens, hidden_size]"""
        assert self._packed is not None, "pack() comes before the first forward"
        return experts(x, topk_weights, topk_ids, self._packed)


class UngatedExperts(nn.Module):
    """Phi-2's MLP as experts: fc2(gelu_new(fc1 x)), with biases.

    fc1: [num_experts, intermediate_size, hidden_size]; fc2: [num_experts, hidden_size, intermediate_size]
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, i, h = config.num_experts, config.intermediate_size, config.hidden_size
        self.fc1: nn.Parameter | None = nn.Parameter(torch.empty(e, i, h), requires_grad=False)
        self.fc2: nn.Parameter | None = nn.Parameter(torch.empty(e, h, i), requires_grad=False)
        self.fc1_bias = nn.Parameter(torch.empty(e, i), requires_grad=False)
        self.fc2_bias = nn.Parameter(torch.empty(e, h), requires_grad=False)
        self._packed: list[PackedExpert] | None = None

    def pack(self) -> None:
        assert self.fc1 is not None and self.fc2 is not None, "a layer is packed once"
        weights = zip(self.fc1, self.fc2, self.fc1_bias, self.fc2_bias, strict=True)
        self._packed = [pack_expert(*of_expert, is_gated=False) for of_expert in weights]
        self.fc1 = self.fc2 = None

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; topk_*: [num_tokens, k] -> [num_tokens, hidden_size]"""
        assert self._packed is not None, "pack() comes before the first forward"
        return experts(x, topk_weights, topk_ids, self._packed)
