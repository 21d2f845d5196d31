"""What a job tells: numbers that add up, speed by a clock of ours, files no more often than they should be."""

import json
import shutil
from pathlib import Path

import pytest
from small_disk import small_disk

from batch.ledger import Committed, Counts, Ended, Ledger, Progress, State
from batch.output.folder import OutputFolder
from batch.output.status import Meter, Reporter


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(path: str, shards: tuple[int, ...] = (10, 10)) -> tuple[Reporter, Ledger, Clock]:
    ledger, clock = Ledger(shards), Clock()
    return Reporter("job", "run1", ledger, OutputFolder(path), clock), ledger, clock


def test_speed_is_that_of_the_last_half_minute() -> None:
    meter = Meter()
    for second in range(101):
        meter.mark(second, rows=second if second <= 50 else 50 + 3 * (second - 50), tokens=10 * second)
    assert meter.rates() == (3.0, 10.0)
    assert meter.rates(whole=True) == (2.0, 10.0)


def test_speed_starts_anew_when_work_was_lost() -> None:
    meter = Meter()
    for second, tokens in enumerate([0, 100, 200, 50, 60, 70]):
        meter.mark(second, rows=0, tokens=tokens)
    assert meter.rates() == (0.0, 10.0)


def test_no_time_has_no_speed() -> None:
    meter = Meter()
    assert meter.rates() == (0.0, 0.0)
    meter.mark(1.0, 5, 5)
    assert meter.rates() == meter.rates(whole=True) == (0.0, 0.0)


def test_a_job_that_scores_has_the_speed_of_its_prompts(tmp_path: Path) -> None:
    ledger, clock = Ledger((10,)), Clock()
    reporter = Reporter("job", "run1", ledger, OutputFolder(str(tmp_path)), clock, is_scoring=True)
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
    clock.now_s += 4
    ledger.handle(Committed(0, Counts(9, 1, 40, 80, errors={"too_long": 1})))
    ledger.handle(Progress(1, 2, 5, 16))
    status = reporter.status()
    assert (status.rows_done, status.ok_rows, status.failed_rows, status.pending_rows) == (12, 9, 1, 10)
    assert (status.prompt_tokens, status.generated_tokens) == (45, 96)
    assert (status.tokens_per_s, status.elapsed_s) == (24.0, 4.0)
    assert status.eta_s == pytest.approx(8 / 3, abs=0.1)  # 8 rows at 3 a second
    assert status.errors == {"too_long": 1}
    clock.now_s += 4
    ledger.handle(Committed(1, Counts(10, 0, 40, 64)))
    ledger.handle(Ended())
    end = reporter.status()
    assert (end.state, end.eta_s, end.tokens_per_s, end.elapsed_s) == (State.SUCCEEDED, None, 18.0, 8.0)


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
    reporter.record("started", rows=20)
    reporter.record("committed", shard=1)
    lines = [json.loads(line) for line in (tmp_path / "_job/events/run1.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "at"} for line in lines] == [
        {"event": "started", "rows": 20},
        {"event": "committed", "shard": 1},
    ]
    assert all(line["at"].endswith("+00:00") for line in lines)


def test_a_full_disk_holds_up_the_status_but_not_the_job(tmp_path: Path) -> None:
    """What was told meanwhile is written when there is room, and no line is cut."""
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        reporter, *_ = make(str(disk.path))
        reporter.write(reporter.status(), at_once=True)
        reporter.record("begin")
        (disk.path / "big").write_bytes(b"x" * shutil.disk_usage(disk.path).free)
        for number in range(100):
            reporter.record("tick", number=number, text="x" * 100)
            reporter.write(reporter.status(), at_once=True)
        (disk.path / "big").unlink()
        reporter.record("end")
        lines = [json.loads(line) for line in (disk.path / "_job/events/run1.jsonl").read_text().splitlines()]
        assert [line.get("number", line["event"]) for line in lines] == ["begin", *range(100), "end"]
        assert json.loads((disk.path / "_job/status.json").read_text())["name"] == "job"


def test_an_object_store_is_written_every_ten_seconds(bucket: str) -> None:
    reporter, _, clock = make(f"s3://{bucket}/out")
    folder = OutputFolder(f"s3://{bucket}/out")
    for second in range(15):
        clock.now_s = 100.0 + second
        reporter.record("tick", second=second)
        reporter.write(reporter.status())
    status, events = folder.read("_job/status.json"), folder.read("_job/events/run1.jsonl")
    assert status is not None and json.loads(status)["elapsed_s"] == 10
    assert events is not None and [json.loads(line)["second"] for line in events.splitlines()] == list(range(11))
