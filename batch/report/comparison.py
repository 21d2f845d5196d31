"""What the plan predicted beside what came."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batch.quantities import duration
from batch.report.facts import Facts
from batch.report.words import whole


@dataclass(frozen=True)
class Compared:
    """A line of the table; predicted and actual as text, empty where it is not known."""

    what: str
    predicted: str
    actual: str
    difference: str = ""


def compare(facts: Facts) -> list[Compared]:
    """Nothing where the job has no forecast."""
    return list(_lines(facts, facts.forecast)) if facts.forecast else []


def card_hours(facts: Facts) -> float:
    """Hours of cards, or of workers on CPUs: as status.json counts them, else the time from each worker's start to its
    end, with one card where the spec leaves it open."""
    if held_s := facts.status.get("card_s") or facts.status.get("worker_s"):
        return float(held_s) / 3600
    gpus = facts.spec.get("workers", {}).get("gpus")
    share = float(gpus) if isinstance(gpus, int | float) and gpus > 0 else 1.0
    return share * sum(life.seconds for run in facts.runs for life in run.lives) / 3600


def tokens_per_s(facts: Facts) -> float | None:
    """Generated tokens (of a job that scores: the prompts'), over the time in which a worker was ready, in all runs."""
    seconds = sum(run.ready_s for run in facts.runs)
    tokens = facts.counts.prompt_tokens if facts.spec.get("task") == "score" else facts.counts.generated_tokens
    return round(tokens / seconds, 1) if seconds > 0 and tokens else None  # as in status.json


def _lines(facts: Facts, forecast: Mapping[str, Any]) -> Iterator[Compared]:
    counts = facts.counts
    yield _line("Rows", forecast.get("rows"), counts.rows)
    for name, actual in (("prompt_tokens", counts.prompt_tokens), ("generated_tokens", counts.generated_tokens)):
        spread = forecast.get(name) or {}
        low, high = spread.get("low"), spread.get("high")
        between = f"{low:,} to {high:,}" if low is not None and high is not None and low != high else ""
        yield _line(name.replace("_", " ").capitalize(), spread.get("expected"), actual, between)
    expected: Mapping[str, Any] = forecast.get("error_rows") or {}
    for code in dict.fromkeys([*expected, *counts.errors]):
        yield _line(f"Rows with {code}", expected.get(code, 0), counts.errors.get(code, 0))
    yield _line("Tokens/s", forecast.get("tokens_per_s"), tokens_per_s(facts))
    seconds = sum(run.seconds for run in facts.runs) if facts.runs else None
    yield _line("Time", forecast.get("seconds"), seconds, say=duration)
    hours, wanted = card_hours(facts), forecast.get("card_hours")
    yield _line("Card-hours" if wanted is not None else "Worker-hours", wanted, hours or None, say=_hours)
    price = forecast.get("price")
    if price is not None:
        yield _line("Price (USD)", price, price / wanted * hours if wanted else None, say=lambda usd: f"{usd:,.2f}")


def _line(what: str, predicted: float | None, actual: float | None, between: str = "", say: Any = None) -> Compared:
    say = say or (lambda value: f"{value:,}" if isinstance(value, int) else whole(value))
    text = between if predicted is None else f"{say(predicted)} ({between})" if between else say(predicted)
    difference = ""
    if predicted and actual is not None:
        difference = f"{actual / predicted - 1:+.1%}".replace("+0.0%", "0%").replace("-0.0%", "0%")
    return Compared(what, text, "" if actual is None else say(actual), difference)


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.01 else f"{hours:.4f}"
