"""ModelRunner: owns the KV cache, turns a schedule into tensors and runs the model on them."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.device import CPU, Device
from engine.inputs import build_inputs
from engine.layers.attention import attention_layers
from engine.models import CausalLM
from engine.scheduler import Scheduled
from kernels.cpu.paged_attention import new_kv_cache


class ModelRunner:
    """Runs steps of one model over `num_blocks` cache blocks of `block_size` tokens."""

    def __init__(
        self,
        model: CausalLM,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        block_size: int,
        device: Device = CPU,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.device = device
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        for layer in attention_layers(model):
            layer.k_cache, layer.v_cache = (new_kv_cache(*shape, dtype, device.torch) for _ in range(2))

    @torch.inference_mode()
    def run(self, scheduled: SequenceOf[Scheduled]) -> Tensor:
        """Run the scheduled tokens -> their hidden states [num_tokens, hidden_size], in schedule order."""
        return self.model(build_inputs(scheduled, self.block_size, self.device))

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor, rows: SequenceOf[int]) -> Tensor:
        """Logits [len(rows), vocab_size] after the tokens at `rows`."""
        return self.model.compute_logits(hidden_states[list(rows)])
