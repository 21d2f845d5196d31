"""Compare the forecast of a job with what happened."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moray.batch.report.report_data import ReportData
from moray.batch.report.words import whole
from moray.batch.units import duration


@dataclass(frozen=True)
class Comparison:
    """Holds a line of the table, as text. What is not known is empty."""

    quantity: str
    predicted: str
    actual: str
    difference: str = ""


def compare(data: ReportData) -> list[Comparison]:
    """Return the lines of the table; none where the job has no forecast."""
    return list(_lines(data, data.forecast)) if data.forecast else []


def worker_hours(data: ReportData) -> float:
    """Return the GPU-hours of the job, or the worker-hours where workers have no GPUs.

    They are those of status.json; without it, the time from each worker's start to its end, with one GPU a worker where
    the spec does not give a number.
    """
    if held_s := data.status.get("card_s") or data.status.get("worker_s"):
        return float(held_s) / 3600
    gpus = data.spec.get("workers", {}).get("gpus")
    share = float(gpus) if isinstance(gpus, int | float) and gpus > 0 else 1.0
    return share * sum(process.seconds for run in data.runs for process in run.processes) / 3600


def tokens_per_s(data: ReportData) -> float | None:
    """Return the generated tokens (of a job that scores: prompt tokens) a second of the time in which a worker was
    ready, over all runs."""
    seconds = sum(run.ready_s for run in data.runs)
    tokens = (
        data.counts.prompt_tokens if data.spec.get("task") in ("score", "classify") else data.counts.generated_tokens
    )
    return round(tokens / seconds, 1) if seconds > 0 and tokens else None  # as in status.json


def _lines(data: ReportData, forecast: Mapping[str, Any]) -> Iterator[Comparison]:
    counts = data.counts
    yield _line("Rows", forecast.get("rows"), counts.rows)
    for name, actual in (("prompt_tokens", counts.prompt_tokens), ("generated_tokens", counts.generated_tokens)):
        interval = forecast.get(name) or {}
        low, high = interval.get("low"), interval.get("high")
        between = f"{low:,} to {high:,}" if low is not None and high is not None and low != high else ""
        quantity = name.replace("_", " ").capitalize()
        yield _line(quantity, interval.get("expected"), actual, between=between)
    expected: Mapping[str, Any] = forecast.get("error_rows") or {}
    for code in dict.fromkeys([*expected, *counts.errors]):
        yield _line(f"Rows with {code}", expected.get(code, 0), counts.errors.get(code, 0))
    yield _line("Tokens/s", forecast.get("tokens_per_s"), tokens_per_s(data))
    seconds = sum(run.seconds for run in data.runs) if data.runs else None
    yield _line("Time", forecast.get("seconds"), seconds, duration)
    hours, predicted = worker_hours(data), forecast.get("card_hours")
    yield _line("GPU-hours" if predicted is not None else "Worker-hours", predicted, hours or None, _hours)
    price = forecast.get("price")
    if price is not None:
        yield _line("Price (USD)", price, price / predicted * hours if predicted else None, _usd)


def _line(
    quantity: str, predicted: float | None, actual: float | None, format_value: Any = None, *, between: str = ""
) -> Comparison:
    format_value = format_value or _number
    text = (
        between
        if predicted is None
        else f"{format_value(predicted)} ({between})"
        if between
        else format_value(predicted)
    )
    difference = ""
    if predicted and actual is not None:
        difference = f"{actual / predicted - 1:+.1%}".replace("+0.0%", "0%").replace("-0.0%", "0%")
    return Comparison(quantity, text, "" if actual is None else format_value(actual), difference)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else whole(value)


def _usd(amount: float) -> str:
    return f"{amount:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.01 else f"{hours:.4f}"
