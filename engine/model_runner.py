"""ModelRunner: owns the KV cache, turns a schedule into tensors and runs the model on them."""

from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.decode_graphs import DecodeGraphs
from engine.device import CPU, Device
from engine.expert_load import ExpertLoad
from engine.inputs import ModelInputs, build_inputs, paged_batch
from engine.layers.attention import attention_layers
from engine.limits import ATTENTION_BYTES
from engine.models import CausalLM
from engine.scheduler import Scheduled
from engine.transfer import to_device
from kernels.cpu.cores import one_core
from kernels.cpu.paged_attention import AttentionBatch, new_key_cache, new_value_cache

# An operation on fewer takes less than waking the other cores.
ONE_CORE_NUMBERS = 2**17


class ModelRunner:
    """Runs steps of one model, over the cache that allocate_cache makes."""

    def __init__(
        self, model: CausalLM, config: ModelConfig, dtype: torch.dtype, *, block_size: int, device: Device = CPU
    ) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.block_size = block_size
        self.device = device
        self.expert_load = ExpertLoad(model, config.num_experts, device.torch)
        self._graphs: DecodeGraphs | None = None

    def allocate_cache(self, num_blocks: int) -> None:
        """Make room for num_blocks blocks of keys and values in each layer."""
        shape = (num_blocks, self.config.num_kv_heads, self.block_size, self.config.head_dim)
        for layer in attention_layers(self.model):
            if self.device.backend == "torch":
                layer.k_cache, layer.v_cache = new_key_cache(*shape, self.dtype), new_value_cache(*shape, self.dtype)
            else:
                layer.k_cache, layer.v_cache = (
                    torch.zeros(shape, dtype=self.dtype, device=self.device.torch) for _ in range(2)
                )

    @torch.inference_mode()
    def measure_peak(self, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Bytes of GPU memory that the largest step takes beside the weights and the cache, measured by running it."""
        device = self.device.torch
        self.allocate_cache(1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        hidden_states = self._forward(self._largest_step(max_num_batched_tokens))
        rows = [i % max_num_batched_tokens for i in range(max_num_seqs)]
        logits = self.compute_logits(hidden_states, rows)
        logits.float().log_softmax(1).sort(dim=1, descending=True, stable=True)  # as logprobs take it
        peak = torch.cuda.max_memory_allocated(device) - before
        del hidden_states, logits
        torch.cuda.empty_cache()
        return peak + ATTENTION_BYTES

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a token on the CPU, in the cache's first block: kernels are compiled when first called, for seconds."""
        token = torch.zeros(1, dtype=torch.int64)
        attention = AttentionBatch.build([1], [1], [[0]], self.block_size)
        self.compute_logits(self._forward(ModelInputs(token, token, token, attention)), [0])

    def capture_graphs(self, max_num_seqs: int, max_model_len: int) -> None:
        """Replay decode steps from now on. Call it when the cache is there: graphs know where it lies."""
        max_blocks = -(-max_model_len // self.block_size)
        self._graphs = DecodeGraphs(self._forward, max_num_seqs, max_blocks, self.device.torch)
        with torch.inference_mode():
            self._graphs.capture()

    @torch.inference_mode()
    def run(self, scheduled: SequenceOf[Scheduled], last_token_ids: Tensor | None = None) -> Tensor:
        """Run the scheduled tokens -> their hidden states [num_tokens, hidden_size], in schedule order.

        last_token_ids: what the last step sampled, where sequences have unread tokens. The result is valid until the
        next run.
        """
        inputs = build_inputs(scheduled, self.block_size, self.device, last_token_ids)
        if self._graphs is not None and all(item.num_tokens == 1 for item in scheduled):
            return self._graphs.run(inputs)
        with self._cores(len(inputs.input_ids)):
            return self._forward(inputs)

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor, rows: SequenceOf[int]) -> Tensor:
        """Logits [len(rows), vocab_size] after the tokens at `rows`."""
        if len(rows) < len(hidden_states) or list(rows) != list(range(len(rows))):
            hidden_states = hidden_states[to_device(rows, torch.int64, hidden_states.device)]
        with self._cores(len(rows)):
            return self.model.compute_logits(hidden_states)

    def _cores(self, num_tokens: int) -> AbstractContextManager[None]:
        """Keep a CPU's small operations on one core."""
        is_small = num_tokens * self.config.hidden_size <= ONE_CORE_NUMBERS
        return one_core() if is_small and self.device.torch.type == "cpu" else nullcontext()

    def _forward(self, inputs: ModelInputs) -> Tensor:
        hidden_states: Tensor = self.model(inputs)
        return hidden_states

    def _largest_step(self, num_tokens: int) -> ModelInputs:
        """One long prompt, in a cache of one block."""
        device = self.device.torch
        num_blocks = -(-num_tokens // self.block_size)
        positions = torch.arange(num_tokens, device=device)
        attention = paged_batch([num_tokens], [num_tokens], [[0] * num_blocks], self.block_size, device)
        return ModelInputs(torch.zeros_like(positions), positions, torch.zeros_like(positions), attention)
