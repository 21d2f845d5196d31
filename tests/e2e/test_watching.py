"""A job watched from all sides: its status, its events, and what Prometheus gets of it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import job_metrics
import pytest
from dashboards import emitted, in_dashboard
from made_jobs import make_spec, write_input
from watcher import Watcher

from moray.batch.runtime.driver import JobResult, run_job
from moray.engine.metrics import Metrics, prometheus_name

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

NAME = "watched & more"
ROWS = 80  # more than a second of work: a worker tells of itself once in each


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> tuple[Path, JobResult, Watcher]:
    """A job with a long shared prefix and too little cache, which has run: it finds prefixes and preempts."""
    folder = tmp_path_factory.mktemp("watched")
    prompts = ["one two three four five six seven eight nine ten and then " + str(i) for i in range(ROWS)]
    write_input(folder / "in/a.parquet", {"prompt": [*prompts, None]})
    sampling = {"max_tokens": 150, "ignore_eos": True}
    engine = {"max_num_seqs": 8, "kv_cache_memory": 1 << 19}
    watcher = Watcher()
    result = run_job(make_spec(folder, name=NAME, sampling=sampling, engine=engine), display=watcher)
    return folder, result, watcher


def test_the_status_tells_of_workers_while_it_runs(watched: tuple[Path, JobResult, Watcher]) -> None:
    _, result, watcher = watched
    assert result.exit_code == 0
    running = [status for status in watcher.statuses if status.workers]
    assert {status.workers for status in running} == {1}
    assert 0 < max(status.busy for status in running) <= 1 and 0 < max(status.kv_use for status in running) <= 1
    assert any(status.workers_starting for status in watcher.statuses)
    assert max(status.prompt_tokens_per_s for status in running) > 0
    assert any(status.eta_s is not None for status in running)
    end = result.status
    assert (end.workers, end.workers_starting, end.eta_s) == (0, 0, None)
    assert 0 < end.busy <= 1 and 0 < end.kv_use < 1 and end.card_s == 0.0
    assert 0 < end.worker_s < end.elapsed_s


def test_events_have_the_figures_once_at_the_end_of_a_short_run(watched: tuple[Path, JobResult, Watcher]) -> None:
    folder, result, _ = watched
    (file,) = (folder / "out/_job/events").glob("*.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    figures: dict[str, Any] = [event for event in events if event["event"] == "figures"][-1]
    assert events.index(figures) == len(events) - 2 and events[-1]["event"] == "ended"
    assert figures.keys() == {
        "at", "event", "rows_done", "failed_rows", "prompt_tokens", "generated_tokens", "workers",
    }  # fmt: skip
    assert (figures["rows_done"], figures["failed_rows"]) == (ROWS + 1, 1)
    assert figures["generated_tokens"] == result.status.generated_tokens == 150 * ROWS
    (worker,) = figures["workers"]
    assert worker.keys() == {
        "actor", "node", "seqs", "waiting_seqs", "busy", "kv_use", "cached_tokens", "computed_tokens", "preemptions",
    }  # fmt: skip
    assert worker["seqs"] == 0 and worker["preemptions"] > 0 and worker["cached_tokens"] > 0
    assert worker["computed_tokens"] >= 150 * (ROWS - 1)
    started = {event["actor"]: event["node"] for event in events if event["event"] == "actor_started"}
    assert started[worker["actor"]] == worker["node"]


def test_prometheus_gets_what_the_dashboard_shows(watched: tuple[Path, JobResult, Watcher]) -> None:
    _, result, _ = watched
    at_the_end = {
        ("rows", "ok"): ROWS,
        ("rows", "failed"): 1,
        ("rows", "pending"): 0,
        ("errors", "null_input"): 1,
        ("cut_rows",): 0,
        ("workers", "alive"): 0,  # the driver is this process, and lives on
        ("seqs",): 0,
        ("worker_seconds",): result.status.worker_s,
        ("prompt_tokens_total",): result.status.prompt_tokens,
        ("generated_tokens_total",): 150 * ROWS,
    }
    text = job_metrics.wait_for(NAME, at_the_end)
    not_counted = {"ray_moray_lowered_limits_total"}  # no step of this job was short of memory
    assert in_dashboard("moray-jobs.json") - emitted(text) == not_counted
    assert {f"ray_{prometheus_name(field.name)}_total" for field in fields(Metrics)} <= in_dashboard("moray-jobs.json")


def test_what_workers_held_counts_on_in_the_next_run(watched: tuple[Path, JobResult, Watcher]) -> None:
    folder, result, _ = watched
    again = run_job(make_spec(folder, name=NAME, sampling={"max_tokens": 150, "ignore_eos": True}))
    assert again.did_nothing and again.status.worker_s == result.status.worker_s
