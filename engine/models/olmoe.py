"""OLMoE (model_type olmoe): OLMoE-1B-7B.

Paper: arXiv 2409.02060; reference: transformers' modeling_olmoe. The model is Mixtral's with an RMSNorm of all heads of
q, and of all heads of k, before rope; 64 small experts, 8 of them for a token, whose weights are a softmax over all
experts; and in some checkpoints limits of q, k and v.
"""

from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.layers.qk_norm import RowNorm
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import PROJECTIONS, TensorMap, map_qk_norm, plain, split_qkv, swiglu_experts
from moray.engine.partition import Partition


class OlmoeForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        attention = SelfAttention(config, partition, bias=False, qk_norm=RowNorm)
        router = Router(config, "softmax" if config.norm_topk_prob else "softmax_all")
        return SequentialLayer(config, attention, SparseMoe(router, GatedExperts(config, partition)))

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        targets = map_outside_layers(config)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", "weight")
            targets |= map_qk_norm(f"{name}.self_attn", f"{ours}.self_attn", q, k)
            gate = (config.num_experts, config.hidden_size)
            targets |= plain(f"{name}.mlp.gate", f"{ours}.moe.router", gate, "weight")
            targets |= swiglu_experts(config, f"{name}.mlp.experts", f"{ours}.moe.experts", PROJECTIONS)
        return targets
