"""Tests of an engine whose model is split among ranks: tokens, logprobs and logits have the bits of one rank.

One pair of processes serves all tests but those that end it.
"""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_alone import keep_logits, run
from held_steps import wait_for
from published_checkpoints import publish, publish_mxfp4
from tiny_checkpoints import FIRST_FAMILIES, GPT_OSS, LATER_FAMILIES, MIXTRAL, OLMOE, PHIMOE, PHIXTRAL, write

from moray.engine.backends.base import Backend
from moray.engine.backends.cpu.backend import CPU, CpuBackend
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.core.limits import choose_limits
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError, DeviceError, EngineError
from moray.engine.layers.attention import attention_layers
from moray.engine.layers.moe import Experts
from moray.engine.params import SamplingParams
from moray.engine.partition import find_split_problems
from moray.engine.request import Request
from moray.engine.runner.ranks import STALL_S, Ranks
from moray.engine.sampling.scoring import scoring_params
from moray.kernels.cpu.isa import isas

SIZE = 2
WIDE = {"intermediate_size": 64}  # which the groups of published codes divide
FORMATS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4"), ("bfloat16", "fp8")]

pytestmark = pytest.mark.skipif(not isas(), reason="no kernels on this CPU whose sums are the same in parts")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(SIZE, CPU, num_threads=SIZE)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def expert_ranks() -> Iterator[Ranks]:
    """Ranks that have whole experts."""
    ranks = Ranks(SIZE, CPU, num_threads=SIZE, expert_parallel=True)
    yield ranks
    ranks.close()


def engines(folder: Path, ranks: Ranks, **config: Any) -> tuple[Engine, Engine]:
    """Return an engine with one rank, and one with two."""
    base = EngineConfig(device="cpu", kv_cache_memory=config.pop("kv_cache_memory", 1 << 20), **config)
    split = replace(with_ranks(base), expert_parallel=ranks.expert_parallel)
    return Engine(str(folder), base), Engine(str(folder), split, ranks=ranks)


def with_ranks(config: EngineConfig, size: int = SIZE) -> EngineConfig:
    return replace(config, tensor_parallel=size)


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests() -> list[Request]:
    """Greedy, sampled, penalized and scored requests of many lengths; two share a prefix of several blocks."""
    greedy = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=4, prompt_logprobs=2)
    sampled = SamplingParams(max_tokens=9, temperature=1.3, top_p=0.9, n=2, seed=4, ignore_eos=True, logprobs=2)
    penalized = SamplingParams(max_tokens=7, temperature=0.8, seed=2, presence_penalty=0.5, min_tokens=3)
    shared = tokens(40)
    return [
        Request("greedy", tokens(29, 1), greedy),
        Request("sampled", tokens(17, 2), sampled),
        Request("penalized", tokens(5, 3), penalized),
        Request("shared 1", (*shared, 7, 8), SamplingParams(max_tokens=5)),
        Request("shared 2", (*shared, 9), SamplingParams(max_tokens=5, logprobs=1)),
        Request("scored", tokens(21, 5), scoring_params(2), continuations=(tokens(3, 6), tokens(4, 7))),
    ]


