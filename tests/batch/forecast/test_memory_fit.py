"""What is said to fit, held against what the engine takes on this machine's CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_jobs import TINY, make_spec, write_input

from batch.forecast.memory import MemoryFit, fit_memory
from batch.forecast.of_job import THIS_MACHINE, fit_cards
from batch.placement.cards import CARDS, GIB
from batch.planning.model_facts import ITEM_BYTES, read_config, read_facts
from batch.planning.planner import plan_job
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import SpecError
from engine.layers.attention import attention_layers
from engine.remote import ModelFolder


def fit(model: Path, config: EngineConfig, memory_bytes: int) -> MemoryFit:
    folder = ModelFolder(str(model))
    shape = read_config(folder)
    facts = read_facts(folder, shape, config.dtype)
    sizes = {"weights_bytes": facts.weights_bytes, "itemsize": ITEM_BYTES[facts.dtype]}
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


def _weights(folder: Path) -> list[object]:
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
    assert fit(TINY, tiny, 5_000_000).explain().endswith("of weights do not fit into 0.0 GiB; take a larger card")
    small = fit(TINY, tiny, 8_000_000)
    assert not small.fits and f"leave room for {small.cache_tokens:,} tokens of KV cache" in small.explain()
    greedy = fit(TINY, replace(tiny, kv_cache_memory=10**9), 10**8)
    assert not greedy.fits and "too little for engine.kv_cache_memory; lower that" in greedy.explain()


def test_cards_by_name_or_this_machine(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    job = plan_job(make_spec(tmp_path))
    (here,) = fit_cards(job, [])
    assert here.name == THIS_MACHINE and here.working_bytes == 0 and here.fits
    named = fit_cards(job, ["H100", "L4"])
    assert [found.name for found in named] == ["H100", "L4"] and all(found.fits for found in named)
    assert named[0].memory_bytes == CARDS["H100"].memory_bytes and named[0].working_bytes > GIB
    shared = replace(job, spec=make_spec(tmp_path, workers={"gpus": 0.5}, engine={"kv_cache_memory": "1GiB"}))
    assert fit_cards(shared, ["L4"])[0].memory_bytes == CARDS["L4"].memory_bytes // 2
    assert fit_cards(shared, []) == []
    assert fit_cards(replace(job, spec=make_spec(tmp_path, workers={"accelerator": "L4"})), [])[0].name == "L4"
    with pytest.raises(SpecError, match="--card: 'H10' is not known; did you mean 'H100'"):
        fit_cards(job, ["H10"])
