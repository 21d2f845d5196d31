"""CudaBackend: the Triton kernels of kernels/gpu, on an NVIDIA GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moray.engine.backends.base import Backend, NormKernel, StepGraphs
from moray.engine.backends.cuda.attention import CudaAttentionMetadata
from moray.engine.backends.cuda.communicator import CudaCommunicator
from moray.engine.backends.cuda.dense import DenseFormat
from moray.engine.backends.cuda.device import check_capability, check_gpus, wait_for_memory
from moray.engine.backends.cuda.quantized import PackedCodesFormat
from moray.engine.backends.cuda.sampler import CudaSampler
from moray.engine.backends.cuda.step_buffer import StepBuffer, StepShape
from moray.engine.backends.cuda.step_graphs import CudaGraphs
from moray.engine.backends.formats import TORCH_DTYPES, ExpertOutput
from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.engine.core.graph_shapes import GraphShapes
from moray.engine.partition import Partition
from moray.engine.quantization.scheme import WEIGHT_KINDS
from moray.engine.sampling.sampler import Sampler
from moray.kernels.e4m3 import KvScales
from moray.kernels.gpu.combine import combine
from moray.kernels.gpu.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from moray.kernels.gpu.paged_attention import paged_attention
from moray.kernels.gpu.qk_norm import qk_norm
from moray.kernels.gpu.rope_kv import rope_kv
from moray.kernels.workspace import ATTENTION_BYTES


class CudaBackend(Backend):
    """Runs models on one NVIDIA GPU, or a rank's part of a model on one of several."""

    name = "cuda"
    is_async = True
    logprob_rows = 512
    weight_formats = dict.fromkeys(TORCH_DTYPES.values(), DenseFormat())
    quantized_formats = dict.fromkeys(WEIGHT_KINDS, PackedCodesFormat())

    def __init__(self, torch_device: torch.device, communicator: CudaCommunicator | None = None) -> None:
        """Make a backend. communicator: connects the ranks; None = there is one"""
        self.torch_device = torch_device
        self._wait_for = torch.cuda.Event.synchronize if communicator is None else communicator.wait_for
        if communicator is not None:
            self.communicator = communicator
            self.weight_formats = dict.fromkeys(self.weight_formats, DenseFormat(communicator))
            packed_codes = PackedCodesFormat(communicator=communicator)
            self.quantized_formats = dict.fromkeys(self.quantized_formats, packed_codes)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def available_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return free

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
        metadata: CudaAttentionMetadata,
        *,
        num_heads: int,
        scale: float,
        sliding_window: int | None,
        sinks: Tensor | None,
        kv_scales: KvScales | None,
    ) -> Tensor:
        q = rope_kv(qkv, *rotary, k_cache, v_cache, metadata.slots, num_heads, kv_scales)
        tables = metadata.block_tables, metadata.query_starts, metadata.context_lens
        return paged_attention(q, k_cache, v_cache, *tables, scale, sliding_window, sinks, kv_scales)

    def new_kv_cache(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=self.torch_device) for _ in range(2))
        return keys, values

    def build_attention_metadata(self, plan: StepPlan, block_size: int) -> CudaAttentionMetadata:
        metadata: CudaAttentionMetadata = self.build_inputs(plan, block_size).attention
        return metadata

    def build_inputs(self, plan: StepPlan, block_size: int, last_token_ids: Tensor | None = None) -> ModelInputs:
        shape = StepShape.of(plan)
        buffer = StepBuffer(shape, torch.empty(shape.num_bytes, dtype=torch.uint8, device=self.torch_device))
        buffer.load(plan, block_size, last_token_ids)
        return replace(buffer.inputs, num_tokens=None)

    def make_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> Sampler:
        return CudaSampler(vocab_size, eos_token_ids, self.torch_device, self._wait_for)

    def check_dtype(self, dtype: torch.dtype) -> None:
        check_capability(self.torch_device, dtype)

    def wait_for_memory(self) -> None:
        wait_for_memory(self.torch_device)

    def prepare_ranks(self, size: int, memory: int) -> None:
        if self.torch_device.type == "cuda":
            check_gpus(size)

    def join_ranks(self, partition: Partition, memory: int, on_wait: Callable[[float, int | None], None]) -> Backend:
        """Return the backend of a rank: rank r has the r-th of the GPUs that this process sees."""
        device = self.torch_device
        if device.type == "cuda":
            device = torch.device("cuda", partition.rank)
            torch.cuda.set_device(device)
        return type(self)(device, CudaCommunicator(partition, device, memory, on_wait))

    def measure_peak(self, step: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        step()
        self.communicator.wait()
        peak = torch.cuda.max_memory_allocated(self.torch_device) - before
        torch.cuda.empty_cache()
        return peak + ATTENTION_BYTES

    def capture_graphs(
        self,
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        shapes: GraphShapes,
        counters: Tensor,
    ) -> StepGraphs | None:
        calls = forward, compute_logits, self.build_inputs
        is_alone = self.communicator.partition.size == 1
        graphs = CudaGraphs(*calls, shapes, self.torch_device, self.communicator.wait, is_alone=is_alone)
        graphs.capture_at_start()
        return graphs

    def free_cached_memory(self) -> None:
        torch.cuda.empty_cache()


class _Norm:
    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, rounds_last: bool) -> None:
        self._weight, self._bias, self._eps, self._rounds_last = weight, bias, eps, rounds_last

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is None:
            return rms_norm(x, self._weight, self._eps, self._rounds_last)
        return layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor | ExpertOutput, residual: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        if isinstance(x, ExpertOutput):
            params = self._weight, self._bias, self._eps
            return combine(x.rows, residual, *params, x.top_k, multiplier, self._rounds_last)
        if self._bias is None:
            return add_rms_norm(x, residual, self._weight, self._eps, multiplier, self._rounds_last)
        return add_layer_norm(x, residual, self._weight, self._bias, self._eps, multiplier)
