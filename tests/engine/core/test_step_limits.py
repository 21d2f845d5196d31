"""The limits of a step by tables: what they are chosen from, and how they are lowered."""

from pathlib import Path

import pytest
from repository import CONFIGS

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.core.limits import Limits, choose_largest_step, choose_limits
from moray.engine.core.lower_limits import describe_change, lower_limits
from moray.engine.core.memory_fit import fit_memory
from moray.engine.core.step_limits import choose_step_limits, mean_cached_tokens
from moray.engine.settings.sizes import GIB

PHI = read_model_config(Path(CONFIGS) / "phi-3.5-moe")
LIMITS = Limits(4096, 256, 2048, 512, 1000, 16)


@pytest.mark.parametrize(
    ("config", "device", "cache_tokens", "expected"),
    [
        (EngineConfig(), "cuda", 409_000, (576, 2304)),  # 639 sequences of 640 tokens, in whole graphs
        (EngineConfig(), "cuda", 10_000_000, (1024, 4096)),
        (EngineConfig(), "cuda", 20_000, (256, 2048)),
        (EngineConfig(mean_cached_tokens=100), "cuda", 80_000, (768, 3072)),
        (EngineConfig(mean_cached_tokens=4000), "cuda", 409_000, (256, 2048)),
        (EngineConfig(max_model_len=200), "cuda", 80_000, (384, 2048)),  # no sequence is longer
        (EngineConfig(max_num_seqs=700), "cuda", 1_000, (700, 2800)),
        (EngineConfig(max_num_batched_tokens=48), "cuda", 409_000, (576, 48)),
        (EngineConfig(max_num_seqs=3, max_num_batched_tokens=7), "cpu", 409_000, (3, 7)),
        (EngineConfig(), "cpu", 10_000, (64, 512)),
        (EngineConfig(), "cpu", 10_000_000, (64, 512)),
    ],
)
def test_a_step_has_as_many_sequences_as_the_cache_holds_of_their_length(
    config: EngineConfig, device: str, cache_tokens: int, expected: tuple[int, int]
) -> None:
    assert choose_step_limits(config, device, cache_tokens) == expected


@pytest.mark.parametrize(("prompt", "output", "mean"), [(512, 256, 640), (0, 0, 1), (10, 5, 12), (100, 0, 100)])
def test_a_running_sequence_has_half_of_its_answer_on_average(prompt: int, output: int, mean: int) -> None:
    assert mean_cached_tokens(prompt, output) == mean


def test_the_chosen_limits_never_exceed_the_step_that_was_measured() -> None:
    sizes = {"itemsize": 2, "device": "cuda"}
    free = 50 * GIB
    largest = choose_largest_step(EngineConfig(), PHI, available_bytes=free, **sizes)
    left = choose_limits(EngineConfig(), PHI, available_bytes=free - 2 * GIB, largest_step=largest, **sizes)
    more = choose_limits(EngineConfig(), PHI, available_bytes=free + 9 * GIB, largest_step=largest, **sizes)
    assert left.max_num_seqs < largest[0] == more.max_num_seqs
    assert left.max_num_batched_tokens <= largest[1] == more.max_num_batched_tokens


@pytest.mark.parametrize(("memory_gib", "seqs"), [(140.4, 704), (179.1, 1024)])
def test_a_plan_foretells_what_a_gpu_holds_of_phi(memory_gib: float, seqs: int) -> None:
    """An H200 and a B200, with 83.7 GB of weights."""
    memory = int(memory_gib * GIB)
    fit = fit_memory("GPU", EngineConfig(), PHI, weights_bytes=int(83.7e9), itemsize=2, memory_bytes=memory)
    assert fit.limits is not None and fit.limits.max_num_seqs == seqs
    assert fit.limits.num_blocks * 16 / seqs > 600, "the cache holds them"


@pytest.mark.parametrize(
    ("num_tokens", "num_sampled", "expected"),
    [
        (2048, None, (256, 1024, 512)),
        (300, None, (150, 150, 150)),
        (3, None, (1, 1, 1)),
        (1, None, None),
        (9000, None, (256, 2048, 512)),  # of an older, larger limit
        (900, 256, (128, 2048, 512)),
        (900, 3, (1, 2048, 512)),
        (900, 1, None),
    ],
)
def test_half_of_a_step_that_ran_out_of_memory_is_the_new_limit(
    num_tokens: int, num_sampled: int | None, expected: tuple[int, int, int] | None
) -> None:
    found = lower_limits(LIMITS, num_tokens, num_sampled)
    if expected is None:
        assert found is None
    else:
        assert found == Limits(4096, *expected, 1000, 16)


def test_the_change_is_described_by_the_keys() -> None:
    tokens, seqs = lower_limits(LIMITS, 2048), lower_limits(LIMITS, 300)
    assert tokens is not None and seqs is not None
    assert describe_change(LIMITS, tokens) == "engine.max_num_batched_tokens from 2,048 to 1,024 tokens a step"
    assert describe_change(LIMITS, seqs) == (
        "engine.max_num_seqs from 256 to 150 sequences a step and "
        "engine.max_num_batched_tokens from 2,048 to 150 tokens a step"
    )
