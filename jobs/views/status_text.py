"""Format a job's status as text: while it runs, and how it ended."""

from moray.batch.ledger import State
from moray.batch.status.status import Status
from moray.batch.units import count, duration

STARTING = "starting Ray, loading the model"


def rows(status: Status) -> list[str]:
    """Return how many rows are finished and failed; before that, where Ray is starting, that and the last restart."""
    done = [f"{status.rows_done:,}/{count(status.input_rows, 'row')}", *failures(status), *cuts(status)]
    if status.state is not State.PENDING:
        return done
    return [STARTING, *(done if status.rows_done else []), *([restarts(status)] if status.restarts else [])]


def restarts(status: Status) -> str:
    """Return how often the driver was restarted and why it was the last time."""
    return f"the driver was restarted {count(status.restarts, 'time')}, the last time because {status.restart_reason}"


def pace(status: Status) -> list[str]:
    """Return tokens a second and the time left, as far as they are known."""
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
    """Return the number of workers and their GPUs, how busy they are, and what they have cost."""
    found = []
    if status.workers:
        gpus = f" x {status.worker_gpus:g} GPU{'s' if status.worker_gpus > 1 else ''}" if status.worker_gpus else ""
        found.append(count(status.workers, "worker") + gpus)
    if status.workers_starting:
        found.append(f"{count(status.workers_starting, 'worker') if not found else status.workers_starting} starting")
    if status.workers:
        found += [f"{status.busy:.0%} busy", f"KV cache {status.kv_use:.0%}"]
    if price is not None:
        found.append(f"{cost(status, price)} so far")
    return found


def limits(status: Status) -> list[str]:
    """Return the limits of a worker's step, once they are known, and how often workers lowered them."""
    if not status.max_num_seqs:
        return []
    seqs = count(status.max_num_seqs, "sequence")
    return [f"at most {seqs} and {count(status.max_num_batched_tokens, 'token')} a step", *lowered(status)]


def lowered(status: Status) -> list[str]:
    """Return how often workers lowered the limits of a step because memory ran out; an empty list where none did."""
    return [f"lowered {count(status.lowered_limits, 'time')}: memory ran out"] if status.lowered_limits else []


def failures(status: Status) -> list[str]:
    """Return how many rows failed, by error code; an empty list where none did."""
    errors = ", ".join(f"{code} {number:,}" for code, number in status.errors.items())
    return [f"{status.failed_rows:,} failed ({errors})"] if status.failed_rows else []


def cuts(status: Status) -> list[str]:
    """Return how many structured outputs max_tokens has cut; an empty list where it cut none."""
    return [f"{count(status.cut_rows, 'row')}: structured output cut by max_tokens"] if status.cut_rows else []


def line(status: Status, price: float | None = None) -> str:
    """Return rows, pace and work in one line."""
    return f"{status.name}: {', '.join([*rows(status), *pace(status), *work(status, price)])}"


def summary(status: Status, price: float | None = None) -> list[str]:
    """Return the lines of how the job ended, and what to do next where rows are missing."""
    lines = [f"{status.name} {status.state}" + (f": {status.reason}" if status.reason else "")]
    pending = [f"{status.pending_rows:,} not done"] if status.pending_rows else []
    ok = f"{status.ok_rows:,} of {count(status.input_rows, 'row')} ok"
    lines.append(f"  {', '.join([ok, *failures(status), *pending])}")
    lines += [f"  {cut}; raise sampling.max_tokens, or bound what may be written" for cut in cuts(status)]
    if status.tokens_per_s:
        speed = f"{status.tokens_per_s:,.0f} tokens/s"
        generated = f"{count(status.generated_tokens, 'token')} generated"
        done = generated if status.generated_tokens else count(status.prompt_tokens, "prompt token")
        since = "since the last restart" if status.restarts else "in all"
        lines.append(f"  {done}, {speed}, {duration(status.elapsed_s)} {since}")
    if status.copied_rows:
        lines.append(f"  {count(status.copied_rows, 'row')} got the answer of an equal row")
    if price is not None or status.card_s:
        lines.append(f"  {', '.join([hours(status), *([] if price is None else [cost(status, price)])])}")
    if status.lowered_limits:
        lines.append(f"  {', '.join(limits(status))}; set engine.max_num_seqs or engine.max_num_batched_tokens")
    if status.restart_reason is not None:
        lines.append(f"  {restarts(status)}")
    lines.append(f"  output: {status.output}")
    if status.has_too_many_failures:
        action = (
            "and run it again to continue" if status.pending_rows else "or run the failed rows again: `moray retry`"
        )
        lines.append(f"  Raise limits.max_failed_rows, {action}.")
    elif status.pending_rows:
        lines.append("  Run the same command again to continue.")
    return [*lines, *warnings(status)]


def warnings(status: Status) -> list[str]:
    """Return a line for each warning: what the job leaves out of its input."""
    return [f"  Warning: {warning}." for warning in status.warnings]


def hours(status: Status) -> str:
    """Return the GPU-hours of all runs of the job; worker-hours where there were no GPUs."""
    held_s, kind = (status.card_s, "GPU") if status.card_s else (status.worker_s, "worker")
    return f"{held_s / 3600:.3g} {kind}-hours"


def cost(status: Status, price: float) -> str:
    """Return what the hours of all runs cost.

    price: USD per GPU-hour, or per worker-hour where there were no GPUs
    """
    return f"${(status.card_s or status.worker_s) / 3600 * price:,.2f}"
