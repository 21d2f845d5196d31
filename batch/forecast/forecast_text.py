"""Format a forecast in a line or two: what `moray run` prints first."""

from moray.batch.forecast.forecast import HOUR_S, Forecast
from moray.batch.ledger import Ledger
from moray.batch.plan.planner import PlannedJob, tokens_per_row
from moray.batch.units import count


def describe_work(job: PlannedJob, ledger: Ledger) -> str:
    """Format what there is to do, as far as the plan shows it, before any row is read."""
    files, shards = len(job.input.files), len(job.plan.shards)
    line = f"{job.spec.name}: {count(ledger.num_rows, 'row')} in {count(files, 'file')}, {count(shards, 'shard')}"
    if job.spec.task == "generate":
        bound = "about" if {"max_tokens", "n"} & set(job.spec.sampling.columns) else "at most"
        line += f", {bound} {count(ledger.num_rows * tokens_per_row(job.spec), 'token')} to generate"
    done = ledger.ok + ledger.failed
    return f"{line}; {count(done, 'row')} done already" if done else line


def describe_forecast(name: str, forecast: Forecast) -> str:
    """Format the forecast from a sample of the rows."""
    tokens = forecast.prompt_tokens
    line = f"{name}: {count(tokens.expected or 0, 'prompt token')}"
    if tokens.low != tokens.high:
        line = f"{name}: about {count(tokens.expected or 0, 'prompt token')} ({tokens.low:,} to {tokens.high:,})"
    if forecast.error_rows:
        codes = ", ".join(f"{code} {rows:,}" for code, rows in forecast.error_rows.items())
        line += f", {count(sum(forecast.error_rows.values()), 'row')} will fail ({codes})"
    if forecast.seconds is not None:
        line += f", {_time(forecast.seconds)} at {forecast.tokens_per_s:,.0f} tokens/s"
    if forecast.price is not None:
        line += f", {forecast.price:,.2f} USD"
    return line


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds < 2 * HOUR_S else f"{seconds / HOUR_S:,.1f} hours"
