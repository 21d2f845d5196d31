"""The estimate of memory, compared with what the engine uses on this machine's CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_jobs import TINY
from torch import Tensor

from moray.batch.plan.model_info import read_config, read_model_info
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.config import EngineConfig
from moray.engine.core import memory_fit
from moray.engine.core.memory_fit import MemoryFit, SmallerWeights, fit_memory
from moray.engine.engine import Engine
from moray.engine.float_dtypes import ITEM_BYTES
from moray.engine.layers.attention import attention_layers
from moray.engine.layers.embedding import TiedHead
from moray.engine.settings.sizes import GIB


def fit(model: Path, config: EngineConfig, memory_bytes: int) -> MemoryFit:
    folder = ModelSource(str(model))
    shape = read_config(folder)
    facts = read_model_info(folder, shape, config.dtype)
    ranks = config.tensor_parallel or 1
    weights_bytes = facts.weights_of_rank(ranks)
    assert weights_bytes is not None
    if config.device == "cpu":
        weights_bytes *= ranks
    sizes = {"weights_bytes": weights_bytes, "itemsize": ITEM_BYTES[facts.dtype]}
    return fit_memory("here", config, shape, **sizes, memory_bytes=memory_bytes)


@pytest.mark.parametrize("name", ["phimoe", "mixtral", "phi-msft"])
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(device="cpu"),
        EngineConfig(device="cpu", max_num_seqs=3, max_model_len=100),
        EngineConfig(device="cpu", kv_cache_memory=100_000, max_num_batched_tokens=32),
    ],
)
def test_the_engine_takes_what_was_foretold(checkpoints: dict[str, Path], name: str, config: EngineConfig) -> None:
    engine = Engine(str(checkpoints[name]), config)
    found = fit(checkpoints[name], config, 4 * GIB)
    assert found.limits == engine.limits
    caches = [tensor for layer in attention_layers(engine.runner.model) for tensor in (layer.k_cache, layer.v_cache)]
    assert found.cache_bytes == sum(cache.nbytes for cache in caches)
    assert found.weights_bytes == sum(weight.numel() * weight.itemsize for weight in _weights(checkpoints[name]))


def test_a_tied_head_is_in_the_memory_of_a_cpu_twice(checkpoints: dict[str, Path]) -> None:
    engine = Engine(str(checkpoints["granitemoe"]), EngineConfig(device="cpu"))
    (head,) = (module for module in engine.runner.model.modules() if isinstance(module, TiedHead))
    embeddings = head.embedding.weight
    assert head(torch.ones(1, embeddings.shape[1])).shape == (1, len(embeddings))
    embeddings.fill_(0)
    assert head(torch.ones(1, embeddings.shape[1])).any(), "the head has weights of its own"
    stored = sum(weight.nbytes for weight in _weights(checkpoints["granitemoe"]))
    of_cpu = [EngineConfig(device="cpu", tensor_parallel=size) for size in (1, 2)]
    one, two = (fit(checkpoints["granitemoe"], config, 4 * GIB).weights_bytes for config in of_cpu)
    assert one == stored + embeddings.nbytes
    # 163 rows are not divided between two ranks, which have the whole head, and the whole embeddings, each.
    assert two > one + 2 * embeddings.nbytes
    gpu = EngineConfig(device="cuda")
    assert fit(checkpoints["granitemoe"], gpu, 4 * GIB).weights_bytes == stored


def test_each_gpu_has_its_rank(checkpoints: dict[str, Path]) -> None:
    """Ranks divide weights and cache; each has the whole embedding, and heads of keys and values of its own."""
    one, two, four = (
        fit(checkpoints["phimoe"], EngineConfig(device="cuda", tensor_parallel=size), 4 * GIB) for size in (1, 2, 4)
    )
    assert (one.title, two.title, four.title) == ("here", "2 x here", "4 x here")
    assert one.weights_bytes / 2 < two.weights_bytes < one.weights_bytes
    assert one.limits == two.limits == four.limits, "the cache is as large as it can be used"
    assert two.cache_bytes == one.cache_bytes / 2 == four.cache_bytes, "two heads are shared by four ranks"


@pytest.mark.parametrize(("device", "ranks", "times"), [("cuda", 1, 0), ("cuda", 2, 1), ("cuda", 4, 1), ("cpu", 2, 0)])
def test_what_connects_the_gpus_counts_once_on_each(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, times: int
) -> None:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory": 1 << 20}
    config = EngineConfig(device=device, tensor_parallel=ranks, **limits)
    before = fit(checkpoints["phimoe"], config, 8 * GIB).working_bytes
    monkeypatch.setattr(memory_fit, "COMMUNICATOR_BYTES", memory_fit.COMMUNICATOR_BYTES + 12345)
    assert fit(checkpoints["phimoe"], config, 8 * GIB).working_bytes == before + 12345 * times


def test_gpus_together_hold_a_larger_cache() -> None:
    def tokens(size: int) -> int:
        config = EngineConfig(device="cuda", tensor_parallel=size, max_num_seqs=4096)
        return fit(TINY, config, 6 * GIB).cache_tokens

    assert 0 < 1.5 * tokens(1) < tokens(2)


def test_the_ranks_of_a_cpu_share_its_memory() -> None:
    one, two = (fit(TINY, EngineConfig(device="cpu", tensor_parallel=size), 50_000_000) for size in (1, 2))
    assert two.title == "here" and one.weights_bytes < two.weights_bytes < 1.2 * one.weights_bytes
    assert two.cache_bytes < one.cache_bytes


def test_more_gpus_are_a_fix() -> None:
    greedy = fit(TINY, EngineConfig(device="cpu", kv_cache_memory=10**9), 10**8)
    fixed = replace(greedy, more_gpus=4, smaller=SmallerWeights("int4", GIB))
    assert fixed.explain() == greedy.explain() + (
        ", or split it among 4 GPUs (engine.tensor_parallel), or set model.quantization: int4, which needs 1.0 GiB for "
        "the weights"
    )
    assert "GiB of weights on each and about" in replace(fixed, num_gpus=2, working_bytes=GIB).explain()


def _weights(folder: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]


def test_half_of_what_the_weights_leave_is_for_the_cache() -> None:
    found = fit(TINY, EngineConfig(device="cpu"), 50_000_000)
    available = 50_000_000 - found.weights_bytes
    assert found.limits is not None and available / 2 - 16 * 1024 < found.cache_bytes <= available / 2
    assert found.sequences(1000) == found.limits.num_blocks // 63 < 64
    assert found.sequences(1) == 64 and found.sequences(10**9) == 0
    assert found.fits


def test_what_does_not_fit_says_by_how_much() -> None:
    tiny = EngineConfig(device="cpu")
    assert (
        fit(TINY, tiny, 5_000_000)
        .explain()
        .endswith("of weights do not fit into 0.0 GiB; use a larger GPU or a smaller model")
    )
    small = fit(TINY, tiny, 8_000_000)
    assert not small.fits and f"leave room for {small.cache_tokens:,} tokens of KV cache" in small.explain()
    greedy = fit(TINY, replace(tiny, kv_cache_memory=10**9), 10**8)
    assert not greedy.fits and "too little for engine.kv_cache_memory; lower that" in greedy.explain()
    halved = replace(greedy, smaller=SmallerWeights("int8", GIB))
    assert halved.explain() == greedy.explain() + (
        ", or set model.quantization: int8, which needs 1.0 GiB for the weights"
    )


def test_a_cache_of_a_given_size_need_not_hold_the_longest_sequence() -> None:
    small = replace(EngineConfig(device="cpu"), kv_cache_memory=2**20)
    found = fit(TINY, small, 50_000_000)
    assert found.fits and 0 < found.cache_tokens < found.max_model_len
    assert not replace(found, is_cache_given=False).fits
    assert not replace(found, refusal="it is too old").fits
