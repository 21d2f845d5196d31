"""What a report says in words: what ran, where, on what, and what a reader should know before the figures."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from batch.quantities import count, duration
from batch.report.comparison import tokens_per_s
from batch.report.events import Run
from batch.report.facts import Facts
from batch.report.words import percent, time, whole


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    spec, runs = facts.spec, facts.runs
    source, model = spec.get("input", {}), spec.get("model", {})
    lives = [life for run in runs for life in run.lives]
    dtypes = {life.about["dtype"] for life in lives if "dtype" in life.about}
    yield "Model", f"{model.get('path', 'not known')}, {', '.join(sorted(dtypes)) or model.get('dtype', 'auto')}"
    yield "Task", str(spec.get("task", "not known"))
    paths = source.get("path", "not known")
    where = paths if isinstance(paths, str) else ", ".join(paths)
    yield "Input", f"{where}: {count(facts.input_rows, 'row')} in {count(facts.input_files, 'file')}"
    yield "Output", facts.path
    if machines := _machines(runs):
        yield "Workers", machines
    if runs:
        yield "Began", time(runs[0].started)
        yield "Ended", time(runs[-1].ended)
        busy = duration(sum(run.seconds for run in runs))
        yield "Time", f"{busy} in {count(len(runs), 'run')}" if len(runs) > 1 else busy
    speed = tokens_per_s(facts)
    yield (
        "Tokens",
        f"{facts.counts.prompt_tokens:,} of prompts, {facts.counts.generated_tokens:,} generated"
        + (f", {whole(speed)} tokens/s" if speed else ""),
    )
    if computed := _cached(facts):
        yield "Prefix cache", computed
    versions = {"moray": facts.provenance.get("moray", "?"), **(runs[-1].versions if runs else {})}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Fingerprint", facts.fingerprint


def _machines(runs: Sequence[Run]) -> str:
    """`2 NVIDIA H200 on node-1, node-2`: of the run with most workers."""
    devices: Counter[str] = Counter()
    hosts = sorted({life.about["host"] for run in runs for life in run.lives if "host" in life.about})
    for run in runs:
        devices |= Counter({life.actor: life.about["device"] for life in run.lives if "device" in life.about}.values())
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more machines" if len(hosts) > 4 else "")
    listed = "; ".join(f"{number:,} {device}" for device, number in devices.most_common())
    return f"{listed} on {shown}" if hosts else listed


def _cached(facts: Facts) -> str | None:
    """From what the workers told last, in each run."""
    last: dict[tuple[str, str], Any] = {}
    for run in facts.runs:
        for figures in run.figures:
            last |= {(run.name, worker.get("actor", "")): worker for worker in figures.workers}
    sums = {name: sum(worker.get(name, 0) for worker in last.values()) for name in ("cached_tokens", "computed_tokens")}
    total = sum(sums.values())
    if not total:
        return None
    preemptions = sum(worker.get("preemptions", 0) for worker in last.values())
    found = percent(sums["cached_tokens"] / total)
    return f"{found} of {total:,} tokens were found in it; {count(preemptions, 'preemption')}"


def find_notes(facts: Facts) -> Iterator[str]:
    """What a reader should know before the figures."""
    status = facts.status
    if not status:
        yield "There is no status.json: how the job ended is not known."
    elif status.get("state") in ("PENDING", "RUNNING"):
        yield f"The job was {status['state']} at {status.get('updated_at', '?')}: it still runs, or was killed."
    elif status.get("state") != "SUCCEEDED" and status.get("reason"):
        yield f"{status['state']}: {status['reason']}"
    written = (status.get("ok_rows"), status.get("failed_rows"))
    if (
        status
        and written != (facts.counts.ok, facts.counts.failed)
        and status.get("state") not in ("PENDING", "RUNNING")
    ):
        yield "status.json tells other counts than the parts that are there; see `moray verify`."
    if facts.pending:
        limit = status.get("max_failed_rows")
        is_over = limit is not None and facts.counts.failed > limit
        fix = "Raise limits.max_failed_rows and run" if is_over else "Run"
        yield f"{count(facts.pending, 'row')} not done. {fix} the job again to continue."
    if facts.untold:
        yield f"{count(facts.untold, 'part')} of an older moray tell no lengths and no latency of their rows."
    if not facts.runs:
        yield "There are no events: nothing is known of runs, workers and experts."
    elif killed := sum(run.state is None for run in facts.runs):
        yield f"{count(killed, 'run')} of {len(facts.runs)} ended without a word, as a killed one does."
