"""Phixtral: Phi-2 models merged into experts (model_type phi-msft with num_local_experts, any number of experts).

Source: mlabonne/phixtral-4x2_8; the block is Microsoft's original modeling_phi. One LayerNorm feeds attention and
experts in parallel, rope rotates only the leading dims of a head, all layers but the router have biases, and the
experts have no gate branch.
"""

import logging

from torch import Tensor, nn

from moray.engine.backends.formats import ExpertOutput
from moray.engine.backends.inputs import ModelInputs
from moray.engine.checkpoint.weights import Target
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.embedding import Embedding
from moray.engine.layers.linear import GatheredLinear
from moray.engine.layers.moe import Router, SparseMoe, UngatedExperts
from moray.engine.layers.norm import LayerNorm
from moray.engine.layers.rotary import Rotary, RotaryEmbedding
from moray.engine.models.base import CausalLM
from moray.engine.models.tensors import TensorMap, plain
from moray.engine.partition import WHOLE, Partition

logger = logging.getLogger(__name__)


class PhiDecoderLayer(nn.Module):
    """Runs attention and experts in parallel, after one norm."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.ln = LayerNorm(config.hidden_size, config.norm_eps)
        self.mixer = SelfAttention(config, partition, bias=True)
        self.moe = SparseMoe(Router(config, "softmax"), UngatedExperts(config, partition))

    def forward(
        self, x: Tensor | ExpertOutput, residual: Tensor | None, rotary: Rotary, inputs: ModelInputs
    ) -> tuple[Tensor | ExpertOutput, Tensor]:
        """Run the layer. x and residual come from the layer before it; the next norm adds up what is returned."""
        h, residual = self.ln.add(x, residual)
        residual = residual + self.mixer(h, rotary, inputs)
        return self.moe(h, inputs.num_tokens), residual


class PhiMsftForCausalLM(CausalLM):
    """Runs the whole model."""

    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        super().__init__(config, partition)
        self.rotary = RotaryEmbedding(config.rope)
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(PhiDecoderLayer(config, partition) for _ in range(config.num_layers))
        self.ln = LayerNorm(config.hidden_size, config.norm_eps)
        self.linear = GatheredLinear(config.hidden_size, config.vocab_size, partition, bias=True)

    def forward(self, inputs: ModelInputs) -> Tensor:
        rotary = self.rotary(inputs.positions, inputs.rope_sets)
        x, residual = self.wte(inputs.input_ids), None
        for layer in self.h:
            x, residual = layer(x, residual, rotary, inputs)
        return self.ln.add(x, residual)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)

    def validate_weights(self) -> None:
        """Log a warning if all rows of a router are equal: all its logits tie, so experts 0..k-1 run, equally weighted.

        The published merge was made with the same (empty) positive prompt for every expert, so this is its normal case.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        tied = [n for n, r in enumerate(routers) if r.weight is not None and (r.weight == r.weight[0]).all()]
        if tied:
            logger.warning(
                "The router is tied (all gate rows equal) in %d of %d layers (first: %d): there experts 0..%d run for "
                "every token with equal weights, and the other experts never run.",
                len(tied),
                len(routers),
                tied[0],
                routers[0].rule.top_k - 1,
            )

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        # Wqkv needs no reordering: its rows are all of q, then all of k, then all of v.
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
            targets |= plain(f"{name}.moe.gate", f"{ours}.moe.router", (config.num_experts, h), "weight")
            for e in range(config.num_experts):
                expert, fused = f"{name}.moe.mlp.{e}", f"{ours}.moe.experts"
                targets[f"{expert}.fc1.weight"] = Target(f"{fused}.fc1", (i, h), (e,))
                targets[f"{expert}.fc1.bias"] = Target(f"{fused}.fc1_bias", (i,), (e,))
                targets[f"{expert}.fc2.weight"] = Target(f"{fused}.fc2", (h, i), (e,))
                targets[f"{expert}.fc2.bias"] = Target(f"{fused}.fc2_bias", (h,), (e,))
        return targets
