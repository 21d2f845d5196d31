"""Phi-3.5-MoE and its smaller relatives (model_type phimoe: Phi-mini-MoE, Phi-tiny-MoE).

Paper: arXiv 2404.14219; reference: transformers' modeling_phimoe. The model has sequential pre-norm blocks, LayerNorm
with bias (although the eps is called rms_norm_eps), GQA, LongRoPE, sparsemixer routing to two SwiGLU experts and an
lm_head with bias.
"""

from torch import Tensor, nn

from moray.engine.backends.formats import ExpertOutput
from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.embedding import Embedding
from moray.engine.layers.linear import GatheredLinear
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.layers.norm import LayerNorm
from moray.engine.layers.rotary import Rotary, RotaryEmbedding
from moray.engine.models.base import CausalLM
from moray.engine.models.tensors import TensorMap, plain, split_qkv, swiglu_experts
from moray.engine.partition import WHOLE, Partition


class PhimoeDecoderLayer(nn.Module):
    """Runs attention and experts, each with a norm before it."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, partition, bias=config.attention_bias)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.moe = SparseMoe(Router(config, "sparsemixer"), GatedExperts(config, partition))

    def forward(
        self, x: Tensor | ExpertOutput, residual: Tensor | None, rotary: Rotary, inputs: ModelInputs
    ) -> tuple[Tensor | ExpertOutput, Tensor]:
        """Run the layer. x and residual come from the layer before it; the next norm adds up what is returned."""
        h, residual = self.input_layernorm.add(x, residual)
        h = self.self_attn(h, rotary, inputs)
        h, residual = self.post_attention_layernorm.add(h, residual)
        return self.moe(h, inputs.num_tokens), residual


class PhimoeForCausalLM(CausalLM):
    """Runs the whole model."""

    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        super().__init__(config, partition)
        self.rotary = RotaryEmbedding(config.rope)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PhimoeDecoderLayer(config, partition) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.lm_head = GatheredLinear(config.hidden_size, config.vocab_size, partition, bias=config.lm_head_bias)

    def forward(self, inputs: ModelInputs) -> Tensor:
        rotary = self.rotary(inputs.positions, inputs.rope_sets)
        x, residual = self.embed_tokens(inputs.input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, rotary, inputs)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        h, v = config.hidden_size, config.vocab_size
        both = ("weight", "bias")
        attention_parts = both if config.attention_bias else ("weight",)
        targets = plain("model.embed_tokens", "embed_tokens", (v, h), "weight")
        targets |= plain("model.norm", "norm", (h,), *both)
        targets |= plain("lm_head", "lm_head", (v, h), *(both if config.lm_head_bias else ("weight",)))
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            targets |= plain(f"{name}.input_layernorm", f"{ours}.input_layernorm", (h,), *both)
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", *attention_parts)
            targets |= plain(f"{name}.post_attention_layernorm", f"{ours}.post_attention_layernorm", (h,), *both)
            moe = f"{name}.block_sparse_moe"
            targets |= plain(f"{moe}.gate", f"{ours}.moe.router", (config.num_experts, h), "weight")
            targets |= swiglu_experts(config, f"{moe}.experts", f"{ours}.moe.experts")
        return targets
