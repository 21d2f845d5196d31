"""Backend: the interface to everything that depends on the device. One object is chosen once, for the whole engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from moray.engine.backends.communicator import ALONE, Communicator
from moray.engine.backends.formats import ExpertOutput, QuantizedFormat, WeightFormat
from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.engine.core.graph_shapes import GraphShapes
from moray.engine.errors import DeviceError
from moray.engine.partition import Partition
from moray.engine.quantization.scheme import WeightKind
from moray.engine.sampling.sampler import Sampler
from moray.kernels.e4m3 import KvScales


class NormKernel(Protocol):
    """Runs a LayerNorm or RMSNorm with its weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise rows. x and the result: [num_tokens, hidden_size]"""

    def add(self, x: Tensor | ExpertOutput, residual: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """Return x * multiplier + residual, and the normalised sum; both are [num_tokens, hidden_size]."""


class StepGraphs(Protocol):
    """Runs steps in place of the model."""

    def replays(self, plan: StepPlan) -> bool:
        """Return whether run() replays a graph for this step; else it calls the model."""

    def build_inputs(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> ModelInputs:
        """Build the inputs of a step where run() wants them; see Backend.build_inputs."""

    def run(self, plan: StepPlan, inputs: ModelInputs) -> Tensor:
        """Run a step; return its hidden states, [plan.num_tokens, hidden_size], which are valid until the next run."""

    def find_logits(self) -> Tensor | None:
        """Return the logits of all tokens of the last step, [num_tokens, vocab_size], if its graph has computed them.

        They are valid until the next run.
        """


class Backend(ABC):
    """Represents a device: its kernels, its weight formats, its sampler and its memory.

    A device must define the abstract methods. The others have a default for devices that need nothing there.

    name:               what EngineConfig.device and DEFAULTS in core/step_limits.py call the device
    is_async:           whether launched work runs while the host continues
    weight_formats:     the format of weights that are loaded as they are, by their dtype
    quantized_formats:  the format of quantized weights, by their kind
    logprob_rows:       rows of logits that are in memory at once for the logprobs of prompts
    has_whole_experts:  whether its formats run experts that a rank has whole, see Partition
    torch_device:       where tensors are allocated
    communicator:       connects the ranks that hold the parts of the model

    A device that has ranks can be pickled: each rank gets a copy, which join_ranks() makes its own.
    """

    name: ClassVar[str]
    is_async: ClassVar[bool]
    weight_formats: Mapping[torch.dtype, WeightFormat]
    quantized_formats: Mapping[WeightKind, QuantizedFormat] = MappingProxyType({})
    logprob_rows: ClassVar[int] = 64
    has_whole_experts: ClassVar[bool] = False
    torch_device: torch.device
    communicator: Communicator = ALONE

    @property
    @abstractmethod
    def device_name(self) -> str:
        """Return the model name of the processor or GPU."""

    @property
    @abstractmethod
    def available_bytes(self) -> int:
        """Return the bytes of memory that are free on the device now."""

    @abstractmethod
    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, *, rounds_last: bool) -> NormKernel:
        """Return the kernel of a LayerNorm, or without a bias of an RMSNorm.

        weight, bias: [hidden_size]
        rounds_last:  an RMSNorm rounds a row to its dtype after the weight, not before it
        """

    @abstractmethod
    def norm_queries_and_keys(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
    ) -> None:
        """Apply an RMSNorm to each of the leading segments of every row, in place.

        There are num_q segments of queries and then num_k of keys. A segment is a head, or all heads
        together. What comes after the segments in a row stays as it is.

        qkv:       [num_tokens, width]
        q_weight:  [columns of a segment of queries]
        k_weight:  [columns of a segment of keys]
        """

    @abstractmethod
    def attend(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: Any,
        *,
        num_heads: int,
        scale: float,
        sliding_window: int | None,
        sinks: Tensor | None,
        kv_scales: KvScales | None,
    ) -> Tensor:
        """Rotate q and k, write k and v to the cache, and attend from each token to the keys up to it.

        qkv:               [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v, each head by head
        rotary:            cos and sin, see layers/rotary.py
        k_cache, v_cache:  of this layer, from new_kv_cache
        metadata:          from build_attention_metadata
        scale:             multiplies q k^T
        sliding_window:    number of keys that a query attends to, its own included; None = all
        sinks:             [num_heads] fp32, a score of each head that has a weight in the softmax and no value; it is
                           not scaled. None = there are none
        kv_scales:         of caches of float8_e4m3fn; None = the caches have the dtype of qkv

        Returns [num_tokens, num_heads, head_dim].
        """

    @abstractmethod
    def new_kv_cache(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values as zeros, both [num_blocks, num_kv_heads, block_size, head_dim].

        dtype: that of the model, or torch.float8_e4m3fn
        """

    def make_kv_scales(self, scales: Tensor) -> KvScales:
        """Return the scales of a layer's cache of float8_e4m3fn. scales: [2, num_kv_heads] of keys and of values"""
        return KvScales.of(scales.to(self.torch_device))

    @abstractmethod
    def build_attention_metadata(self, plan: StepPlan, block_size: int) -> Any:
        """Build what `attend` needs to know of a step; it is built once a step and read by every layer."""

    def build_inputs(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> ModelInputs:
        """Build the inputs of a step, in memory of their own.

        last_token_ids: the tokens that the last step sampled, on the device, for those that the host has not read;
                        None = only rank 0 has them
        """
        input_ids, positions, rope_sets = (
            torch.from_numpy(values).to(self.torch_device)
            for values in (plan.input_ids.copy(), plan.positions, plan.of_tokens(plan.rope_sets))
        )
        plan.write_pending(input_ids, last_token_ids)
        return ModelInputs(input_ids, positions, rope_sets, self.build_attention_metadata(plan, block_size))

    @abstractmethod
    def make_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> Sampler:
        """Return the sampler for logits on this device."""

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise DeviceError if the kernels do not run in this dtype on this device."""

    def wait_for_memory(self) -> None:
        """Wait until memory of processes that have ended is free, on a device that this process has for itself."""

    def prepare_ranks(self, size: int, memory: int) -> None:
        """Check that `size` ranks can run here, and prepare the memory through which they find each other.

        memory: descriptor of an empty file in memory, which all ranks get; it may be made larger

        Raises DeviceError where a model cannot be split among so many ranks on this device.
        """
        raise DeviceError(
            f"{self.name} has no ranks yet: engine.tensor_parallel is {size}; on this device it can be 1."
        )

    def join_ranks(self, partition: Partition, memory: int, on_wait: Callable[[float, int | None], None]) -> "Backend":
        """Return the device that one of several ranks uses. Each rank calls it, in its own process.

        partition:  the place of this rank
        memory:     descriptor of the file that prepare_ranks() has prepared; it is closed afterwards
        on_wait:    called again and again while this rank waits for another: with the seconds that it has waited, and
                    the rank that is late, None = not known. It may raise.
        """
        raise DeviceError(f"{self.name} has no ranks yet.")

    def packing(self) -> AbstractContextManager[None]:
        """Return the context in which weights are packed after loading."""
        return nullcontext()

    @property
    def products(self) -> str:
        """Return one line about the kernels that multiply the packed weights; empty if there is nothing to say."""
        return ""

    def measure_peak(self, step: Callable[[], object]) -> int:
        """Run a step and return the bytes that it used for a time; 0 without running it where that is not measured."""
        return 0

    def warm_up(self, step: Callable[[], object]) -> None:
        """Run a step of one token if that compiles kernels which a first request would wait for."""

    def capture_graphs(
        self,
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        shapes: GraphShapes,
        counters: Tensor,
    ) -> StepGraphs | None:
        """Return what runs `forward` from graphs, captured now or later, if steps are faster that way; None if not.

        compute_logits: returns the logits of hidden states; graphs may contain it too, see GraphShape.has_logits
        counters:       what `forward` adds to in each step, beside the KV cache
        """
        return None

    def call_in_step(self, function: Callable[[], object]) -> None:
        """Call a function of the host in the middle of a step, which it may end by raising.

        Graphs call it again there, on a device where a graph can. It does nothing with PyTorch.
        """
        function()

    def free_cached_memory(self) -> None:
        """Return memory to the device that PyTorch keeps for later allocations."""

    def limit_threads(self, num_elements: int) -> AbstractContextManager[None]:
        """Return a context for operations on tensors of this size, in which the host uses no more threads than pay."""
        return nullcontext()