@pytest.mark.parametrize(
    ("family", "dtype", "quantization"),
    [(family, *format) for family in FIRST_FAMILIES for format in FORMATS]
    + [(family, "bfloat16", format) for family in LATER_FAMILIES for format in (None, "int8")],
)
def test_tokens_and_logits_are_those_of_one_rank(
    checkpoints: dict[str, Path],
    ranks: Ranks,
    family: str,
    dtype: str,
    quantization: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_bits(*engines(checkpoints[family], ranks, dtype=dtype, quantization=quantization), monkeypatch)


@pytest.mark.parametrize(
    ("family", "dtype", "quantization"),
    [
        ("phimoe", "float32", None),
        ("phimoe", "bfloat16", "int8"),
        ("mixtral", "bfloat16", None),
        ("phi-msft", "bfloat16", None),
        ("phi-msft", "bfloat16", "int4"),
        ("olmoe", "bfloat16", None),
        pytest.param("gpt_oss", "bfloat16", None, marks=pytest.mark.slow),
    ],
)
def test_whole_experts_on_a_rank_give_the_same_bits(
    checkpoints: dict[str, Path],
    expert_ranks: Ranks,
    family: str,
    dtype: str,
    quantization: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = engines(checkpoints[family], expert_ranks, dtype=dtype, quantization=quantization)
    held = [module.held for module in two.runner.model.modules() if isinstance(module, Experts)]
    assert held == [range(one.model_config.num_experts // 2)] * one.model_config.num_layers
    check_bits(one, two, monkeypatch)


def check_bits(one: Engine, two: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [keep_logits(engine, monkeypatch) for engine in (one, two)]
    assert run(two, requests()) == run(one, requests())
    assert len(logits[0]) == len(logits[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    assert two.metrics.cached_tokens == one.metrics.cached_tokens > 0
    assert torch.equal(two.expert_tokens(), one.expert_tokens())


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_each_rank_has_the_scales_of_its_heads(
    checkpoints: dict[str, Path], ranks: Ranks, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = engines(checkpoints[family], ranks, dtype="bfloat16", kv_cache_dtype="fp8")
    for whole, part in zip(*(attention_layers(engine.runner.model) for engine in (one, two)), strict=True):
        assert torch.equal(part.kv_scales.scales, whole.kv_scales.scales[:, :1])
    check_bits(one, two, monkeypatch)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("phimoe", "gptq-int4"),
        ("mixtral", "gptq-v2"),
        ("mixtral", "compressed-tensors-words-int4-group"),
        ("phi-msft", "compressed-tensors-elements-int8-channel"),
    ],
)
def test_published_codes_are_cut_as_weights_are(tmp_path: Path, ranks: Ranks, family: str, case: str) -> None:
    configs = {"phimoe": PHIMOE | WIDE, "mixtral": MIXTRAL | WIDE, "phi-msft": PHIXTRAL | {"n_embd": 64}}
    folder, _ = publish(write(tmp_path / "plain", configs[family]), tmp_path / "published", case)
    one, two = engines(folder, ranks)
    assert one.model_config.quantization is not None and one.model_config.quantization.is_published
    assert run(two, requests()) == run(one, requests())


def test_mxfp4_experts_are_cut_as_weights_are(
    tmp_path: Path, ranks: Ranks, expert_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = publish_mxfp4(tmp_path)
    for some in (ranks, expert_ranks):
        check_bits(*engines(folder, some), monkeypatch)


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
def test_preemption_and_aborts(checkpoints: dict[str, Path], ranks: Ranks, is_async: bool) -> None:
    one, two = engines(
        checkpoints["phimoe"],
        ranks,
        kv_cache_memory=9 * 8192,
        max_num_batched_tokens=24,
        max_num_seqs=6,
        async_scheduling=is_async,
    )
    long = [Request(f"{n}", tokens(n, n), SamplingParams(max_tokens=30, ignore_eos=True)) for n in (30, 31, 32, 33)]
    expected = run(one, long, aborted="32")
    assert run(two, long, aborted="32") == expected and ("31", 0) in expected
    assert two.metrics.preemptions == one.metrics.preemptions > 0
    assert run(two, requests()) == run(one, requests())


def test_a_step_is_interrupted_on_all_ranks(checkpoints: dict[str, Path], ranks: Ranks) -> None:
    one, two = engines(checkpoints["mixtral"], ranks)
    bulk = Request("bulk", tokens(90), SamplingParams(max_tokens=3, ignore_eos=True), priority=1)
    expected = run(one, [bulk])
    two.add(bulk)
    for _ in range(5):
        # A request that comes during one layer interrupts the step before the next one.
        layer = two.runner.model.layers[0].self_attn  # type: ignore[index, union-attr]
        hook = layer.register_forward_pre_hook(lambda *_: two.interrupt_step(0))
        assert two.step() == [] and two.metrics.steps == 0
        hook.remove()
    assert run(two, []) == expected


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(PHIMOE, id="phimoe", marks=pytest.mark.slow),
        pytest.param(OLMOE | {"num_key_value_heads": 2}, id="olmoe"),
        pytest.param(GPT_OSS, id="gpt-oss", marks=pytest.mark.slow),
    ],
)
def test_heads_of_keys_and_values_are_shared_by_ranks(tmp_path: Path, model: dict[str, Any]) -> None:
    """Four ranks, two heads of keys and values, and a vocabulary that four do not divide."""
    folder = write(tmp_path, model | {"vocab_size": 162}, dtype=torch.bfloat16)
    config = EngineConfig(device="cpu", num_threads=1, kv_cache_memory=1 << 20)
    expected = run(Engine(str(folder), config), requests())
    assert run(Engine(str(folder), with_ranks(config, 4)), requests()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_eight_ranks(tmp_path: Path, quantization: Any) -> None:
    """On few cores they wait for each other, and their answers are those of one."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 16}
    folder = write(tmp_path, MIXTRAL | heads, dtype=torch.bfloat16)
    config = EngineConfig(device="cpu", num_threads=1, kv_cache_memory=1 << 22, quantization=quantization)
    expected = run(Engine(str(folder), config), requests())
    eight = Engine(str(folder), with_ranks(config, 8))
    assert len(eight.rank_pids) == 7 and run(eight, requests()) == expected


def test_what_cannot_be_divided_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, PHIMOE | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96})
    config = EngineConfig(device="cpu", tensor_parallel=4)
    message = r"tensor_parallel: is 4, .* attention heads \(num_attention_heads\) 6 .*num_key_value_heads\) 3; use 1"
    with pytest.raises(CheckpointError, match=message):
        Engine(str(folder), config)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"num_local_experts": 6}, 4, r"tensor_parallel: is 4, .*model's experts 6; leave out engine.expert_parallel"),
        ({"num_local_experts": 5}, 2, r"tensor_parallel: is 2, .*model's experts 5; leave out engine.expert_parallel"),
        ({"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1, "num_local_experts": 6}, 4, r"; use 2$"),
        ({}, 1, r"expert_parallel: is true, and there is one rank; set engine.tensor_parallel to 2, 4, 8"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(
    tmp_path: Path, config: dict[str, Any], size: int, message: str
) -> None:
    folder = write(tmp_path, PHIMOE | config)
    with pytest.raises(CheckpointError, match=message):
        Engine(str(folder), EngineConfig(device="cpu", tensor_parallel=size, expert_parallel=True))


def test_whole_experts_beside_an_mlp_of_all_tokens_are_refused(checkpoints: dict[str, Path]) -> None:
    config = EngineConfig(device="cpu", tensor_parallel=2, expert_parallel=True)
    with pytest.raises(CheckpointError, match=r"expert_parallel: is true, and this model has MLPs .* leave it out"):
        Engine(str(checkpoints["qwen2_moe"]), config)


def test_whole_experts_need_no_even_intermediate_size(tmp_path: Path) -> None:
    folder = write(tmp_path, PHIMOE | {"intermediate_size": 45})
    with pytest.raises(CheckpointError, match="intermediate_size 45"):
        Engine(str(folder), EngineConfig(device="cpu", tensor_parallel=2))
    assert list(find_split_problems(read_model_config(folder), 2, expert_parallel=True)) == []


def test_a_device_without_ranks_refuses_them() -> None:
    class Lone(CpuBackend):
        name = "lone"
        prepare_ranks = Backend.prepare_ranks
        has_whole_experts = False

    with pytest.raises(DeviceError, match=r"lone cannot run whole experts .* Set engine.expert_parallel to false"):
        Ranks(SIZE, Lone(), expert_parallel=True)
    with pytest.raises(DeviceError, match=r"lone has no ranks yet: engine.tensor_parallel is 2"):
        Ranks(SIZE, Lone())


def test_the_cache_counts_a_head_for_each_rank(checkpoints: dict[str, Path], ranks: Ranks) -> None:
    one, two = engines(checkpoints["phimoe"], ranks)
    assert two.limits == one.limits
    model = replace(one.model_config, num_heads=8)
    config = EngineConfig(tensor_parallel=8, kv_cache_memory=1 << 20)
    eight = choose_limits(config, model, itemsize=4, available_bytes=0, device="cpu")
    assert model.num_kv_heads == 2 and eight.num_blocks == one.limits.num_blocks // 4


def bulk(n: int = 200) -> list[Request]:
    return [Request(f"b{i}", tokens(9, i), SamplingParams(max_tokens=n, ignore_eos=True)) for i in range(4)]


def own_ranks(folder: Path) -> tuple[Engine, int]:
    """Return an engine with ranks of its own that has stepped, with requests in it, and the other rank's process."""
    engine = Engine(
        str(folder), EngineConfig(device="cpu", num_threads=SIZE, kv_cache_memory=1 << 20, tensor_parallel=SIZE)
    )
    for request in bulk():
        engine.add(request)
    engine.step()
    return engine, engine.rank_pids[0]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("sent", "stall_s", "what"),
    [
        (signal.SIGKILL, STALL_S, "was ended by SIGKILL"),
        (signal.SIGSTOP, 0.2, "has kept a step waiting for 0.2 s"),
    ],
    ids=("killed", "stopped"),
)
def test_a_rank_that_fails_in_a_step_ends_the_engine(
    checkpoints: dict[str, Path], sent: signal.Signals, stall_s: float, what: str
) -> None:
    engine, pid = own_ranks(checkpoints["phimoe"])
    engine._ranks.stall_s = stall_s
    layer = engine.runner.model.layers[1].self_attn  # type: ignore[index, union-attr]
    layer.register_forward_pre_hook(lambda *_: os.kill(pid, sent))
    with pytest.raises(EngineError, match=rf"rank 1 of 2 \(process {pid}\) {what}"):
        while True:
            engine.step()
    wait_for(lambda: is_gone(pid))


def test_the_ranks_end_with_their_engine(checkpoints: dict[str, Path]) -> None:
    engine, pid = own_ranks(checkpoints["phimoe"])
    thread = next(thread for thread in threading.enumerate() if thread.name == "rank 1")
    assert not is_gone(pid) and thread.is_alive()
    del engine
    gc.collect()
    wait_for(lambda: is_gone(pid))
