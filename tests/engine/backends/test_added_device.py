"""Tests of the register of devices: a device that a test adds, made of the slow references, gives the CPU's tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import FAMILIES
from torch import Tensor

from moray.engine.backends.base import Backend, NormKernel
from moray.engine.backends.choose import DEVICES, choose_backend
from moray.engine.backends.formats import ExpertOutput, ExpertsKernel, ExpertWeights, LinearKernel, RoutingRule
from moray.engine.backends.inputs import ModelInputs, StepPlan
from moray.engine.config import EngineConfig
from moray.engine.core.graph_shapes import GraphShapes
from moray.engine.core.limits import cache_bytes
from moray.engine.core.step_limits import DEFAULTS, DeviceDefaults
from moray.engine.engine import Engine
from moray.engine.errors import UserError
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.sampler import Sampler
from moray.kernels.cpu.experts import experts_ref
from moray.kernels.cpu.linear import linear_ref
from moray.kernels.cpu.paged_attention import CpuAttentionMetadata, paged_attention_ref
from moray.kernels.cpu.qk_norm import qk_norm_ref
from moray.kernels.cpu.rope_kv import rope_kv_ref
from moray.kernels.cpu.route import choose_ref
from moray.kernels.e4m3 import KvScales


class SlowFormat:
    """Keeps the weights as they are."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None, num_outputs: int) -> LinearKernel:
        return lambda x: linear_ref(x, weight, bias)

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        def run(
            x: Tensor, logits: Tensor, rule: RoutingRule, num_tokens: Tensor | None, tokens_per_expert: Tensor | None
        ) -> ExpertOutput:
            factors, ids = choose_ref(logits, rule.method, rule.top_k, rule.jitter)
            if tokens_per_expert is not None:
                tokens_per_expert += ids.flatten().bincount(minlength=len(tokens_per_expert))
            tensors = weights.up, weights.down, weights.up_bias, weights.down_bias
            slots = [
                experts_ref(x, factors[:, [slot]], ids[:, [slot]], *tensors, activation=weights.activation)
                for slot in range(rule.top_k)
            ]
            return ExpertOutput(torch.stack(slots, dim=1).flatten(0, 1), rule.top_k)

        return run


class SlowNorm:
    """A norm that adds up the rows of experts itself."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        centred = x if self.bias is None else x - x.mean(-1, keepdim=True)
        normed = centred * (centred.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return normed if self.bias is None else normed + self.bias

    def add(self, x: Tensor | ExpertOutput, residual: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        rows = x.rows.view(len(residual), x.top_k, -1).sum(1) if isinstance(x, ExpertOutput) else x
        total = residual + multiplier * rows
        return total, self(total)


class SlowBackend(Backend):
    """A device that defines what it must and nothing else."""

    name = "slow"
    is_async = False
    weight_formats = {torch.float32: SlowFormat()}  # noqa: RUF012
    torch_device = torch.device("cpu")
    device_name = "slow"
    available_bytes = 1 << 30

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, *, rounds_last: bool) -> NormKernel:
        return SlowNorm(weight, bias, eps)

    def norm_queries_and_keys(self, *arguments: Any) -> None:
        qk_norm_ref(*arguments)

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
        q = rope_kv_ref(qkv, *rotary, k_cache, v_cache, metadata.slots, num_heads, kv_scales)
        return paged_attention_ref(q, k_cache, v_cache, metadata, scale, sliding_window, sinks, kv_scales)

    def new_kv_cache(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def build_attention_metadata(self, plan: StepPlan, block_size: int) -> CpuAttentionMetadata:
        return CpuAttentionMetadata.build(*plan.as_lists(), block_size)

    def make_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> Sampler:
        return Sampler(vocab_size, eos_token_ids)


class MeasuredBackend(SlowBackend):
    """A device that measures a step, compiles at the first one and replays steps."""

    available_bytes = 3 << 33

    def __init__(self) -> None:
        self.calls: list[str] = []

    def measure_peak(self, step: Callable[[], object]) -> int:
        self.calls.append("measured")
        step()
        return 1 << 33

    def warm_up(self, step: Callable[[], object]) -> None:
        self.calls.append("warmed up")
        step()

    def capture_graphs(
        self,
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        shapes: GraphShapes,
        counters: Tensor,
    ) -> "Replay":
        self.calls.append(f"captured up to {shapes.max_tokens} tokens of {shapes.max_seqs} sequences")
        return Replay(self, forward)


class Replay:
    """Runs steps by calling the model, and counts their rows."""

    def __init__(self, backend: SlowBackend, forward: Callable[[ModelInputs], Tensor]) -> None:
        self.build_inputs = backend.build_inputs
        self.forward = forward
        self.num_rows: list[int] = []

    def replays(self, plan: StepPlan) -> bool:
        return plan.is_decode

    def run(self, plan: StepPlan, inputs: ModelInputs) -> Tensor:
        self.num_rows.append(plan.num_tokens)
        return self.forward(inputs)

    def find_logits(self) -> None:
        return None


def generate(folder: Path, device: str) -> tuple[Engine, dict[str, tuple[int, ...]]]:
    engine = Engine(str(folder), EngineConfig(device=device, max_num_batched_tokens=16, kv_cache_memory=200_000))
    for i, length in enumerate((1, 9, 30)):
        params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=float(i % 2))
        engine.add(Request(str(i), list(range(5, 5 + length)), params, stream_key=i))
    done: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        done |= {o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None}
    return engine, done


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_device_that_is_added_gives_the_cpus_tokens(
    checkpoints: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowBackend()
    monkeypatch.setitem(DEVICES, "slow", DEVICES["cpu"]._replace(open=lambda: slow))
    monkeypatch.setitem(DEFAULTS, "slow", DeviceDefaults(3, 3, 24, 24, 0.5))
    assert choose_backend("slow") is slow
    cpu, want = generate(checkpoints[architecture], "cpu")
    engine, tokens = generate(checkpoints[architecture], "slow")
    assert engine.runner.backend is slow and engine.device_name == "slow" and engine.products == ""
    assert engine.limits.max_num_seqs == 3
    assert tokens == want
    assert torch.equal(engine.expert_tokens(), cpu.expert_tokens())


def test_what_a_device_may_define_is_used(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache gets a share of what the measured step leaves, and steps run as graphs."""
    backend = MeasuredBackend()
    monkeypatch.setitem(DEVICES, "slow", DEVICES["cpu"]._replace(open=lambda: backend))
    monkeypatch.setitem(DEFAULTS, "slow", DeviceDefaults(3, 3, 24, 24, 2**-17))
    engine = Engine(str(checkpoints["mixtral"]), EngineConfig(device="slow"))
    assert backend.calls == ["measured", "captured up to 24 tokens of 3 sequences", "warmed up"]
    assert engine.limits.num_blocks == 2**17 // cache_bytes(16, engine.model_config, 4)
    assert engine.expert_tokens().sum() == 0, "the measured step is not load"
    engine.add(Request("r", [5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    graphs = engine.runner._graphs
    assert isinstance(graphs, Replay) and graphs.num_rows == [3, 1, 1, 1], "the prompt's step too"
    Engine(str(checkpoints["mixtral"]), EngineConfig(device="slow", cuda_graphs=False))
    assert backend.calls[3:] == ["measured", "warmed up"]


def test_an_unknown_device_names_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICES, "slow", DEVICES["cpu"])
    with pytest.raises(UserError, match="'tpu'; it can be auto, cpu, cuda or slow"):
        choose_backend("tpu")
