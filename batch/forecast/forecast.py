"""Forecast: what a job will take, and the file in which its first run leaves that for the report. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from batch.forecast.estimate import Range
from batch.forecast.sample import Sample

HOUR_S = 3600.0


@dataclass(frozen=True)
class Crew:
    """Who does it. gpus: of one worker; tokens_per_s: of all of them, None = not known; source: of that figure."""

    workers: int
    gpus: float
    tokens_per_s: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Forecast:
    """
    prompt_tokens:     of rows that run; with continuations, where they are scored
    generated_tokens:  expected where it was measured, or follows from the spec; else only what it lies between
    error_rows:        rows that fail before they come to the engine, by code
    tokens_per_s:      of all workers; source: where it was measured
    seconds:           of work, without the start of Ray and of the workers
    card_hours:        None where workers have no GPUs
    price:             of the card-hours, or of the workers' hours where they have none
    """

    rows: int
    prompt_tokens: Range
    generated_tokens: Range
    error_rows: Mapping[str, int]
    tokens_per_s: float | None
    source: str | None
    seconds: float | None
    card_hours: float | None
    price: float | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Forecast":
        """Raises ValueError or TypeError where the text is not a forecast."""
        values = json.loads(text)
        ranges = {name: Range(**values[name]) for name in ("prompt_tokens", "generated_tokens")}
        return cls(**values | ranges)


def make_forecast(
    sample: Sample, crew: Crew, *, is_scoring: bool, per_row: float | None = None, price: float | None = None
) -> Forecast:
    """
    per_row:  tokens that rows generate on average, where that was measured
    price:    of an hour of a card, or of a worker without one
    """
    generated = expect_generated(sample, per_row)
    work = sample.prompt_tokens if is_scoring else generated
    seconds, card_hours, cost = cost_of(work.expected, crew, price)
    return Forecast(
        rows=sample.input_rows,
        prompt_tokens=sample.prompt_tokens,
        generated_tokens=generated,
        error_rows=sample.error_rows(),
        tokens_per_s=crew.tokens_per_s,
        source=crew.source,
        seconds=seconds,
        card_hours=card_hours,
        price=cost,
    )


def expect_generated(sample: Sample, per_row: float | None) -> Range:
    """What rows may generate, with what they are expected to where that is known."""
    limits = sample.generated_tokens
    if limits.expected is not None or per_row is None:
        return limits
    running = sample.input_rows - sum(sample.error_rows().values())
    return Range(min(limits.high, max(limits.low, round(per_row * running))), limits.low, limits.high)


def cost_of(tokens: int | None, crew: Crew, price: float | None) -> tuple[float | None, float | None, float | None]:
    """Seconds, card-hours and price of so many tokens, as far as they are known."""
    if tokens is None or not crew.tokens_per_s:
        return None, None, None
    seconds = tokens / crew.tokens_per_s
    hours = seconds / HOUR_S * crew.workers
    card_hours = hours * crew.gpus if crew.gpus else None
    cost = None if price is None else price * (hours if card_hours is None else card_hours)
    return (
        round(seconds, 1),
        None if card_hours is None else round(card_hours, 4),
        None if cost is None else round(cost, 4),
    )
