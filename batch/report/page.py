"""The page: facts -> HTML by report.html, with autoescape on and without a script."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batch.output.tally import EDGES, Histogram
from batch.quantities import count, duration
from batch.report import heat_map, histogram_chart, time_chart, worker_timeline
from batch.report.comparison import compare, tokens_per_s
from batch.report.curves import loads, speeds
from batch.report.events import Life
from batch.report.facts import Facts
from batch.report.time_axis import TimeAxis
from batch.report.time_chart import Series
from batch.report.words import amount, milliseconds, percent, time, visible

MAX_DEATHS = 50
MAX_RUNS = 100
_HISTOGRAMS = {
    "latency_ms": ("Latency of rows", "in the engine, from admission to the end", milliseconds),
    "prompt_tokens": ("Tokens of prompts", "a row", amount),
    "generated_tokens": ("Generated tokens", "a sample", amount),
    "continuation_tokens": ("Tokens of continuations", "each", amount),
}


def draw_page(facts: Facts) -> str:
    runs = facts.runs
    deaths = [life for run in runs for life in run.lives if life.has_died]
    rows = heat_map.cells(facts.expert_tokens or [])
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            facts=facts,
            name=facts.spec.get("name") or facts.status.get("name") or "job",
            state=facts.status.get("state", "UNKNOWN"),
            about=list(_about(facts)),
            notes=list(_notes(facts)),
            comparison=compare(facts),
            charts=_time_charts(facts),
            untimed=not any(run.figures for run in runs),
            histograms=list(_histograms(facts)),
            heat=heat_map.draw(rows) if rows and rows[0] else None,
            heat_words=heat_map.summarize(rows) if rows and rows[0] else [],
            legend=list(enumerate(heat_map.LEGEND)),
            timeline=_timeline(facts),
            num_workers=len({life.actor for run in runs for life in run.lives}),
            deaths=deaths[:MAX_DEATHS],
            num_deaths=len(deaths),
            worker_name=worker_timeline.name,
            runs=runs[-MAX_RUNS:],
            reports=[report for run in runs for report in run.reports][-MAX_DEATHS:],
            spec=yaml.safe_dump(dict(facts.spec), sort_keys=False, allow_unicode=True) if facts.spec else None,
        )
    )
    return page


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    environment.filters |= {"visible": visible, "count": count, "duration": duration, "percent": percent, "time": time}
    return environment


def _about(facts: Facts) -> Iterator[tuple[str, str]]:
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
    if machines := _machines(lives):
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
        + (f", {amount(speed)} tokens/s" if speed else ""),
    )
    if computed := _cached(facts):
        yield "Prefix cache", computed
    versions = {"moray": facts.provenance.get("moray", "?")} | (runs[-1].versions if runs else {})
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Fingerprint", facts.fingerprint


def _machines(lives: Sequence[Life]) -> str:
    """`2 NVIDIA H200 on node-1, node-2`"""
    devices = Counter({life.actor: life.about["device"] for life in lives if "device" in life.about}.values())
    hosts = sorted({life.about["host"] for life in lives if "host" in life.about})
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more machines" if len(hosts) > 4 else "")
    return "; ".join(f"{number:,} {device}" for device, number in devices.most_common()) + (
        f" on {shown}" if hosts else ""
    )


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


def _notes(facts: Facts) -> Iterator[str]:
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
        yield f"{count(facts.pending, 'row')} are not done. Run the job again to continue."
    if facts.untold:
        yield f"{count(facts.untold, 'part')} of an older moray tell no lengths and no latency of their rows."
    if not facts.runs:
        yield "There are no events: nothing is known of runs, workers and experts."
    elif killed := sum(run.state is None for run in facts.runs):
        yield f"{count(killed, 'run')} of {len(facts.runs)} ended without a word, as a killed one does."


def _time_charts(facts: Facts) -> list[Markup]:
    runs = facts.runs
    fast = [speeds(run, facts.tokens_of, facts.rows_of) for run in runs]
    full = [loads(run) for run in runs]
    if not any(fast):
        return []
    axis = TimeAxis([(run.started, run.ended) for run in runs], time_chart.LEFT, time_chart.RIGHT)
    generated = [[(i.start, i.end, i.generated_tokens_per_s) for i in run] for run in fast]
    prompt = [[(i.start, i.end, i.prompt_tokens_per_s) for i in run] for run in fast]
    rows = [[(i.start, i.end, i.rows_done) for i in run] for run in fast]
    speed = [Series("prompt tokens", "two", prompt)]
    if facts.counts.generated_tokens:
        speed.insert(0, Series("generated tokens", "one", generated))
    charts = [
        time_chart.draw("Tokens a second", axis, speed, amount),
        time_chart.draw("Rows done", axis, [Series("rows", "one", rows)], amount, float(facts.input_rows)),
    ]
    if any(full):
        queue = [
            Series("running", "one", [[(i.start, i.end, i.seqs) for i in run] for run in full]),
            Series("waiting", "two", [[(i.start, i.end, i.waiting_seqs) for i in run] for run in full]),
        ]
        use = [
            Series("engine busy", "one", [[(i.start, i.end, i.busy) for i in run] for run in full]),
            Series("KV cache used", "two", [[(i.start, i.end, i.kv_use) for i in run] for run in full]),
        ]
        charts.append(time_chart.draw("Sequences in the engines", axis, queue, amount))
        charts.append(time_chart.draw("Use, on average over workers", axis, use, percent, 1.0))
    return charts


def _histograms(facts: Facts) -> Iterator[tuple[str, str, str, Markup]]:
    """Title, of what, quantiles, picture."""
    for name, (title, of_what, say) in _HISTOGRAMS.items():
        histogram: Histogram = Counter({edge: n for edge, n in facts.tally.histograms.get(name, {}).items() if n})
        if histogram and set(histogram) <= set(EDGES) and (name != "generated_tokens" or set(histogram) != {0}):
            words = histogram_chart.describe(histogram, say)
            yield title, of_what, words, histogram_chart.draw(title, histogram, say)


def _timeline(facts: Facts) -> Markup | None:
    lives = [life for run in facts.runs for life in run.lives]
    if not lives:
        return None
    axis = TimeAxis([(run.started, run.ended) for run in facts.runs], worker_timeline.LEFT, time_chart.RIGHT)
    return worker_timeline.draw(worker_timeline.choose(lives), axis)
