"""Runs, worker processes and time series from events: restarts, deaths, incomplete lines, pauses."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from made_report import BEGIN, Events

from moray.batch.output.folder import OutputFolder
from moray.batch.report.events import RunEvents, read_runs
from moray.batch.report.time_series import MAX_INTERVALS, loads, speeds


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(tmp_path, "run0")


def the_run(folder: Path) -> RunEvents:
    (run,) = read_runs(OutputFolder(str(folder)))
    return run


def second(run: RunEvents, at: Any) -> float:
    return float((at - BEGIN).total_seconds())


def test_a_run_from_begin_to_end(tmp_path: Path, events: Events) -> None:
    events.add(0, "started", rows=50, pending=30, versions={"ray": "1"})
    events.worker("a", 1, 5)
    events.add(3, "log", actor="a", message="loaded")
    events.add(7, "committed", shard=4, ok=9, failed=1)
    events.add(8, "ray", report="a node was lost")
    events.add(9, "experts", actor="a", tokens=[[1, 2]])
    events.add(9.5, "ended", state="CANCELLED", reason="SIGINT", pending=20)
    run = the_run(tmp_path)
    assert (run.name, run.state, run.reason, run.rows, run.pending) == ("run0", "CANCELLED", "SIGINT", 50, 30)
    assert (run.seconds, second(run, run.first_ready), run.versions) == (9.5, 5, {"ray": "1"})
    assert [(second(run, at), shard) for at, shard in run.commits] == [(7, 4)]
    assert [text for _, text in run.reports] == ["Ray: a node was lost"]
    assert run.expert_tokens == [[[1, 2]]]
    (process,) = run.processes
    assert (second(run, process.ended), process.has_died, process.about["dtype"]) == (9.5, False, "bfloat16")


def test_how_long_a_worker_was_ready(tmp_path: Path, events: Events) -> None:
    events.add(0, "started", rows=50, pending=30)
    events.worker("a", 1, 5)
    events.add(8, "committed", shard=0, ok=5, failed=0)
    assert the_run(tmp_path).ready_s == 3.0, "of a killed run, as of one of an older moray"
    events.add(9.5, "ended", state="SUCCEEDED", reason=None, pending=0, ready_s=4.25)
    assert the_run(tmp_path).ready_s == 4.25


def test_a_killed_run_has_no_state_and_its_torn_line_is_left_out(tmp_path: Path, events: Events) -> None:
    events.add(0, "started", rows=5, pending=5)
    events.add(4, "committed", shard=0, ok=5, failed=0)
    path = tmp_path / "_job/events/run0.jsonl"
    for junk in ('{"at": "2026-11-', "[]\n", '{"at": 7, "event": "x"}\n', '{"event": "ended"}\n', "\x00\xff\n"):
        path.write_text(path.read_text() + "\n" + junk)
    run = the_run(tmp_path)
    assert (run.state, run.seconds, len(run.commits)) == (None, 4, 1)


def test_deaths_with_and_without_a_word(tmp_path: Path, events: Events) -> None:
    events.worker("a", 0, 2)
    events.add(10, "actor_lost", stage="worker", actor="a", pid=1, rows=7, shard=3, row=4)
    events.worker("a", 10, 12)
    events.add(20, "actor_started", stage="worker", actor="a", node="n")
    events.add(21, "actor_started", stage="prepare", actor="p", node="n")
    events.add(30, "actor_started", stage="worker", actor="a", node="n")
    events.add(40, "ended", state="FAILED", reason="x", pending=1)
    lives = the_run(tmp_path).processes
    assert [(process.seconds, process.has_died, process.ready is not None) for process in lives] == [
        (10, True, True), (10, True, True), (10, True, False), (10, False, False),
    ]  # fmt: skip
    assert (lives[0].rows, lives[0].first_row, lives[1].rows) == (7, (3, 4), None)


def test_no_events(tmp_path: Path) -> None:
    assert read_runs(OutputFolder(str(tmp_path))) == []
    (tmp_path / "_job/events").mkdir(parents=True)
    (tmp_path / "_job/events/empty.jsonl").touch()
    assert read_runs(OutputFolder(str(tmp_path))) == []


def add_stats(events: Events, at: float, tokens: int, **more: Any) -> None:
    totals = {"cached_tokens": 0, "computed_tokens": 3 * tokens, "preemptions": 0}
    load = {"seqs": 4, "waiting_seqs": tokens, "busy": 0.5, "kv_use": 0.25}
    workers = [{"actor": "a", "node": "n"} | load | totals] * 2
    numbers = {"rows_done": tokens // 10, "failed_rows": 0, "prompt_tokens": 2 * tokens, "generated_tokens": tokens}
    events.add(at, "figures", **numbers, workers=more.get("workers", workers))


def test_speed_and_queue_from_figures(tmp_path: Path, events: Events) -> None:
    for step, tokens in enumerate((0, 100, 200, 100, 250, 600)):  # a worker dies and takes its tokens with it
        add_stats(events, 10 * step, tokens)
    run = the_run(tmp_path)
    fast = speeds(run, {}, {})
    assert [round(i.generated_tokens_per_s, 9) for i in fast] == [10, 10, 0, 5, 35]
    assert [round(i.prompt_tokens_per_s, 9) for i in fast] == [20, 20, 0, 10, 70]
    assert [i.rows_done for i in fast][-2:] == [25, 60]
    full = loads(run)
    assert [(second(run, i.start), second(run, i.end), i.waiting_seqs) for i in full][:2] == [
        (0, 10, 200), (10, 20, 400),
    ]  # fmt: skip
    assert {(i.seqs, i.busy, i.kv_use) for i in full} == {(8, 0.5, 0.25)}


def test_figures_of_a_run_that_still_starts_are_its_begin(tmp_path: Path, events: Events) -> None:
    events.add(0, "started", rows=40, pending=30)
    events.worker("a", 0, 25)
    for step in range(8):
        add_stats(events, 10 * step, 0 if step < 3 else 100 * (step - 2))
    run = the_run(tmp_path)
    fast = speeds(run, {}, {})
    assert second(run, fast[0].start) == 25 and second(run, fast[-1].end) == 70
    assert sum(i.generated_tokens_per_s for i in fast) * 45 / len(fast) == pytest.approx(500)


def test_many_figures_become_few_intervals(tmp_path: Path, events: Events) -> None:
    for step in range(500):
        add_stats(events, step, 100 * step)
    run = the_run(tmp_path)
    fast, full = speeds(run, {}, {}), loads(run)
    assert len(fast) == MAX_INTERVALS and 100 <= len(full) <= MAX_INTERVALS
    assert {round(i.generated_tokens_per_s, 3) for i in fast} == {100}
    assert (full[0].start, full[-1].end) == (run.stats[0][0], run.stats[-1][0])


def test_speed_from_commits_where_there_are_few_figures(tmp_path: Path, events: Events) -> None:
    events.add(0, "started", rows=40, pending=30)
    events.worker("a", 0, 10)
    add_stats(events, 15, 7)
    for shard in range(3):
        events.add(20 + 10 * shard, "committed", shard=shard, ok=10, failed=0)
    run = the_run(tmp_path)
    fast = speeds(run, dict.fromkeys(range(3), (50, 20)), dict.fromkeys(range(3), 10))
    assert [(round(i.prompt_tokens_per_s, 6), round(i.generated_tokens_per_s, 6), i.rows_done) for i in fast] == [
        (5, 2, 20), (5, 2, 30), (5, 2, 40),
    ]  # fmt: skip


def test_a_retry_and_a_run_without_commits_have_no_speed(tmp_path: Path, events: Events) -> None:
    events.add(0, "started", rows=40, pending=30, is_retry=True)
    for step in range(9):
        events.add(step, "committed", shard=step, ok=10, failed=0)
    assert speeds(the_run(tmp_path), {0: (1, 1)}, {0: 1}) == []
    Events(tmp_path, "run1").add(99, "started", rows=4, pending=4)
    idle = read_runs(OutputFolder(str(tmp_path)))[1]
    assert speeds(idle, {}, {}) == [] and loads(idle) == []


def test_runs_are_in_order_of_time(tmp_path: Path) -> None:
    for name, at in (("b", 0), ("a", 100)):
        Events(tmp_path, name).add(at, "started", rows=1, pending=1)
    runs = read_runs(OutputFolder(str(tmp_path)))
    assert [run.name for run in runs] == ["b", "a"]
    assert runs[1].started - runs[0].started == timedelta(seconds=100)
