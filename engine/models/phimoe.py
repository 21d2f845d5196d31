"""Phi-3.5-MoE and its smaller relatives (model_type phimoe: Phi-mini-MoE, Phi-tiny-MoE).

Paper: arXiv 2404.14219; reference: transformers' modeling_phimoe. The model has sequential pre-norm blocks, LayerNorm
with bias (although the eps is called rms_norm_eps), GQA, LongRoPE, sparsemixer routing to two SwiGLU experts and an
lm_head with bias.
"""

from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.layers.norm import LayerNorm, Norm
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import TensorMap, plain, split_qkv, swiglu_experts
from moray.engine.partition import Partition


class PhimoeForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_norm(config: ModelConfig) -> Norm:
        return LayerNorm(config.hidden_size, config.norm_eps)

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        attention = SelfAttention(config, partition, bias=config.attention_bias)
        moe = SparseMoe(Router(config, "sparsemixer"), GatedExperts(config, partition))
        return SequentialLayer(config, attention, moe, make_norm=PhimoeForCausalLM.make_norm)

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        both = ("weight", "bias")
        targets = map_outside_layers(config, norm_parts=both)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            of_attention = both if config.attention_bias else ("weight",)
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", *of_attention)
            moe = f"{name}.block_sparse_moe"
            targets |= plain(f"{moe}.gate", f"{ours}.moe.router", (config.num_experts, config.hidden_size), "weight")
            targets |= swiglu_experts(config, f"{moe}.experts", f"{ours}.moe.experts")
        return targets
