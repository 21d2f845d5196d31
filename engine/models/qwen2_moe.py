"""Qwen1.5's and Qwen2's models with experts (model_type qwen2_moe): Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B.

Reference: transformers' modeling_qwen2_moe. The model is Mixtral's with biases of q, k and v; small experts whose
weights are a softmax over all experts; and a shared expert, which every token goes through besides, weighted by the
sigmoid of its gate. Some layers may have one MLP in place of experts.
"""

from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import DenseMlp, GatedExperts, Router, SharedExpert, SparseMoe
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import PROJECTIONS, TensorMap, plain, split_qkv, swiglu, swiglu_experts
from moray.engine.partition import Partition


class Qwen2MoeForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        attention = SelfAttention(config, partition, bias=config.attention_bias, output_bias=False)
        if n in config.dense_layers:
            return SequentialLayer(config, attention, DenseMlp(config, partition))
        router = Router(config, "softmax" if config.norm_topk_prob else "softmax_all")
        moe = SparseMoe(router, GatedExperts(config, partition))
        return SequentialLayer(config, attention, moe, SharedExpert(config, partition))

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        h = config.hidden_size
        of_qkv = ("weight", "bias") if config.attention_bias else ("weight",)
        targets = map_outside_layers(config)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            attention = f"{ours}.self_attn"
            targets |= split_qkv(config, f"{name}.self_attn", attention, *of_qkv, of_output=("weight",))
            if n in config.dense_layers:
                targets |= swiglu(f"{name}.mlp", f"{ours}.moe.expert", h, config.dense_intermediate_size)
                continue
            mlp, shared = f"{name}.mlp", f"{ours}.shared"
            targets |= plain(f"{mlp}.gate", f"{ours}.moe.router", (config.num_experts, h), "weight")
            targets |= swiglu_experts(config, f"{mlp}.experts", f"{ours}.moe.experts", PROJECTIONS)
            targets |= plain(f"{mlp}.shared_expert_gate", f"{shared}.gate", (1, h), "weight")
            targets |= swiglu(f"{mlp}.shared_expert", f"{shared}.expert", h, config.shared_intermediate_size)
        return targets
