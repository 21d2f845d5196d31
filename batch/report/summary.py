"""The text of a report: what ran and where, and notes that a reader should see first."""

from collections import Counter
from collections.abc import Iterator, Sequence

from moray.batch.report.comparison import tokens_per_s
from moray.batch.report.events import RunEvents
from moray.batch.report.report_data import ReportData
from moray.batch.report.words import percent, time, whole
from moray.batch.units import count, duration


def describe(data: ReportData) -> Iterator[tuple[str, str]]:
    """Yield the terms and values of what ran."""
    spec, runs = data.spec, data.runs
    source, model = spec.get("input", {}), spec.get("model", {})
    processes = [process for run in runs for process in run.processes]
    dtypes = {process.about["dtype"] for process in processes if "dtype" in process.about}
    yield "Model", f"{model.get('path', 'not known')}, {', '.join(sorted(dtypes)) or model.get('dtype', 'auto')}"
    yield "Task", str(spec.get("task", "not known"))
    paths = source.get("path", "not known")
    joined = paths if isinstance(paths, str) else ", ".join(paths)
    yield "Input", f"{joined}: {count(data.input_rows, 'row')} in {count(data.input_files, 'file')}"
    yield "Output", data.path
    if machines := _machines(runs):
        yield "Workers", machines
    if products := sorted({process.about["products"] for process in processes if process.about.get("products")}):
        yield "Kernels", "; ".join(products)
    if limits := sorted({process.about["limits"] for process in processes if process.about.get("limits")}):
        yield "At once", "; ".join(limits)
    if runs:
        yield "Began", time(runs[0].started)
        yield "Ended", time(runs[-1].ended)
        busy = duration(sum(run.seconds for run in runs))
        yield "Time", f"{busy} in {count(len(runs), 'run')}" if len(runs) > 1 else busy
    speed = tokens_per_s(data)
    yield (
        "Tokens",
        f"{data.counts.prompt_tokens:,} of prompts, {data.counts.generated_tokens:,} generated"
        + (f", {whole(speed)} tokens/s" if speed else ""),
    )
    if data.counts.copied:
        yield (
            "Equal rows",
            f"{count(data.counts.copied, 'row')} got the answer of an equal one, which was computed once",
        )
    if computed := _cached(data):
        yield "Prefix cache", computed
    versions = {"moray": data.provenance.get("moray", "?"), **(runs[-1].versions if runs else {})}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Fingerprint", data.fingerprint


def _machines(runs: Sequence[RunEvents]) -> str:
    """Return `4 NVIDIA H200 on node-1, node-2`, with the largest number of each device in a run."""
    devices: Counter[str] = Counter()
    hosts = sorted({process.about["host"] for run in runs for process in run.processes if "host" in process.about})
    for run in runs:
        workers = {process.actor: process for process in run.processes if "device" in process.about}
        used: Counter[str] = Counter()
        for process in workers.values():
            used[process.about["device"]] += process.devices
        devices |= used
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more machines" if len(hosts) > 4 else "")
    listed = "; ".join(f"{number:,} {device}" for device, number in devices.most_common())
    return f"{listed} on {shown}" if hosts else listed


def _cached(data: ReportData) -> str | None:
    """Return how much of the prefix cache was used, from the last stats of each worker in each run."""
    last = {
        (run.name, worker.actor): worker for run in data.runs for _, sample in run.stats for worker in sample.workers
    }
    cached = sum(worker.cached_tokens for worker in last.values())
    total = cached + sum(worker.computed_tokens for worker in last.values())
    if not total:
        return None
    preemptions = sum(worker.preemptions for worker in last.values())
    found = percent(cached / total)
    return f"{found} of {total:,} tokens were found in it; {count(preemptions, 'preemption')}"


def find_notes(data: ReportData) -> Iterator[str]:
    """Yield notes that a reader should see before the numbers."""
    status = data.status
    if not status:
        yield "There is no status.json: how the job ended is not known."
    elif status.get("state") in ("PENDING", "RUNNING"):
        yield f"The job was {status['state']} at {status.get('updated_at', '?')}: it still runs, or was killed."
    elif status.get("state") != "SUCCEEDED" and status.get("reason"):
        yield f"{status['state']}: {status['reason']}"
    written = (status.get("ok_rows"), status.get("failed_rows"))
    if status and written != (data.counts.ok, data.counts.failed) and status.get("state") not in ("PENDING", "RUNNING"):
        yield "status.json has other counts than the parts in the folder; see `moray verify`."
    if data.pending:
        limit = status.get("max_failed_rows")
        is_over = limit is not None and data.counts.failed > limit
        fix = "Raise limits.max_failed_rows and run" if is_over else "Run"
        yield f"{count(data.pending, 'row')} not done. {fix} the job again to continue."
    yield from (f"Warning: {warning}." for warning in data.warnings)
    if data.counts.cut:
        yield (
            f"{count(data.counts.cut, 'row')}: structured output cut by max_tokens. Raise sampling.max_tokens, or "
            "bound what may be written (maxLength, maxItems)."
        )
    if data.stats.unparsed:
        yield (
            f"{count(data.stats.unparsed, 'sample')} ended, but parsed is null: it does not hold the text exactly (a "
            "whole number beyond 64 bits), or a stop string cut it. generated_text has all of it."
        )
    if data.stats.unanswered:
        yield (
            f"{count(data.stats.unanswered, 'sample')} ended inside the reasoning and have no answer; with "
            "finish_reason length a larger sampling.max_tokens helps."
        )
    if data.parts_without_stats:
        parts = count(data.parts_without_stats, "part")
        yield f"{parts} of an older moray have no lengths and no latency of their rows."
    if not data.runs:
        yield "There are no events: nothing is known of runs, workers and experts."
    elif killed := sum(run.state is None for run in data.runs):
        yield f"{count(killed, 'run')} of {len(data.runs)} ended without an end event: killed, or still running."
