"""Tests of ranks on the Triton kernels: tokens, logprobs and logits have the bits of one rank.

Without GPUs the ranks run under Triton's interpreter, and gather by gloo in place of NCCL.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_alone import keep_logits, run
from held_steps import wait_for
from torch import Tensor, nn
from triton_backend import TRITON, InterpretedBackend
from triton_device import DEVICE

import moray.engine.runner.open_model
from moray.engine.backends.formats import SWIGLU, ExpertWeights
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import DeviceError, EngineError
from moray.engine.layers.linear import Linear
from moray.engine.params import SamplingParams
from moray.engine.partition import Partition
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner
from moray.engine.runner.ranks import STALL_S, Ranks
from moray.engine.sampling.scoring import scoring_params

SIZE = 2
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=24, kv_cache_memory=200_000, async_scheduling=True)
FORMATS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4"), ("bfloat16", "fp8")]

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < SIZE, reason="each rank needs a GPU of its own"
)


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(SIZE, TRITON, num_threads=SIZE)
    yield ranks
    ranks.close()


def requests() -> list[Request]:
    """Requests that share a prefix: one greedy, one scored, and samples that decode a step ahead of their tokens."""
    prompt = torch.randint(5, 160, (18,), generator=torch.Generator().manual_seed(0)).tolist()
    greedy = SamplingParams(max_tokens=2, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    sampled = SamplingParams(max_tokens=3, ignore_eos=True, temperature=1.2, seed=3, n=2, presence_penalty=0.5)
    return [
        Request("greedy", prompt, greedy),
        Request("sampled", prompt[:17], sampled),
        Request("scored", prompt[3:5], scoring_params(None), continuations=[prompt[:2]]),
    ]


@pytest.mark.parametrize(
    ("family", "dtype", "quantization"),
    [
        pytest.param(family, *of, marks=[] if (family, *of) == ("phimoe", "float32", None) else pytest.mark.slow)
        for family in ("phimoe", "mixtral", "phi-msft")
        for of in FORMATS
    ],
)
def test_tokens_and_logits_are_those_of_one_rank(
    one_layer: dict[str, Path],
    ranks: Ranks,
    family: str,
    dtype: str,
    quantization: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, dtype=dtype, quantization=quantization)
    one = Engine(str(one_layer[family]), config)
    two = Engine(str(one_layer[family]), replace(config, tensor_parallel=SIZE), ranks=ranks)
    assert two.limits == one.limits
    waits: list[None] = []
    monkeypatch.setattr(ranks.backend.communicator, "wait", lambda: waits.append(None))
    logits, of_ranks = (keep_logits(engine, monkeypatch) for engine in (one, two))
    expected, found = run(one, requests()), run(two, requests())
    assert not waits, "steps wait for no rank"
    assert found == expected and len(found) == 4
    assert len(logits) == len(of_ranks) > 2
    assert all(torch.equal(a, b) for a, b in zip(logits, of_ranks, strict=True))
    assert two.metrics.cached_tokens == one.metrics.cached_tokens > 0
    assert torch.equal(two.expert_tokens(), one.expert_tokens()) and len(waits) == 1


def test_a_part_of_a_layer_is_split_as_the_whole_one() -> None:
    """A weight with 64 outputs has no split sums, one with 32 has: in float32 that changes bits."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run_layer(partition: Partition) -> Tensor:
        rows = partition.split(64)
        layer = Linear(1024, 64, bias=False, rows=rows)
        layer.weight = nn.Parameter(weight[rows.held[0]].contiguous(), requires_grad=False)
        layer.process_weights_after_loading(TRITON)
        return layer(x)

    parts = [run_layer(Partition(rank, SIZE)) for rank in range(SIZE)]
    assert torch.equal(torch.cat(parts, dim=1), run_layer(Partition()))


def test_a_part_of_a_gate_that_is_not_whole_eights_is_refused() -> None:
    weights = ExpertWeights(torch.ones(2, 24, 16), torch.ones(2, 16, 12), None, None, activation=SWIGLU)
    with pytest.raises(DeviceError, match=r"12 outputs on a rank .* need a multiple of 8"):
        TRITON.weight_formats[torch.float32].pack_experts(weights)


@pytest.mark.skipif(DEVICE == "cuda", reason="the ranks are threads, and share memory that is made up")
def test_the_cache_has_the_room_of_the_rank_with_the_least(checkpoints: dict[str, Path]) -> None:
    memory = os.memfd_create("test")

    class Backend(InterpretedBackend):
        available_bytes = 0

    def measure(rank: int) -> int:
        backend = Backend(TRITON.torch_device).join_ranks(Partition(rank, SIZE), memory, lambda *_: None)
        backend.available_bytes = (5000, 3000)[rank]  # type: ignore[misc]
        config = read_model_config(checkpoints["mixtral"])
        model = load_model(checkpoints["mixtral"], config, torch.float32, backend)
        return ModelRunner(model, config, torch.float32, block_size=16, backend=backend).measure_available(2, 8)

    with ThreadPoolExecutor(SIZE) as threads:
        assert list(threads.map(measure, range(SIZE))) == [3000, 3000]
    os.close(memory)


@pytest.mark.parametrize(
    ("sent", "stall_s", "what"),
    [
        (signal.SIGKILL, STALL_S, "was ended by SIGKILL"),
        pytest.param(signal.SIGSTOP, 0.2, "has kept a step waiting for 0.2 s", marks=pytest.mark.slow),
    ],
    ids=("killed", "stopped"),
)
def test_a_rank_that_fails_in_a_step_ends_the_engine(
    one_layer: dict[str, Path], sent: signal.Signals, stall_s: float, what: str
) -> None:
    engine = Engine(str(one_layer["phimoe"]), replace(CONFIG, dtype="float32", tensor_parallel=SIZE))
    engine.add(Request("r", [5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True)))
    engine.step()
    engine._ranks.stall_s = stall_s
    (pid,) = engine.rank_pids
    layer = engine.runner.model.layers[0].self_attn  # type: ignore[index, union-attr]
    layer.register_forward_pre_hook(lambda *_: os.kill(pid, sent))
    with pytest.raises(EngineError, match=rf"rank 1 of 2 \(process {pid}\) {what}"):
        while True:
            engine.step()
    wait_for(lambda: is_gone(pid))


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
