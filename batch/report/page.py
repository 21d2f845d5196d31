"""Render the report's page from report.html, with autoescape on and without a script."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moray.batch.output.part_stats import EDGES, Histogram
from moray.batch.report import heat_map, histogram_chart, time_chart, worker_timeline
from moray.batch.report.comparison import compare
from moray.batch.report.report_data import ReportData
from moray.batch.report.summary import describe, find_notes
from moray.batch.report.time_axis import TimeAxis
from moray.batch.report.time_chart import Series
from moray.batch.report.time_series import loads, speeds
from moray.batch.report.words import amount, escape_invisible, milliseconds, percent, time, whole
from moray.batch.units import count, duration

MAX_DEATHS = 50  # deaths, and reports, that are listed
MAX_RUNS = 100  # last runs that are listed
_HISTOGRAMS = {
    "latency_ms": ("Latency of rows", "in the engine, from admission to the end", milliseconds),
    "prompt_tokens": ("Tokens of prompts", "a row", whole),
    "generated_tokens": ("Generated tokens", "a sample", whole),
    "continuation_tokens": ("Tokens of continuations", "each", whole),
}


def render_page(data: ReportData) -> str:
    """Render the whole page as HTML."""
    runs = data.runs
    deaths = [process for run in runs for process in run.processes if process.has_died]
    rows = heat_map.cells(data.expert_tokens or [])
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            data=data,
            name=data.spec.get("name") or data.status.get("name") or "job",
            state=data.status.get("state", "UNKNOWN"),
            about=list(describe(data)),
            notes=list(find_notes(data)),
            comparison=compare(data),
            charts=_time_charts(data),
            untimed=not any(run.stats for run in runs),
            histograms=list(_histograms(data)),
            heat=heat_map.render(rows) if rows and rows[0] else None,
            heat_words=heat_map.summarize(rows) if rows and rows[0] else [],
            legend=list(enumerate(heat_map.LEGEND)),
            timeline=_timeline(data),
            num_workers=len({process.actor for run in runs for process in run.processes}),
            deaths=deaths[:MAX_DEATHS],
            num_deaths=len(deaths),
            machine=worker_timeline.machine,
            runs=runs[-MAX_RUNS:],
            reports=[report for run in runs for report in run.reports][-MAX_DEATHS:],
            spec=yaml.safe_dump(dict(data.spec), sort_keys=False, allow_unicode=True) if data.spec else None,
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
    environment.filters |= {
        "escape_invisible": escape_invisible,
        "count": count,
        "duration": duration,
        "percent": percent,
        "time": time,
    }
    return environment


def _time_charts(data: ReportData) -> list[Markup]:
    runs = data.runs
    run_speeds = [speeds(run, data.shard_tokens, data.shard_rows) for run in runs]
    run_loads = [loads(run) for run in runs]
    if not any(run_speeds):
        return []
    axis = TimeAxis([(run.first_ready, run.ended) for run in runs], time_chart.LEFT, time_chart.RIGHT)
    generated = [[(i.start, i.end, i.generated_tokens_per_s) for i in run] for run in run_speeds]
    prompt = [[(i.start, i.end, i.prompt_tokens_per_s) for i in run] for run in run_speeds]
    rows = [[(i.start, i.end, i.rows_done) for i in run] for run in run_speeds]
    speed = [Series("prompt tokens", "two", prompt)]
    if data.counts.generated_tokens:
        speed.insert(0, Series("generated tokens", "one", generated))
    charts = [
        time_chart.render("Tokens a second", axis, speed, amount),
        time_chart.render("Rows done", axis, [Series("rows", "one", rows)], amount, float(data.input_rows)),
    ]
    if any(run_loads):
        queue = [
            Series("running", "one", [[(i.start, i.end, i.seqs) for i in run] for run in run_loads]),
            Series("waiting", "two", [[(i.start, i.end, i.waiting_seqs) for i in run] for run in run_loads]),
        ]
        use = [
            Series("engine busy", "one", [[(i.start, i.end, i.busy) for i in run] for run in run_loads]),
            Series("KV cache used", "two", [[(i.start, i.end, i.kv_use) for i in run] for run in run_loads]),
        ]
        charts.append(time_chart.render("Sequences in the engines", axis, queue, amount))
        charts.append(time_chart.render("Use, on average over workers", axis, use, percent, 1.0))
    return charts


def _histograms(data: ReportData) -> Iterator[tuple[str, str, str, Markup]]:
    """Yield title, unit, quantiles and chart of each histogram."""
    for name, (title, unit, format_value) in _HISTOGRAMS.items():
        histogram: Histogram = Counter({edge: n for edge, n in data.stats.histograms.get(name, {}).items() if n})
        if histogram and set(histogram) <= set(EDGES) and (name != "generated_tokens" or set(histogram) != {0}):
            words = histogram_chart.describe(histogram, format_value)
            yield title, unit, words, histogram_chart.render(title, histogram, format_value)


def _timeline(data: ReportData) -> Markup | None:
    processes = [process for run in data.runs for process in run.processes]
    if not processes:
        return None
    axis = TimeAxis([(run.started, run.ended) for run in data.runs], worker_timeline.LEFT, time_chart.RIGHT)
    return worker_timeline.render(worker_timeline.lanes(processes), axis)
