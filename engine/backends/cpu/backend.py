"""CpuBackend: the kernels of kernels/cpu."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from moray.engine.backends.base import Backend, NormKernel, StepGraphs
from moray.engine.backends.communicator import ALONE, Communicator
from moray.engine.backends.cpu.communicator import SharedMemoryCommunicator
from moray.engine.backends.cpu.packed import PackedFormat
from moray.engine.backends.cpu.quantized import QuantizedPackedFormat
from moray.engine.backends.cpu.step_graphs import CpuGraphs
from moray.engine.backends.formats import TORCH_DTYPES, ExpertOutput
from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.engine.core.graph_shapes import GraphShapes
from moray.engine.errors import UserError
from moray.engine.partition import Partition
from moray.engine.platform.cpus import available_cores, cores_of_rank, numa_nodes, processor_name
from moray.engine.platform.memory import available_bytes
from moray.engine.quantization.scheme import WEIGHT_KINDS
from moray.engine.sampling.sampler import Sampler
from moray.kernels.cache_root import cache_root
from moray.kernels.cpu import gather, self_check
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.launch import call
from moray.kernels.cpu.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from moray.kernels.cpu.paged_attention import CpuAttentionMetadata, new_key_cache, new_value_cache, paged_attention
from moray.kernels.cpu.qk_norm import qk_norm
from moray.kernels.cpu.rope_kv import rope_kv
from moray.kernels.cpu.thread_pool import single_threaded
from moray.kernels.e4m3 import KvScales

logger = logging.getLogger(__name__)

# An operation on tensors of at most this many elements takes less time than waking the other cores.
MAX_SINGLE_THREAD_ELEMENTS = 2**17


class CpuBackend(Backend):
    """Runs models on the processor of this machine."""

    name = "cpu"
    is_async = False
    has_whole_experts = True
    weight_formats = dict.fromkeys(TORCH_DTYPES.values(), PackedFormat())
    quantized_formats = dict.fromkeys(WEIGHT_KINDS, QuantizedPackedFormat())
    torch_device = torch.device("cpu")

    def __init__(self, communicator: Communicator = ALONE) -> None:
        self.communicator = communicator
        if communicator.partition.size > 1:
            self.weight_formats = dict.fromkeys(self.weight_formats, PackedFormat(communicator))
            self.quantized_formats = dict.fromkeys(self.quantized_formats, QuantizedPackedFormat(communicator))

    @property
    def device_name(self) -> str:
        return processor_name()

    @property
    def available_bytes(self) -> int:
        return available_bytes()

    @property
    def products(self) -> str:
        return self_check.summary()

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, *, rounds_last: bool) -> NormKernel:
        return _Norm(weight, bias, eps, rounds_last)

    def norm_queries_and_keys(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
    ) -> None:
        qk_norm(qkv, q_weight, k_weight, num_q, num_k, eps)

    def attend(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: CpuAttentionMetadata,
        *,
        num_heads: int,
        scale: float,
        sliding_window: int | None,
        sinks: Tensor | None,
        kv_scales: KvScales | None,
    ) -> Tensor:
        q = rope_kv(qkv, *rotary, k_cache, v_cache, metadata.slots, num_heads, kv_scales)
        return paged_attention(q, k_cache, v_cache, metadata, scale, sliding_window, sinks, kv_scales)

    def new_kv_cache(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        return new_key_cache(*shape, dtype), new_value_cache(*shape, dtype)

    def build_attention_metadata(self, plan: StepPlan, block_size: int) -> CpuAttentionMetadata:
        return CpuAttentionMetadata.build(*plan.as_lists(), block_size)

    def make_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> Sampler:
        return Sampler(vocab_size, eos_token_ids)

    def prepare_ranks(self, size: int, memory: int) -> None:
        os.ftruncate(memory, gather.shared_bytes(size))

    def join_ranks(self, partition: Partition, memory: int, on_wait: Callable[[float, int | None], None]) -> Backend:
        """Bind the calling thread, and those that it will start, to the CPUs of the rank where it has CPUs of its own.

        See Backend.join_ranks.
        """
        num_threads = max(1, available_cores() // partition.size)
        cores = cores_of_rank(partition, os.sched_getaffinity(0), numa_nodes(), num_threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        return CpuBackend(SharedMemoryCommunicator(partition, memory, on_wait))

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Keep the results of the kernels' checks on disk, and log them when all weights are packed."""
        self_check.keep_results_in(cache_root())
        yield
        _log_checks()

    def call_in_step(self, function: Callable[[], object]) -> None:
        call(function)

    def warm_up(self, step: Callable[[], object]) -> None:
        step()  # compiles the kernels, which takes seconds

    def capture_graphs(
        self,
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        shapes: GraphShapes,
        counters: Tensor,
    ) -> StepGraphs | None:
        if self.communicator.partition.size > 1:
            return None  # a rank waits for the others in Python
        graphs = CpuGraphs(forward, compute_logits, self.build_inputs, counters, max_blocks=shapes.widths[-1])
        return graphs if graphs.warm_up() else None

    def limit_threads(self, num_elements: int) -> AbstractContextManager[None]:
        return single_threaded() if num_elements <= MAX_SINGLE_THREAD_ELEMENTS else nullcontext()


class _Norm:
    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, rounds_last: bool) -> None:
        self._weight, self._bias, self._eps, self._rounds_last = weight, bias, eps, rounds_last

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is None:
            return rms_norm(x, self._weight, self._eps, self._rounds_last)
        return layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor | ExpertOutput, residual: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        assert not isinstance(x, ExpertOutput), "the CPU's experts add up their rows"
        if self._bias is None:
            return add_rms_norm(x, residual, self._weight, self._eps, multiplier, self._rounds_last)
        return add_layer_norm(x, residual, self._weight, self._bias, self._eps, multiplier)


def _log_checks() -> None:
    for result in self_check.results():
        if result.failed_paths:
            logger.warning(
                "Linear layers %s: rows computed by %s depend on their batch, or are wrong, on this CPU; %s is used.",
                result,
                " and ".join(result.failed_paths),
                result.path,
            )
    logger.info("%s", self_check.summary())


CPU = CpuBackend()


def open_cpu() -> Backend:
    """Return the CPU's backend. Raises UserError if MORAY_CPU_ISA names no instruction set."""
    try:
        isas()
    except ValueError as error:
        raise UserError(str(error)) from None
    return CPU
