"""A job's status in words: while it runs, and how it ended."""

from batch.ledger import State
from batch.quantities import count, duration
from batch.watch.status import Status

STARTING = "starting Ray, loading the model"


def rows(status: Status) -> list[str]:
    """Those that are finished, and those that failed."""
    if status.state is State.PENDING:
        return [STARTING]
    return [f"{status.rows_done:,}/{count(status.input_rows, 'row')}", *failures(status)]


def pace(status: Status) -> list[str]:
    """Tokens a second and the time left, as far as they are known."""
    found = []
    if status.prompt_tokens_per_s:
        found.append(f"{status.prompt_tokens_per_s:,.0f} tokens/s in")
    if status.generated_tokens and status.tokens_per_s:
        found.append(f"{status.tokens_per_s:,.0f}{'' if found else ' tokens/s'} out")
    if status.reason is not None:
        found.append(f"stopping: {status.reason}")
    elif status.eta_s is not None:
        low, high = status.eta_low_s, status.eta_high_s
        between = "" if low is None or high is None else f" ({duration(low)} to {duration(high)})"
        found.append(f"{duration(status.eta_s)} left{between}")
    return found


def work(status: Status, price: float | None = None) -> list[str]:
    """Workers, how busy they are, and what they have cost."""
    found = []
    if status.workers:
        found.append(count(status.workers, "worker"))
    if status.workers_starting:
        found.append(f"{count(status.workers_starting, 'worker') if not found else status.workers_starting} starting")
    if status.workers:
        found += [f"{status.busy:.0%} busy", f"KV cache {status.kv_use:.0%}"]
    if price is not None:
        found.append(f"{money(status, price)} so far")
    return found


def failures(status: Status) -> list[str]:
    errors = ", ".join(f"{code} {number:,}" for code, number in status.errors.items())
    return [f"{status.failed_rows:,} failed ({errors})"] if status.failed_rows else []


def line(status: Status, price: float | None = None) -> str:
    """All of it."""
    return f"{status.name}: {', '.join([*rows(status), *pace(status), *work(status, price)])}"


def summary(status: Status, price: float | None = None) -> list[str]:
    """How the job ended, and what to do next where that is not all."""
    lines = [f"{status.name} {status.state}" + (f": {status.reason}" if status.reason else "")]
    pending = [f"{status.pending_rows:,} not done"] if status.pending_rows else []
    ok = f"{status.ok_rows:,} of {count(status.input_rows, 'row')} ok"
    lines.append(f"  {', '.join([ok, *failures(status), *pending])}")
    if status.tokens_per_s:
        speed = f"{status.tokens_per_s:,.0f} tokens/s"
        generated = f"{count(status.generated_tokens, 'token')} generated"
        done = generated if status.generated_tokens else count(status.prompt_tokens, "prompt token")
        lines.append(f"  {done}, {speed}, {duration(status.elapsed_s)} in all")
    if price is not None or status.card_s:
        lines.append(f"  {', '.join([hours(status), *([] if price is None else [money(status, price)])])}")
    lines.append(f"  output: {status.output}")
    if status.has_too_many_failures:
        then = "and run it again to continue" if status.pending_rows else "or run the failed rows again: `moray retry`"
        lines.append(f"  Raise limits.max_failed_rows, {then}.")
    elif status.pending_rows:
        lines.append("  Run the same command again to continue.")
    return lines


def hours(status: Status) -> str:
    """For which GPUs were held, by all runs of the job; workers where there were no GPUs."""
    held_s, kind = (status.card_s, "card") if status.card_s else (status.worker_s, "worker")
    return f"{held_s / 3600:.3g} {kind}-hours"


def money(status: Status, price: float) -> str:
    """price: USD for an hour of a GPU, of a worker where there were none"""
    return f"${(status.card_s or status.worker_s) / 3600 * price:,.2f}"
