"""A forecast in a line or two: what `moray run` says first."""

from batch.forecast.forecast import HOUR_S, Forecast
from batch.ledger import Ledger
from batch.planning.planner import PlannedJob, tokens_per_row


def brief_work(job: PlannedJob, ledger: Ledger) -> str:
    """Before anything is read but footers."""
    files, shards = len(job.input.files), len(job.plan.shards)
    line = f"{job.spec.name}: {_count(ledger.num_rows, 'row')} in {_count(files, 'file')}, {_count(shards, 'shard')}"
    if job.spec.task == "generate":
        bound = "about" if {"max_tokens", "n"} & set(job.spec.sampling.columns) else "at most"
        line += f", {bound} {_count(ledger.num_rows * tokens_per_row(job.spec), 'token')} to generate"
    done = ledger.ok + ledger.failed
    return f"{line}; {_count(done, 'row')} done already" if done else line


def brief_forecast(name: str, forecast: Forecast) -> str:
    """Once a sample is read."""
    tokens = forecast.prompt_tokens
    line = f"{name}: {_count(tokens.expected or 0, 'prompt token')}"
    if tokens.low != tokens.high:
        line = f"{name}: about {_count(tokens.expected or 0, 'prompt token')} ({tokens.low:,} to {tokens.high:,})"
    if forecast.error_rows:
        codes = ", ".join(f"{code} {rows:,}" for code, rows in forecast.error_rows.items())
        line += f", {_count(sum(forecast.error_rows.values()), 'row')} will fail ({codes})"
    if forecast.seconds is not None:
        line += f", {_time(forecast.seconds)} at {forecast.tokens_per_s:,.0f} tokens/s"
    if forecast.price is not None:
        line += f", {forecast.price:,.2f} USD"
    return line


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds < 2 * HOUR_S else f"{seconds / HOUR_S:,.1f} hours"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
