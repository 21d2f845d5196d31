"""The reports of a job: numbers that add up, speed by a clock of the test's own, and writes only when they are due."""

import json
import shutil
from pathlib import Path

import pytest
from small_disk import small_disk

from moray.batch.ledger import Committed, Counts, Ended, Ledger, Progress, State
from moray.batch.output.folder import OutputFolder
from moray.batch.run_events import ActorReady, ActorStarted, LogLine, RayReport, RunStarted, ShardCommitted
from moray.batch.status.restart import Restart
from moray.batch.status.status import STATUS, Reporter, Status, read_status
from moray.batch.status.workers import Workers
from moray.batch.worker.stats import WorkerStats
from moray.engine.metrics import Metrics


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(path: str, shards: tuple[int, ...] = (10, 10)) -> tuple[Reporter, Ledger, Clock]:
    """Return a reporter with one worker."""
    ledger, clock, workers = Ledger(shards), Clock(), Workers(worker_s=3600.0)
    begin(workers, clock.now_s)
    return Reporter("job", "run1", ledger, OutputFolder(path), clock, workers), ledger, clock


def begin(workers: Workers, now_s: float) -> None:
    workers.on_event(ActorStarted("worker", "a", "n"), now_s)
    workers.on_event(ActorReady("worker", "a", 1, "n"), now_s)


def test_a_job_that_scores_has_the_speed_of_its_prompts(tmp_path: Path) -> None:
    ledger, clock = Ledger((10,)), Clock()
    reporter = Reporter("job", "run1", ledger, OutputFolder(str(tmp_path)), clock, Workers(), is_scoring=True)
    ledger.handle(Progress(0, 1, 10, 0))
    reporter.status()
    clock.now_s += 4
    ledger.handle(Progress(0, 5, 50, 0))
    assert (reporter.status().tokens_per_s, reporter.status().generated_tokens) == (10.0, 0)


def test_a_status_adds_up_and_says_when_it_will_be_over(tmp_path: Path) -> None:
    reporter, ledger, clock = make(str(tmp_path))
    first = reporter.status()
    assert (first.state, first.eta_s, first.tokens_per_s, first.pending_rows) == (State.PENDING, None, 0.0, 20)
    ledger.handle(Progress(0, 0, 0, 0))
    reporter.status()
    ledger.handle(Progress(1, 1, 5, 0))
    reporter.status()
    clock.now_s += 4
    ledger.handle(Committed(0, Counts(9, 1, 40, 80, errors={"too_long": 1})))
    ledger.handle(Progress(1, 2, 5, 16))
    status = reporter.status()
    assert (status.rows_done, status.ok_rows, status.failed_rows, status.pending_rows) == (12, 9, 1, 10)
    assert (status.prompt_tokens, status.generated_tokens) == (45, 96)
    assert (status.tokens_per_s, status.elapsed_s) == (24.0, 4.0)
    assert status.eta_s == pytest.approx(8 / (11 / 4), abs=0.1)  # 8 rows at 11 in 4 s
    assert (status.prompt_tokens_per_s, status.workers, status.worker_s) == (11.2, 1, 3604.0)
    assert status.errors == {"too_long": 1}
    clock.now_s += 4
    ledger.handle(Committed(1, Counts(10, 0, 40, 64)))
    ledger.handle(Ended())
    end = reporter.status()
    assert (end.state, end.eta_s, end.tokens_per_s, end.elapsed_s) == (State.SUCCEEDED, None, 18.0, 8.0)


def test_a_restart_of_the_driver_does_not_begin_the_job_anew(tmp_path: Path) -> None:
    clock, folder = Clock(), OutputFolder(str(tmp_path))
    first = Reporter("job", "run1", Ledger((10,)), folder, clock, Workers())
    clock.now_s += 30.0
    restart = Restart(1, "the driver was killed", "run1", "", first.began_s)
    second = Reporter("job", "run2", Ledger((10,)), folder, clock, Workers(), restart=restart)
    clock.now_s += 5.0
    assert (second.began_s, second.elapsed_s, second.job_elapsed_s) == (first.began_s, 5.0, 35.0)


