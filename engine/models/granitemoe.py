"""Granite's models with experts (model_type granitemoe): granite-3.0 and 3.1, 1b-a400m and 3b-a800m.

Reference: transformers' modeling_granitemoe. The model is Mixtral's with small experts, 8 of them for a token; factors
of the embeddings, of the scores of attention, of what a block adds to the residual and of the logits; and a head that
is tied to the embeddings. A published tensor holds a matrix of all experts of a layer.
"""

from moray.engine.checkpoint.weights import Target
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.models.sequential import SequentialForCausalLM, SequentialLayer, map_outside_layers
from moray.engine.models.tensors import TensorMap, plain, split_qkv
from moray.engine.partition import Partition


class GraniteMoeForCausalLM(SequentialForCausalLM):
    """Runs the whole model."""

    @staticmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        attention = SelfAttention(config, partition, bias=False)
        return SequentialLayer(config, attention, SparseMoe(Router(config, "softmax"), GatedExperts(config, partition)))

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        h, i = config.hidden_size, config.intermediate_size
        targets = map_outside_layers(config)
        for n in range(config.num_layers):
            name, ours = f"model.layers.{n}", f"layers.{n}"
            targets |= split_qkv(config, f"{name}.self_attn", f"{ours}.self_attn", "weight")
            moe, experts = f"{name}.block_sparse_moe", f"{ours}.moe.experts"
            targets |= plain(f"{moe}.router.layer", f"{ours}.moe.router", (config.num_experts, h), "weight")
            for e in range(config.num_experts):  # the rows of a gate come before those of up
                targets[f"{moe}.input_linear.{e}.weight"] = Target(f"{experts}.gate_up_proj", (2 * i, h), (e,))
                targets[f"{moe}.output_linear.{e}.weight"] = Target(f"{experts}.down_proj", (h, i), (e,))
        return targets
