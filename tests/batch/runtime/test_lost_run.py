"""The records of a run whose driver died without writing them, and which is not continued."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from made_jobs import make_spec

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Counts, Ledger, Progress
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import claim_folder
from moray.batch.output.lease import LEASE, Holder
from moray.batch.output.part import encode_part
from moray.batch.output.part_stats import PartStats
from moray.batch.run_events import RunStarted
from moray.batch.runtime.lost_run import record_restart, settle_lost_run
from moray.batch.shards import Plan, Shard, Slice
from moray.batch.status.restart import Restart
from moray.batch.status.status import Reporter, Status, read_status
from moray.batch.status.workers import Workers

PLAN = Plan(
    Fingerprint({"a.parquet": "x"}, {"task": "generate"}),
    (Shard(0, (Slice("a.parquet", 0, 3),)), Shard(1, (Slice("a.parquet", 3, 2),))),
)
RUN, OTHER = "20261122T065447Z-aaaa", "20261122T065448Z-bbbb"
WHY = "the driver was killed by SIGKILL; limits.restarts is 0"


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    """Return the folder of a run whose driver died before it could report the last of its commits.

    One of its two shards is committed.
    """
    folder = OutputFolder(str(tmp_path / "out"))
    claim_folder(folder, make_spec(tmp_path), PLAN)
    ledger = Ledger([3, 2])
    reporter = Reporter("test", RUN, ledger, folder, lambda: 1.0, Workers())
    reporter.record(RunStarted(5, 5))
    ledger.handle(Progress(0, 1, 2, 3))
    reporter.write(reporter.status())
    commit(folder, PLAN.shards[0])
    leave_lease(folder, RUN, pid=0)
    return folder


def commit(folder: OutputFolder, shard: Shard) -> None:
    rows = shard.num_rows
    counts = Counts(ok=rows, prompt_tokens=4 * rows, generated_tokens=8 * rows)
    content = encode_part(
        pa.table({"x": range(rows)}), PLAN.fingerprint.hexdigest, shard.index, counts, PartStats(Counter(), {}), {}
    )
    folder.write(PLAN.part_name(shard), content)


def leave_lease(folder: OutputFolder, run: str, pid: int) -> None:
    holder = {**vars(Holder.this_process(run))} | ({} if pid else {"pid": 1, "started": "0"})
    folder.write(LEASE, json.dumps(holder).encode())


def settle(folder: OutputFolder, tmp_path: Path, **options: object) -> Status | None:
    given: dict[str, object] = {"signal": None, "restarts": 0} | options
    return settle_lost_run(folder.path, RUN, make_spec(tmp_path), WHY, **given)  # type: ignore[arg-type]


def events(folder: OutputFolder, run: str = RUN) -> list[dict[str, object]]:
    content = folder.read(f"_job/events/{run}.jsonl") or b""
    return [{k: v for k, v in json.loads(line).items() if k != "at"} for line in content.splitlines()]


def test_it_failed_and_what_was_committed_counts(tmp_path: Path, folder: OutputFolder) -> None:
    status = settle(folder, tmp_path, restarts=2)
    assert status is not None and (status.state, status.reason, status.exit_code) == ("FAILED", WHY, 1)
    assert (status.ok_rows, status.pending_rows, status.committed_shards, status.generated_tokens) == (3, 2, 1, 24)
    assert status.restarts == 2
    found = read_status(folder)
    assert found is not None and found[0] == status
    assert events(folder)[1:] == [
        {"event": "driver_lost", "reason": WHY, "will_restart": False},
        {"event": "ended", "state": "FAILED", "reason": WHY, "pending": 2},
    ]
    assert folder.read(LEASE) is None
    assert settle(folder, tmp_path) == status, "a second time changes nothing"


def test_after_a_signal_it_was_cancelled(tmp_path: Path, folder: OutputFolder) -> None:
    status = settle(folder, tmp_path, signal="SIGTERM")
    assert status is not None and (status.state, status.reason, status.exit_code) == ("CANCELLED", "SIGTERM", 143)


def test_when_all_was_committed_it_succeeded(tmp_path: Path, folder: OutputFolder) -> None:
    commit(folder, PLAN.shards[1])
    status = settle(folder, tmp_path)
    assert status is not None and (status.state, status.reason, status.pending_rows) == ("SUCCEEDED", None, 0)


def test_a_retry_that_was_cut_short_is_no_success(tmp_path: Path, folder: OutputFolder) -> None:
    commit(folder, PLAN.shards[1])
    status = settle(folder, tmp_path, is_retry=True)
    assert status is not None and (status.state, status.reason, status.pending_rows) == ("FAILED", WHY, 0)


def test_one_that_died_before_its_first_status(tmp_path: Path, folder: OutputFolder) -> None:
    for before in ("", "20261122T065446Z-cccc"):
        folder.remove("_job/status.json")
        if before:
            Reporter("test", before, ledger := Ledger([3, 2]), folder, lambda: 1.0, Workers()).write(
                Reporter("test", before, ledger, folder, lambda: 1.0, Workers()).status()
            )
        status = settle(folder, tmp_path)
        assert status is not None and (status.run, status.name, status.state) == (RUN, "test", "FAILED")


def test_warnings_of_the_plan_are_kept_where_no_status_was_written(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path / "out"))
    claim_folder(folder, make_spec(tmp_path), replace(PLAN, warnings=("1 empty file is left out",)))
    status = settle(folder, tmp_path)
    assert status is not None and status.warnings == ("1 empty file is left out",)
    found = read_status(folder)
    assert found is not None and found[0].warnings == status.warnings


def test_the_folder_of_another_run_is_left_alone(tmp_path: Path, folder: OutputFolder) -> None:
    leave_lease(folder, OTHER, pid=1)
    assert settle(folder, tmp_path) is None
    found = read_status(folder)
    assert found is not None and found[0].state == "RUNNING" and len(events(folder)) == 1


def test_a_restart_is_written_after_the_events_of_the_run(folder: OutputFolder) -> None:
    folder.write(f"_job/events/{RUN}.jsonl", (folder.read(f"_job/events/{RUN}.jsonl") or b"") + b'{"half')
    record_restart(folder, Restart(1, WHY, RUN, "", 0.0))
    assert [event["event"] for event in events(folder)] == ["started", "driver_lost"]
    record_restart(folder, Restart(1, WHY, OTHER, "", 0.0))
    assert events(folder, OTHER) == [{"event": "driver_lost", "reason": WHY, "will_restart": True}]
