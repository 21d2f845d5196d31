"""ModelRunner: owns the KV cache, converts a schedule into tensors and runs the model on them."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

import torch
from torch import Tensor

from moray.engine.backends.base import Backend, StepGraphs
from moray.engine.backends.cpu.backend import CPU
from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import ModelConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.layers.attention import attention_layers
from moray.engine.models.base import CausalLM
from moray.engine.platform.transfer import to_device
from moray.engine.runner.expert_load import ExpertLoad
from moray.engine.runner.inputs import build_inputs

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ModelRunner:
    """Runs steps of one model, with the KV cache that allocate_cache makes."""

    def __init__(
        self, model: CausalLM, config: ModelConfig, dtype: torch.dtype, *, block_size: int, backend: Backend = CPU
    ) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.block_size = block_size
        self.backend = backend
        self.expert_load = ExpertLoad(model, config.num_experts, backend.torch_device)
        self._graphs: StepGraphs | None = None

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate num_blocks blocks of keys and values in each layer."""
        shape = (num_blocks, self.config.num_kv_heads, self.block_size, self.config.head_dim)
        for layer in attention_layers(self.model):
            layer.k_cache, layer.v_cache = self.backend.new_kv_cache(*shape, self.dtype)

    @torch.inference_mode()
    def measure_peak(self, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Return the bytes of the device's memory that the largest step uses on top of weights and KV cache.

        Returns 0 where the backend does not measure it.
        """
        self.allocate_cache(1)

        def run_largest_step() -> None:
            hidden_states = self._forward(self._one_prompt(max_num_batched_tokens))
            logits = self.compute_logits(hidden_states, [i % max_num_batched_tokens for i in range(max_num_seqs)])
            logits.float().log_softmax(1).sort(dim=1, descending=True, stable=True)  # what logprobs need

        return self.backend.measure_peak(run_largest_step)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one token, in the cache's first block, if the backend compiles kernels that way."""
        self.backend.warm_up(lambda: self.compute_logits(self._forward(self._one_prompt(1)), [0]))

    @torch.inference_mode()
    def capture_graphs(self, max_num_seqs: int, max_model_len: int) -> None:
        """Capture graphs, if the backend has any, which decode steps use from now on.

        Call it after allocate_cache: a graph contains the address of the KV cache.
        """
        max_blocks = -(-max_model_len // self.block_size)
        self._graphs = self.backend.capture_graphs(self._forward, max_num_seqs, max_blocks)

    @torch.inference_mode()
    def run(self, scheduled: SequenceOf[Scheduled], last_token_ids: Tensor | None = None) -> Tensor:
        """Run the scheduled tokens.

        last_token_ids: the tokens that the last step sampled, on the device; needed if sequences have unread tokens

        Returns the hidden states, [num_tokens, hidden_size] in schedule order, which are valid until the next run.
        """
        inputs = build_inputs(scheduled, self.block_size, self.backend, last_token_ids)
        if self._graphs is not None and all(item.num_tokens == 1 for item in scheduled):
            graphs = self._graphs
            return self.retry_out_of_memory(lambda: graphs.run(inputs))
        load_before = self.expert_load.copy()
        with self.backend.limit_threads(len(inputs.input_ids) * self.config.hidden_size):
            return self.retry_out_of_memory(lambda: self._forward(inputs), load_before)

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor, rows: SequenceOf[int]) -> Tensor:
        """Return the logits after the tokens at `rows` of the hidden states: [len(rows), vocab_size]."""
        if len(rows) < len(hidden_states) or list(rows) != list(range(len(rows))):
            hidden_states = hidden_states[to_device(rows, torch.int64, hidden_states.device)]
        with self.backend.limit_threads(len(rows) * self.config.hidden_size):
            return self.retry_out_of_memory(lambda: self.model.compute_logits(hidden_states))

    def retry_out_of_memory(self, call: Callable[[], T], load_before: Tensor | None = None) -> T:
        """Make a call, and repeat it once if the device runs out of memory.

        Before the retry PyTorch frees its cached memory: fragmentation is the usual reason for the error.

        call:         safe to make twice
        load_before:  a copy of the expert load before the call, which the retry starts from
        """
        try:
            return call()
        except torch.OutOfMemoryError as error:
            logger.warning(
                "%s; the step runs once more, after PyTorch freed its cached memory", str(error).splitlines()[0]
            )
        # Outside the handler: the exception keeps the memory of the first call alive.
        self.backend.free_cached_memory()
        if load_before is not None:
            self.expert_load.restore(load_before)
        return call()

    def _forward(self, inputs: ModelInputs) -> Tensor:
        hidden_states: Tensor = self.model(inputs)
        return hidden_states

    def _one_prompt(self, num_tokens: int) -> ModelInputs:
        """Return a step with one prompt of `num_tokens` tokens, whose block table repeats the cache's first block."""
        num_blocks = -(-num_tokens // self.block_size)
        positions = torch.arange(num_tokens, device=self.backend.torch_device)
        zeros = torch.zeros_like(positions)
        attention = self.backend.build_attention_metadata(
            [num_tokens], [num_tokens], [[0] * num_blocks], self.block_size
        )
        return ModelInputs(zeros, positions, zeros, attention)
