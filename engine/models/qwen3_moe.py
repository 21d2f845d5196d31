"""Qwen3's models with experts (model_type qwen3_moe): Qwen3-30B-A3B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B.

Paper: arXiv 2505.09388; reference: transformers' modeling_qwen3_moe. The model is Mixtral's with an RMSNorm of each
head of q and k before rope, a head_dim that the hidden size does not give, and up to 128 small experts, 8 of them for a
token. Some layers may have one MLP in place of experts.
"""

from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import DenseMlp, GatedExperts, Router, SparseMoe
from moray.engine.layers.qk_norm import HeadNorm
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import PROJECTIONS, TensorMap, map_qk_norm, plain, split_qkv, swiglu, swiglu_experts
from moray.engine.partition import Partition


class Qwen3MoeForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        attention = SelfAttention(config, partition, bias=False, qk_norm=HeadNorm)
        if n in config.dense_layers:
            return SequentialLayer(config, attention, DenseMlp(config, partition))
        router = Router(config, "softmax" if config.norm_topk_prob else "softmax_all")
        return SequentialLayer(config, attention, SparseMoe(router, GatedExperts(config, partition)))

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        h = config.hidden_size
        targets = map_outside_layers(config)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", "weight")
            targets |= map_qk_norm(f"{name}.self_attn", f"{ours}.self_attn", config.head_dim, config.head_dim)
            if n in config.dense_layers:
                targets |= swiglu(f"{name}.mlp", f"{ours}.moe.expert", h, config.dense_intermediate_size)
                continue
            targets |= plain(f"{name}.mlp.gate", f"{ours}.moe.router", (config.num_experts, h), "weight")
            targets |= swiglu_experts(config, f"{name}.mlp.experts", f"{ours}.moe.experts", PROJECTIONS)
        return targets
