"""OpenAI's gpt-oss (model_type gpt_oss): gpt-oss-20b, gpt-oss-120b.

Paper: arXiv 2508.10925; reference: transformers' modeling_gpt_oss. The model is Mixtral's with biases of all linear
layers but the head, a sink of each head of attention, a sliding window in every other layer, YaRN, norms that round
after their weight, and 4 experts for a token with a clamped SwiGLU. A published tensor holds a matrix of all experts of
a layer, in which gate and up take turns.
"""

from moray.engine.backends.formats import Activation
from moray.engine.checkpoint.weights import Target
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import PROJECTIONS, TensorMap, plain, split_qkv, swiglu_experts
from moray.engine.partition import Partition


class GptOssForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        has_window = n not in config.full_layers
        attention = SelfAttention(config, partition, bias=config.attention_bias, has_window=has_window, has_sinks=True)
        activation = Activation("clamped_swiglu", config.swiglu_limit)
        experts = GatedExperts(config, partition, activation=activation, bias=True)
        return SequentialLayer(config, attention, SparseMoe(Router(config, "softmax", bias=True), experts))

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        h, i = config.hidden_size, config.intermediate_size
        of_attention = ("weight", "bias") if config.attention_bias else ("weight",)
        targets = map_outside_layers(config)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            attention, mlp, experts = f"{name}.self_attn", f"{name}.mlp", f"{ours}.moe.experts"
            targets |= split_qkv(config, attention, f"{ours}.self_attn", *of_attention)
            targets[f"{attention}.sinks"] = Target(f"{ours}.self_attn.sinks", (config.num_heads,))
            targets |= plain(f"{mlp}.router", f"{ours}.moe.router", (config.num_experts, h), "weight", "bias")
            targets |= swiglu_experts(config, f"{mlp}.experts", experts, PROJECTIONS)
            for e in range(config.num_experts):
                expert, up_bias = f"{mlp}.experts.{e}", f"{experts}.gate_up_proj_bias"
                targets[f"{expert}.gate_proj.bias"] = Target(up_bias, (i,), (e, slice(0, i)))
                targets[f"{expert}.up_proj.bias"] = Target(up_bias, (i,), (e, slice(i, 2 * i)))
                targets[f"{expert}.down_proj.bias"] = Target(f"{experts}.down_proj_bias", (h,), (e,))
        return targets