def test_the_speed_of_a_run_is_over_the_time_in_which_a_worker_was_ready(tmp_path: Path) -> None:
    """The speed is that of this run's tokens, from when the worker was ready to the job's end.

    It makes no difference that the worker's event arrives last of all, or how late the status is read.
    """
    there = {0: Counts(ok=10, prompt_tokens=1000, generated_tokens=1000)}
    ledger, clock, workers = Ledger((10, 10), there), Clock(), Workers()
    reporter = Reporter("job", "run1", ledger, OutputFolder(str(tmp_path)), clock, workers)
    reporter.status()
    clock.now_s += 100
    ledger.handle(Committed(1, Counts(ok=10, prompt_tokens=20, generated_tokens=60)))
    ledger.handle(Ended())
    reporter.end()
    clock.now_s += 5
    reporter.end()
    begin(workers, 196.0)
    workers.end(clock.now_s)
    for _ in range(2):
        status = reporter.status()
        assert (status.prompt_tokens_per_s, status.tokens_per_s, status.elapsed_s) == (5.0, 15.0, 100.0)
        assert reporter.ready_s == 4.0
        clock.now_s += 1


def test_status_json_is_written_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    reporter, _, clock = make(str(tmp_path))
    path = tmp_path / "_job/status.json"
    for tenth in range(30):
        clock.now_s = 100.0 + tenth / 10
        reporter.write(reporter.status())
        assert json.loads(path.read_text())["elapsed_s"] == tenth // 10
    reporter.write(reporter.status(), at_once=True)
    written = json.loads(path.read_text())
    assert (written["elapsed_s"], written["state"], written["name"]) == (2.9, "PENDING", "job")
    assert written["input_rows"] == written["ok_rows"] + written["failed_rows"] + written["pending_rows"] == 20


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    reporter, *_ = make(str(tmp_path))
    reporter.record(RunStarted(20, 15))
    reporter.record(ShardCommitted(1, ok=4, failed=1))
    lines = [json.loads(line) for line in (tmp_path / "_job/events/run1.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "at"} for line in lines] == [
        {"event": "started", "rows": 20, "pending": 15, "is_retry": False, "versions": {}},
        {"event": "committed", "shard": 1, "ok": 4, "failed": 1},
    ]
    assert all(line["at"].endswith("+00:00") for line in lines)


def test_a_full_disk_holds_up_the_status_but_not_the_job(tmp_path: Path) -> None:
    """The reports made meanwhile are written when there is room, and no line is cut."""
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        reporter, *_ = make(str(disk.path))
        reporter.write(reporter.status(), at_once=True)
        reporter.record(RayReport("begin"))
        (disk.path / "big").write_bytes(b"x" * shutil.disk_usage(disk.path).free)
        for number in range(100):
            reporter.record(LogLine(str(number), "x" * 100))
            reporter.write(reporter.status(), at_once=True)
        (disk.path / "big").unlink()
        reporter.record(RayReport("end"))
        lines = [json.loads(line) for line in (disk.path / "_job/events/run1.jsonl").read_text().splitlines()]
        assert [line.get("actor", line.get("report")) for line in lines] == ["begin", *map(str, range(100)), "end"]
        assert json.loads((disk.path / "_job/status.json").read_text())["name"] == "job"


def test_an_object_store_is_written_every_ten_seconds(bucket: str) -> None:
    reporter, _, clock = make(f"s3://{bucket}/out")
    folder = OutputFolder(f"s3://{bucket}/out")
    for second in range(15):
        clock.now_s = 100.0 + second
        reporter.record(RayReport(str(second)))
        reporter.write(reporter.status())
    status, events = folder.read("_job/status.json"), folder.read("_job/events/run1.jsonl")
    assert status is not None and json.loads(status)["elapsed_s"] == 10
    assert events is not None and [json.loads(line)["report"] for line in events.splitlines()] == list(
        map(str, range(11))
    )


def test_a_change_of_state_is_written_at_once(bucket: str) -> None:
    reporter, ledger, clock = make(f"s3://{bucket}/out")
    reporter.write(reporter.status())
    ledger.handle(Committed(0, Counts(10)))
    clock.now_s += 1.0
    reporter.write(reporter.status())
    status = OutputFolder(f"s3://{bucket}/out").read("_job/status.json")
    assert status is not None and json.loads(status)["state"] == "RUNNING"


def test_many_events_are_written_to_an_object_store_less_often(bucket: str) -> None:
    reporter, _, clock = make(f"s3://{bucket}/out")
    folder, seen = OutputFolder(f"s3://{bucket}/out"), []
    for second in range(0, 101, 10):
        clock.now_s = 100.0 + second
        reporter.record(RayReport("x" * 1_000_000))
        reporter.write(reporter.status(), at_once=second == 100)
        events = folder.read("_job/events/run1.jsonl")
        assert events is not None
        seen.append(len(events.splitlines()))
    assert seen == [1, 1, 3, 3, 3, 3, 7, 7, 7, 7, 11]


def test_an_older_status_is_read_and_a_newer_one() -> None:
    old = {
        "name": "guide", "run": "20261121T221303Z-dded", "output": "out/guide", "state": "CANCELLED",
        "reason": "SIGINT", "input_rows": 306, "ok_rows": 63, "failed_rows": 1, "pending_rows": 242, "rows_done": 64,
        "shards": 20, "committed_shards": 4, "prompt_tokens": 615, "generated_tokens": 250, "tokens_per_s": 565.2,
        "elapsed_s": 54.6, "eta_s": None, "errors": {"empty_prompt": 1}, "updated_at": "2026-11-21T22:13:57.845+00:00",
    }  # fmt: skip
    status, updated = Status.from_json(json.dumps(old | {"what_comes_later": 1}))
    assert (status.state, status.exit_code, status.workers, status.eta_low_s) == (State.CANCELLED, 130, 0, None)
    assert updated.isoformat(timespec="milliseconds") == old["updated_at"]
    assert Status.from_json(status.to_json())[0] == status


def test_figures_are_recorded_every_ten_seconds_then_every_twenty(tmp_path: Path) -> None:
    ledger, clock, workers = Ledger((10, 10)), Clock(), Workers()
    begin(workers, clock.now_s)
    reporter = Reporter("job", "run1", ledger, OutputFolder(str(tmp_path)), clock, workers)
    ledger.handle(Committed(0, Counts(9, 1, 40, 80, errors={"too_long": 1})))
    for _ in range(3600 + 400):
        clock.now_s += 1
        totals = Metrics(cached_tokens=16, computed_tokens=32, busy_s=clock.now_s / 2)
        workers.update_stats(
            "a",
            WorkerStats(
                clock.now_s,
                rows=4,
                seqs=4,
                waiting_seqs=1,
                free_blocks=60,
                blocks=80,
                max_num_seqs=64,
                max_num_batched_tokens=512,
                totals=totals,
            ),
            clock.now_s,
        )
        reporter.record_stats()
    reporter.record_stats(at_once=True)
    events = [json.loads(line) for line in (tmp_path / "_job/events/run1.jsonl").read_text().splitlines()]
    assert len(events) == 360 + 20 + 1
    assert {key: value for key, value in events[1].items() if key != "at"} == {
        "event": "figures",
        "rows_done": 10,
        "failed_rows": 1,
        "prompt_tokens": 40,
        "generated_tokens": 80,
        "workers": [
            {
                "actor": "a", "node": "n", "seqs": 4, "waiting_seqs": 1, "busy": 0.5, "kv_use": 0.25,
                "cached_tokens": 16, "computed_tokens": 32, "preemptions": 0,
            }
        ],
    }  # fmt: skip


def test_what_is_no_status_is_none(tmp_path: Path) -> None:
    reporter, _, _ = make(str(tmp_path))
    folder = OutputFolder(str(tmp_path))
    assert read_status(folder) is None
    reporter.write(status := reporter.status())
    found, content = read_status(folder), folder.read(STATUS)
    assert found is not None and found[0] == status and content is not None
    for damaged in (b"", content[:100], b"{}", b"[]", b"null", b"\xff", b'{"state": "ASLEEP"}', b'{"state": "FAILED"}'):
        folder.write(STATUS, damaged)
        assert read_status(folder) is None, damaged
