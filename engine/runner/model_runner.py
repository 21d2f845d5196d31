"""ModelRunner: owns the KV cache, converts a schedule into tensors and runs the model on them."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from moray.engine.backends.base import Backend, StepGraphs
from moray.engine.backends.cpu.backend import CPU
from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.engine.config import ModelConfig
from moray.engine.core.graph_shapes import GraphShapes
from moray.engine.core.scheduler import Scheduled
from moray.engine.layers.attention import attention_layers
from moray.engine.models.base import CausalLM
from moray.engine.platform.allocator import out_of_memory_named
from moray.engine.platform.transfer import to_device
from moray.engine.runner.expert_load import ExpertLoad
from moray.engine.runner.inputs import one_prompt, plan_prompt, plan_step
from moray.engine.runner.kv_scales import calibration_prompt, scales_for
from moray.engine.runner.step_interrupt import StepInterrupted

logger = logging.getLogger(__name__)

T = TypeVar("T")


def send_to_none(name: str, *arguments: Any) -> None:
    """Send a call to the other ranks, where there are none."""


class ModelRunner:
    """Runs steps of one model, or of a rank's part of it, with the KV cache that allocate_cache makes.

    On rank 0 each call is first sent to the other ranks, whose runners make it too.
    """

    def __init__(
        self,
        model: CausalLM,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        block_size: int,
        backend: Backend = CPU,
        send: Callable[..., None] = send_to_none,
    ) -> None:
        """Make a runner.

        send: sends the name of a method of this class and its arguments to the other ranks
        """
        self.model = model
        self.config = config
        self.dtype = dtype
        self.block_size = block_size
        self.backend = backend
        self.expert_load = ExpertLoad(model, config.num_experts, backend.torch_device)
        self._graphs: StepGraphs | None = None
        self._send = send
        self._hidden_states: Tensor | None = None  # of the last step

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate num_blocks blocks of keys and values in each layer."""
        self._send("allocate_cache", num_blocks)
        self._allocate_cache(num_blocks)

    def _allocate_cache(self, num_blocks: int, *, is_quantized: bool = True) -> None:
        """Allocate the cache, in the dtype of the model if it is not to be quantized."""
        is_quantized = is_quantized and self.config.kv_cache is not None
        for layer in attention_layers(self.model):
            shape = (num_blocks, layer.num_kv_heads, self.block_size, layer.head_dim)
            dtype = torch.float8_e4m3fn if is_quantized else self.dtype
            layer.k_cache, layer.v_cache = self.backend.new_kv_cache(*shape, dtype)

    @torch.inference_mode()
    def calibrate_cache(self) -> None:
        """Choose the scales of a quantized KV cache, where the checkpoint has none; see kv_scales.py."""
        self._send("calibrate_cache")
        if self.config.kv_cache is None or self.config.kv_cache.is_stored:
            return
        token_ids = calibration_prompt(self.config)
        blocks = list(range(-(-len(token_ids) // self.block_size)))
        self._allocate_cache(len(blocks), is_quantized=False)
        layers = attention_layers(self.model)
        largest = [torch.zeros(2, layer.num_kv_heads, device=self.backend.torch_device) for layer in layers]
        for rope_set in (0, 1) if self.config.rope.long_factor else (0,):
            self._forward(self._prompt(token_ids, blocks, rope_set))
            for layer, of_layer in zip(layers, largest, strict=True):
                for row, cache in enumerate((layer.k_cache, layer.v_cache)):
                    of_layer[row] = torch.maximum(of_layer[row], cache.abs().amax(dim=(0, 2, 3)).float())
        for layer, of_layer in zip(layers, largest, strict=True):
            layer.take_kv_scales(scales_for(of_layer))

    @torch.inference_mode()
    def measure_available(self, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Return the bytes of a device's memory that weights and the largest step leave: of the rank with the least.

        The step counts only where the backend measures it.
        """
        self._send("measure_available", max_num_seqs, max_num_batched_tokens)
        self._allocate_cache(1)

        def run_largest_step() -> None:
            hidden_states = self._forward(self._one_prompt(max_num_batched_tokens))
            num_rows = max(max_num_seqs, min(self.backend.logprob_rows, max_num_batched_tokens))
            logits = self._compute_logits(hidden_states, [i % max_num_batched_tokens for i in range(num_rows)])
            _ = logits.to(torch.float32, copy=True), logits.clone()  # what processors change, rows with logprobs

        peak = self.backend.measure_peak(run_largest_step)
        available = torch.tensor([[self.backend.available_bytes - peak]], device=self.backend.torch_device)
        return int(self.backend.communicator.gather(available).min())

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one token, in the cache's first block, if the backend compiles kernels that way."""
        self._send("warm_up")
        self.backend.warm_up(lambda: self._compute_logits(self._forward(self._one_prompt(1)), [0]))

    @torch.inference_mode()
    def capture_graphs(self, shapes: GraphShapes) -> None:
        """Let steps of these shapes run from graphs, if the backend has any, captured now or when they are needed.

        Call it after allocate_cache: a graph contains the address of the KV cache.
        """
        self._send("capture_graphs", shapes)
        calls = self._forward, self.model.compute_logits
        self._graphs = self.backend.capture_graphs(*calls, shapes, self.expert_load.counters)

    @torch.inference_mode()
    def run(self, scheduled: SequenceOf[Scheduled], last_token_ids: Tensor | None = None) -> Tensor:
        """Run the scheduled tokens.

        last_token_ids: the tokens that the last step sampled, on the device; needed if sequences have unread tokens

        Returns the hidden states, [num_tokens, hidden_size] in schedule order, which are valid until the next run.
        """
        plan = plan_step(scheduled)
        assert last_token_ids is not None or not plan.num_pending, f"no step sampled {plan.num_pending} tokens"
        self._send("run_plan", plan)
        try:
            return self._run(plan, last_token_ids)
        except StepInterrupted:
            self.backend.communicator.cancel()
            raise

    @torch.inference_mode()
    def run_plan(self, plan: StepPlan) -> None:
        """Run a step that rank 0 has planned, on another rank."""
        self._hidden_states = self._run(plan, None)

    def _run(self, plan: StepPlan, last_token_ids: Tensor | None) -> Tensor:
        graphs = self._graphs
        build_inputs = self.backend.build_inputs if graphs is None else graphs.build_inputs
        inputs = build_inputs(plan, self.block_size, last_token_ids)
        if self.backend.communicator.partition.size > 1 and plan.num_pending:
            # Only rank 0 has the tokens. They come in the order of the device's work: no host waits for them.
            of_ranks = self.backend.communicator.gather(inputs.input_ids[None])
            inputs.input_ids.copy_(of_ranks[0, : len(inputs.input_ids)])
        run: Callable[[ModelInputs], Tensor] = self._forward if graphs is None else partial(graphs.run, plan)
        # A replay on a GPU cannot fail half way.
        is_whole = self.backend.is_async and graphs is not None and graphs.replays(plan)
        load_before = None if is_whole else self.expert_load.copy()
        with self.backend.limit_threads(plan.num_tokens * self.config.hidden_size):
            try:
                return self.retry_out_of_memory(lambda: run(inputs), load_before)
            except StepInterrupted:
                if load_before is not None:
                    self.expert_load.restore(load_before)
                raise

    @torch.inference_mode()
    def compute_logits(self, hidden_states: Tensor, rows: SequenceOf[int]) -> Tensor:
        """Return the logits after the tokens at `rows` of the last step's hidden states: [len(rows), vocab_size].

        They are valid until the next run.
        """
        if self._graphs is not None and (logits := self._graphs.find_logits()) is not None:  # on all ranks
            return _take_rows(logits, rows)
        self._send("repeat_logits", list(rows))
        return self._compute_logits(hidden_states, rows)

    def read_expert_load(self) -> Tensor:
        """Return the tokens of each expert, see ExpertLoad.read."""
        self.backend.communicator.wait()
        return self.expert_load.read()

    @torch.inference_mode()
    def repeat_logits(self, rows: SequenceOf[int]) -> None:
        """Compute this rank's part of the logits that rank 0 computes."""
        assert self._hidden_states is not None, "run_plan() comes first"
        self._compute_logits(self._hidden_states, rows)

    def _compute_logits(self, hidden_states: Tensor, rows: SequenceOf[int]) -> Tensor:
        hidden_states = _take_rows(hidden_states, rows)
        with self.backend.limit_threads(len(rows) * self.config.hidden_size):
            return self.retry_out_of_memory(lambda: self.model.compute_logits(hidden_states))

    def retry_out_of_memory(self, call: Callable[[], T], load_before: Tensor | None = None) -> T:
        """Make a call, and repeat it once if the device runs out of memory. The second error is raised.

        Before the retry PyTorch frees its cached memory: fragmentation is the usual reason for the error.

        call:         safe to make twice
        load_before:  a copy of the expert load before the call, which the retry starts from

        With several ranks a call is made once: the others have not failed, and would not repeat it.
        """

        def call_once() -> T:
            with out_of_memory_named():
                return call()

        if self.backend.communicator.partition.size > 1:
            return call_once()
        try:
            return call_once()
        except torch.OutOfMemoryError as error:
            logger.warning(
                "%s; the step runs once more, after PyTorch freed its cached memory", str(error).splitlines()[0]
            )
        # Outside the handler: the exception keeps the memory of the first call alive.
        self.backend.free_cached_memory()
        if load_before is not None:
            self.expert_load.restore(load_before)
        try:
            return call_once()
        except torch.OutOfMemoryError:
            if load_before is not None:
                self.expert_load.restore(load_before)
            raise

    def _forward(self, inputs: ModelInputs) -> Tensor:
        hidden_states: Tensor = self.model(inputs)
        return hidden_states

    def _one_prompt(self, num_tokens: int) -> ModelInputs:
        """Return a step with one prompt of `num_tokens` tokens, whose block table repeats the cache's first block."""
        return self.backend.build_inputs(one_prompt(num_tokens, self.block_size), self.block_size)

    def _prompt(self, token_ids: list[int], block_table: list[int], rope_set: int = 0) -> ModelInputs:
        """Return a step with one prompt."""
        return self.backend.build_inputs(plan_prompt(token_ids, block_table, rope_set), self.block_size)


def _take_rows(x: Tensor, rows: SequenceOf[int]) -> Tensor:
    """Return rows of x: x itself if these are all of them, in their order."""
    if len(rows) == x.shape[0] and list(rows) == list(range(len(rows))):
        return x
    return x[to_device(rows, torch.int64, x.device)]
