"""Tests of YaRN against transformers' frequencies, for the published numbers and around each rule."""

from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moray.engine.checkpoint.config_fields import read_rope
from moray.engine.config import RopeConfig
from moray.engine.json_options import JsonOptions
from moray.engine.layers.rotary import RotaryEmbedding

PUBLISHED = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def read(rope: dict[str, Any], head_dim: int = 64, theta: float = 150000.0) -> tuple[RopeConfig, list[str]]:
    options = JsonOptions({"rope_theta": theta, "rope_scaling": rope})
    return read_rope(options, head_dim, longrope=False, yarn=True), options.problems


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncate": True},
        {"truncate": None},
        {"factor": 4.0, "beta_fast": None, "beta_slow": 2.0},
        {"attention_factor": 1.25},
        {"mscale": 0.707, "mscale_all_dim": 1.2},
        {"mscale": 0.707},
        {"factor": 1.0},
        {"original_max_position_embeddings": 8},
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_reference(changes: dict[str, Any]) -> None:
    rope = {key: value for key, value in (PUBLISHED | changes).items() if value is not None}
    for head_dim in (64, 128, 16):
        config, problems = read(rope, head_dim)
        assert problems == []
        reference = GptOssConfig(head_dim=head_dim, rope_parameters={**rope, "rope_theta": 150000.0})
        want, mscale = ROPE_INIT_FUNCTIONS["yarn"](reference)
        ours = RotaryEmbedding(config)
        torch.testing.assert_close(ours.inv_freq[0], want, rtol=1e-6, atol=0)
        assert ours.mscale[0].item() == pytest.approx(mscale, rel=1e-7)
        assert config.original_max_position_embeddings is None, "all sequences use the same factors"


def test_the_published_numbers() -> None:
    """The first 8 pairs stay, the last 14 are stretched by 32, and the attention factor is 0.1 ln 32 + 1."""
    config, _ = read(PUBLISHED)
    assert config.short_mscale == pytest.approx(1.346574, abs=1e-6)
    assert config.short_factor[:9] == (1.0,) * 9 and config.short_factor[18:] == pytest.approx((32.0,) * 14)
    assert 1 < config.short_factor[9] < config.short_factor[17] < 32
    truncated, _ = read(PUBLISHED | {"truncate": True})
    assert truncated.short_factor != config.short_factor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": None}, "rope_scaling.factor is missing; supported: a number above 0"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"truncate": 1}, "rope_scaling.truncate is 1; supported: True or False"),
        ({"beta_slow": 0}, "rope_scaling.beta_slow is 0; supported: a number above 0"),
        ({"low_freq_factor": 2}, "rope_scaling.low_freq_factor is 2; supported: null"),
        ({"rope_theta": 1}, "one value for both"),
        ({"rope_type": "linear"}, "'linear'; supported: default or yarn"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    _, problems = read(PUBLISHED | changes)
    assert any(message in problem for problem in problems), problems


def test_a_missing_theta_is_named() -> None:
    options = JsonOptions({"rope_scaling": PUBLISHED})
    read_rope(options, 64, longrope=False, yarn=True)
    assert options.problems[0] == "rope_theta is missing; supported: a number above 0"
