"""The page: facts -> HTML by report.html, with autoescape on and without a script."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batch.output.tally import EDGES, Histogram
from batch.quantities import count, duration
from batch.report import heat_map, histogram_chart, time_chart, worker_timeline
from batch.report.comparison import compare
from batch.report.curves import loads, speeds
from batch.report.facts import Facts
from batch.report.summary import describe, find_notes
from batch.report.time_axis import TimeAxis
from batch.report.time_chart import Series
from batch.report.words import amount, milliseconds, percent, time, visible, whole

MAX_DEATHS = 50
MAX_RUNS = 100
_HISTOGRAMS = {
    "latency_ms": ("Latency of rows", "in the engine, from admission to the end", milliseconds),
    "prompt_tokens": ("Tokens of prompts", "a row", whole),
    "generated_tokens": ("Generated tokens", "a sample", whole),
    "continuation_tokens": ("Tokens of continuations", "each", whole),
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
            about=list(describe(facts)),
            notes=list(find_notes(facts)),
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
            machine=worker_timeline.machine,
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


def _time_charts(facts: Facts) -> list[Markup]:
    runs = facts.runs
    fast = [speeds(run, facts.tokens_of, facts.rows_of) for run in runs]
    full = [loads(run) for run in runs]
    if not any(fast):
        return []
    axis = TimeAxis([(run.first_ready, run.ended) for run in runs], time_chart.LEFT, time_chart.RIGHT)
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
    return worker_timeline.draw(worker_timeline.lanes(lives), axis)
