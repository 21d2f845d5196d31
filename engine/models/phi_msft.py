"""Phi-2 merged into experts: phixtral (model_type phi-msft with num_local_experts, any expert count).

Source: mlabonne/phixtral-4x2_8; the block is Microsoft's original modeling_phi. One LayerNorm feeds attention and
experts in parallel, rotary turns the leading dims of a head only, biases are everywhere but in the gate, experts have
no gate branch.
"""

import logging

from torch import Tensor, nn

from engine.checkpoint.weights import Target
from engine.config import ModelConfig
from engine.inputs import ModelInputs
from engine.layers.attention import SelfAttention
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.moe import UngatedExperts
from engine.layers.norm import LayerNorm, Norm
from engine.layers.rotary import Rotary, RotaryEmbedding
from engine.models.tensors import TensorMap, plain

logger = logging.getLogger(__name__)


class PhiMoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.mlp = UngatedExperts(config, "softmax")

    def forward(
        self, hidden_states: Tensor, residual: Tensor, next_norm: Norm, num_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.mlp(hidden_states, self.gate(hidden_states), residual, next_norm, num_tokens)


class PhiDecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln = LayerNorm(config.hidden_size, config.norm_eps)
        self.mixer = SelfAttention(config, bias=True)
        self.moe = PhiMoE(config)

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: Norm, rotary: Rotary, inputs: ModelInputs
    ) -> tuple[Tensor, Tensor]:
        """x and its norm -> the same for the layer behind, whose norm is next_norm"""
        return self.moe(normed, x + self.mixer(normed, rotary, inputs), next_norm, inputs.num_tokens)


class PhiMsftForCausalLM(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = RotaryEmbedding(config.rope)
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(PhiDecoderLayer(config) for _ in range(config.num_layers))
        self.ln = LayerNorm(config.hidden_size, config.norm_eps)
        self.linear = Linear(config.hidden_size, config.vocab_size, bias=True)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """-> hidden states [num_tokens, hidden_size], behind the last norm"""
        rotary = self.rotary(inputs.positions, inputs.rope_sets)
        x = self.wte(inputs.input_ids)
        first, *others = (layer.get_submodule("ln") for layer in self.h)
        normed = first(x)
        for layer, next_norm in zip(self.h, (*others, self.ln), strict=True):
            x, normed = layer(x, normed, next_norm, rotary, inputs)
        return normed

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size]"""
        return self.linear(hidden_states)

    def log_tied_routers(self) -> None:
        """Say so where all rows of a gate are equal: every logit ties and experts 0..k-1 run, equally weighted.

        The published merge was made with the same (empty) positive prompt for every expert, so this is its normal case.
        """
        gates = [module.gate for module in self.modules() if isinstance(module, PhiMoE)]
        tied = [n for n, gate in enumerate(gates) if gate.weight is not None and (gate.weight == gate.weight[0]).all()]
        if tied:
            logger.warning(
                "The router is tied (all gate rows equal) in %d of %d layers (first: %d): there experts 0..%d run for "
                "every token with equal weights, and the others never.",
                len(tied),
                len(gates),
                tied[0],
                self.config.num_experts_per_tok - 1,
            )


def tensor_map(config: ModelConfig) -> TensorMap:
    """Published tensor name -> its place in the fused parameters.

    Wqkv needs no reordering: its rows are all of q, then all of k, then all of v.
    """
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    width, both = config.num_heads * config.head_dim, ("weight", "bias")
    qkv = width + 2 * config.num_kv_heads * config.head_dim
    targets = plain("transformer.embd.wte", "wte", (v, h), "weight")
    targets |= plain("lm_head.ln", "ln", (h,), *both)
    targets |= plain("lm_head.linear", "linear", (v, h), *both)
    for n in range(config.num_layers):
        name, ours = f"transformer.h.{n}", f"h.{n}"
        targets |= plain(f"{name}.ln", f"{ours}.ln", (h,), *both)
        targets |= plain(f"{name}.mixer.Wqkv", f"{ours}.mixer.qkv_proj", (qkv, h), *both)
        targets |= plain(f"{name}.mixer.out_proj", f"{ours}.mixer.o_proj", (h, width), *both)
        targets |= plain(f"{name}.moe.gate", f"{ours}.moe.gate", (config.num_experts, h), "weight")
        for e in range(config.num_experts):
            expert, fused = f"{name}.moe.mlp.{e}", f"{ours}.moe.mlp"
            targets[f"{expert}.fc1.weight"] = Target(f"{fused}.fc1", (i, h), (e,))
            targets[f"{expert}.fc1.bias"] = Target(f"{fused}.fc1_bias", (i,), (e,))
            targets[f"{expert}.fc2.weight"] = Target(f"{fused}.fc2", (h, i), (e,))
            targets[f"{expert}.fc2.bias"] = Target(f"{fused}.fc2_bias", (h,), (e,))
    return targets
