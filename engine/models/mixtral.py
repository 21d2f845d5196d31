"""Mixtral (model_type mixtral), and merged models with its architecture.

Paper: arXiv 2401.04088; reference: transformers' modeling_mixtral. The model has sequential pre-norm blocks, RMSNorm,
GQA, plain rope, no biases and SwiGLU experts, with a softmax over the k chosen experts. Some checkpoints have a
sliding window.
"""

from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import TensorMap, plain, split_qkv, swiglu_experts
from moray.engine.partition import Partition


class MixtralForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        attention = SelfAttention(config, partition, bias=False)
        return SequentialLayer(config, attention, SparseMoe(Router(config, "softmax"), GatedExperts(config, partition)))

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        targets = map_outside_layers(config)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", "weight")
            moe = f"{name}.block_sparse_moe"
            targets |= plain(f"{moe}.gate", f"{ours}.moe.router", (config.num_experts, config.hidden_size), "weight")
            targets |= swiglu_experts(config, f"{moe}.experts", f"{ours}.moe.experts")
        return targets
