"""Mixtral (model_type mixtral), and merged models with its architecture.

Paper: arXiv 2401.04088; reference: transformers' modeling_mixtral. The model has sequential pre-norm blocks, RMSNorm,
GQA, plain rope, no biases and SwiGLU experts, with a softmax over the k chosen experts. Some checkpoints have a
sliding window.
"""

from torch import Tensor, nn

from moray.engine.backends.formats import ExpertOutput
from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.embedding import Embedding
from moray.engine.layers.linear import GatheredLinear
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.layers.norm import RMSNorm
from moray.engine.layers.rotary import Rotary, RotaryEmbedding
from moray.engine.models.base import CausalLM
from moray.engine.models.tensors import TensorMap, plain, split_qkv, swiglu_experts
from moray.engine.partition import WHOLE, Partition


class MixtralDecoderLayer(nn.Module):
    """Runs attention and experts, each with a norm before it."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, partition, bias=False)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.moe = SparseMoe(Router(config, "softmax"), GatedExperts(config, partition))

    def forward(
        self, x: Tensor | ExpertOutput, residual: Tensor | None, rotary: Rotary, inputs: ModelInputs
    ) -> tuple[Tensor | ExpertOutput, Tensor]:
        """Run the layer. x and residual come from the layer before it; the next norm adds up what is returned."""
        h, residual = self.input_layernorm.add(x, residual)
        h = self.self_attn(h, rotary, inputs)
        h, residual = self.post_attention_layernorm.add(h, residual)
        return self.moe(h, inputs.num_tokens), residual


class MixtralForCausalLM(CausalLM):
    """Runs the whole model."""

    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        super().__init__(config, partition)
        self.rotary = RotaryEmbedding(config.rope)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MixtralDecoderLayer(config, partition) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = GatheredLinear(config.hidden_size, config.vocab_size, partition, bias=False)

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
        targets = plain("model.embed_tokens", "embed_tokens", (v, h), "weight")
        targets |= plain("model.norm", "norm", (h,), "weight")
        targets |= plain("lm_head", "lm_head", (v, h), "weight")
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            targets |= plain(f"{name}.input_layernorm", f"{ours}.input_layernorm", (h,), "weight")
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", "weight")
            targets |= plain(f"{name}.post_attention_layernorm", f"{ours}.post_attention_layernorm", (h,), "weight")
            moe = f"{name}.block_sparse_moe"
            targets |= plain(f"{moe}.gate", f"{ours}.moe.router", (config.num_experts, h), "weight")
            targets |= swiglu_experts(config, f"{moe}.experts", f"{ours}.moe.experts")
        return targets
