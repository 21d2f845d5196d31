"""YaRN (arXiv 2309.00071): the factors of its wavelengths, and what multiplies cos and sin. Pure.

Wavelengths that turn often within the original length stay, those that turn hardly once are stretched by the factor,
and in between the share of what is stretched rises linearly.
"""

import math

from moray.engine.config import RopeConfig
from moray.engine.json_options import JsonOptions

KEYS = (
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim",
)  # fmt: skip


def read_yarn(rope: JsonOptions, theta: float, rotary_dim: int, original_length: int) -> RopeConfig:
    """Read the options of YaRN.

    rope:             the object of config.json that has them
    theta:            base of the frequencies
    rotary_dim:       dims of a head that rotate
    original_length:  longest sequence of the model before it was stretched, in tokens
    """
    rope.expect_only(*KEYS)
    if theta <= 1:
        rope.refuse(f"rope_theta is {theta}", "a number above 1 with yarn")
        return RopeConfig(theta, rotary_dim)
    factor = rope.number("factor")
    rope.expect("truncate", True, False)
    fast, slow = rope.number("beta_fast", default=32.0), rope.number("beta_slow", default=1.0)
    ramp = _ramp(theta, rotary_dim, original_length, (fast, slow), truncate=rope.value("truncate") is not False)
    return RopeConfig(
        theta,
        rotary_dim,
        short_factor=tuple(1 / (share / factor + 1 - share) for share in ramp),
        short_mscale=_attention_factor(rope, factor),
        max_position_embeddings=int(original_length * factor),
    )


def _ramp(theta: float, rotary_dim: int, length: int, turns: tuple[float, float], *, truncate: bool) -> list[float]:
    """Return which share, 0 to 1, of each wavelength is stretched: none of those up to the first bound, all of those
    from the second on.

    turns:     how often the wavelength at each bound turns within the original length
    truncate:  the bounds are whole numbers
    """
    low, high = (rotary_dim * math.log(length / (turn * 2 * math.pi)) / (2 * math.log(theta)) for turn in turns)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as the reference does, so that nothing is divided by 0
    return [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(rotary_dim // 2)]


def _attention_factor(rope: JsonOptions, factor: float) -> float:
    """Return what multiplies cos and sin: as given, or the ratio of the mscales if both are given, or the paper's."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.value("attention_factor") is not None:
        return rope.number("attention_factor")
    numerator, denominator = (rope.number(key, default=0.0, zero=True) for key in ("mscale", "mscale_all_dim"))
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)
