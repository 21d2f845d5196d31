"""Mixtral (model_type mixtral) and merges in its form.

Paper: arXiv 2401.04088; reference: transformers' modeling_mixtral. Sequential pre-norm blocks, RMSNorm, GQA, plain
rope, no biases, softmax over the k chosen of the SwiGLU experts; some checkpoints have a sliding window.
"""

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.inputs import ModelInputs
from engine.layers.attention import SelfAttention
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.moe import GatedExperts
from engine.layers.norm import Norm, RMSNorm
from engine.layers.rotary import Rotary, RotaryEmbedding
from engine.models.tensors import TensorMap, plain, split_qkv, swiglu_experts


class MixtralSparseMoeBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = GatedExperts(config, "softmax")

    def forward(
        self, hidden_states: Tensor, residual: Tensor, next_norm: Norm, num_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.experts(hidden_states, self.gate(hidden_states), residual, next_norm, num_tokens)


class MixtralDecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, bias=False)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.block_sparse_moe = MixtralSparseMoeBlock(config)

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: Norm, rotary: Rotary, inputs: ModelInputs
    ) -> tuple[Tensor, Tensor]:
        """x and its input norm -> the same for the layer behind, whose norm is next_norm"""
        x, normed = self.post_attention_layernorm.add(self.self_attn(normed, rotary, inputs), x)
        return self.block_sparse_moe(normed, x, next_norm, inputs.num_tokens)


class MixtralForCausalLM(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = RotaryEmbedding(config.rope)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MixtralDecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """-> hidden states [num_tokens, hidden_size], behind the last norm"""
        rotary = self.rotary(inputs.positions, inputs.rope_sets)
        x = self.embed_tokens(inputs.input_ids)
        first, *others = (layer.get_submodule("input_layernorm") for layer in self.layers)
        normed = first(x)
        for layer, next_norm in zip(self.layers, (*others, self.norm), strict=True):
            x, normed = layer(x, normed, next_norm, rotary, inputs)
        return normed

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size]"""
        return self.lm_head(hidden_states)


def tensor_map(config: ModelConfig) -> TensorMap:
    """Published tensor name -> its place in the fused parameters."""
    h, v = config.hidden_size, config.vocab_size
    targets = plain("model.embed_tokens", "embed_tokens", (v, h), "weight")
    targets |= plain("model.norm", "norm", (h,), "weight")
    targets |= plain("lm_head", "lm_head", (v, h), "weight")
    for n in range(config.num_layers):
        name, ours = f"model.layers.{n}", f"layers.{n}"
        targets |= plain(f"{name}.input_layernorm", f"{ours}.input_layernorm", (h,), "weight")
        targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", "weight")
        targets |= plain(f"{name}.post_attention_layernorm", f"{ours}.post_attention_layernorm", (h,), "weight")
        moe = "block_sparse_moe"
        targets |= plain(f"{name}.{moe}.gate", f"{ours}.{moe}.gate", (config.num_experts, h), "weight")
        targets |= swiglu_experts(config, f"{name}.{moe}.experts", f"{ours}.{moe}.experts")
    return targets
