"""Forecast: the tokens, time and cost that a job is expected to need, and its JSON form. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from moray.batch.forecast.estimate import EstimatedRange
from moray.batch.forecast.sample import PromptSample

HOUR_S = 3600.0


@dataclass(frozen=True)
class WorkerPool:
    """Describes the workers of a forecast.

    gpus:          GPUs of one worker
    tokens_per_s:  throughput of all workers; None = not known
    source:        where that figure was measured
    """

    workers: int
    gpus: float
    tokens_per_s: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Forecast:
    """Holds what a job is expected to need.

    prompt_tokens:     of rows that run; with continuations, where they are scored
    generated_tokens:  has an expected value where it was measured or follows from the spec; else only a range
    error_rows:        rows that fail before they reach the engine, by code
    tokens_per_s:      throughput of all workers
    source:            where that was measured
    seconds:           time of the work, without the start of Ray and of the workers
    card_hours:        GPU-hours, under the name that they have in the file; None where workers have no GPUs
    price:             USD for the GPU-hours, or for the worker-hours where workers have no GPUs
    warnings:          lines about the prompts that a person should read
    """

    rows: int
    prompt_tokens: EstimatedRange
    generated_tokens: EstimatedRange
    error_rows: Mapping[str, int]
    tokens_per_s: float | None
    source: str | None
    seconds: float | None
    card_hours: float | None
    price: float | None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Forecast":
        """Parse what to_json() returned. Raises ValueError or TypeError where the text is not a forecast."""
        values = json.loads(text)
        ranges = {name: EstimatedRange(**values[name]) for name in ("prompt_tokens", "generated_tokens")}
        return cls(**values | ranges | {"warnings": tuple(values.get("warnings", ()))})


def make_forecast(
    sample: PromptSample,
    pool: WorkerPool,
    *,
    is_scoring: bool,
    per_row: float | None = None,
    price: float | None = None,
) -> Forecast:
    """Make the forecast of a job from a sample of its rows and the speed of its workers.

    per_row:  tokens that a row generates on average, where that was measured
    price:    USD per GPU-hour, or per worker-hour without GPUs
    """
    generated = expect_generated(sample, per_row)
    work = sample.prompt_tokens if is_scoring else generated
    seconds, gpu_hours, cost = cost_of(work.expected, pool, price)
    return Forecast(
        rows=sample.input_rows,
        prompt_tokens=sample.prompt_tokens,
        generated_tokens=generated,
        error_rows=sample.error_rows(),
        tokens_per_s=pool.tokens_per_s,
        source=pool.source,
        seconds=seconds,
        card_hours=gpu_hours,
        price=cost,
        warnings=sample.warnings,
    )


def expect_generated(sample: PromptSample, per_row: float | None) -> EstimatedRange:
    """Return the range of generated tokens, with an expected value where per_row or the spec gives one."""
    limits = sample.generated_tokens
    if limits.expected is not None or per_row is None:
        return limits
    running = sample.input_rows - sum(sample.error_rows().values())
    return EstimatedRange(min(limits.high, max(limits.low, round(per_row * running))), limits.low, limits.high)


def cost_of(
    tokens: int | None, pool: WorkerPool, price: float | None
) -> tuple[float | None, float | None, float | None]:
    """Return the seconds, GPU-hours and price of a number of tokens; None for what is not known."""
    if tokens is None or not pool.tokens_per_s:
        return None, None, None
    seconds = tokens / pool.tokens_per_s
    hours = seconds / HOUR_S * pool.workers
    gpu_hours = hours * pool.gpus if pool.gpus else None
    cost = None if price is None else price * (hours if gpu_hours is None else gpu_hours)
    return (
        round(seconds, 1),
        None if gpu_hours is None else round(gpu_hours, 4),
        None if cost is None else round(cost, 4),
    )
