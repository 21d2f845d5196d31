"""Output folders that cannot be written, from the start or from some moment on."""

import random
from pathlib import Path

import pytest
from made_jobs import make_spec, read_output, write_input
from small_disk import small_disk
from watcher import Watcher

from moray.batch.forecast.job_forecast import ForecastOptions
from moray.batch.ledger import State
from moray.batch.output.verify import verify
from moray.batch.plan.planner import plan_job
from moray.batch.report import write_report
from moray.batch.runtime.driver import retry_job, run_job
from moray.engine.errors import OutputError
from moray.jobs.views import plan_values
from moray.jobs.views import status as status_view

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


def test_a_folder_that_is_read_only_is_refused_before_anything_starts(tmp_path: Path, watcher: Watcher) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        disk.remount("ro")
        with pytest.raises(OutputError, match=r"/disk/out cannot be written: Read-only file system"):
            run_job(make_spec(tmp_path, output={"path": str(disk.path / "out")}), display=watcher)
        assert (watcher.statuses, watcher.notes) == ([], [])


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    (tmp_path / "out").write_bytes(b"")
    spec, out = make_spec(tmp_path), str(tmp_path / "out")
    for use in (
        lambda: run_job(spec),
        lambda: retry_job(spec),
        lambda: plan_values.describe(plan_job(spec), ForecastOptions()),
        lambda: verify(out),
        lambda: write_report(out),
        lambda: status_view.explain_missing_status(out),
    ):
        with pytest.raises(OutputError, match=r"/out is a file, or lies in one; the output of a job is a folder$"):
            use()


@pytest.mark.slow
@pytest.mark.usefixtures("one_cpu")
def test_a_disk_that_is_full_ends_the_job_and_with_room_it_goes_on(tmp_path: Path) -> None:
    """Some parts fit. What is kept of the input cannot be compressed."""
    letters = random.Random(0)
    texts = ["".join(map(chr, letters.choices(range(33, 1000), k=2000))) for _ in range(160)]
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} lions" for i in range(160)], "text": texts})
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        out = disk.path / "out"
        spec = make_spec(tmp_path, output={"path": str(out)})
        result = run_job(spec)
        status = result.status
        assert (status.state, result.exit_code) == (State.FAILED, 1)
        assert status.reason is not None
        assert " cannot be written: No space left on device; its disk has " in status.reason
        assert "of 262,144 bytes free. Make room and run the job again." in status.reason
        assert 0 < status.committed_shards == len(list(out.glob("*.parquet"))) < 10
        assert list((out / "_job/tmp").iterdir()) == []
        found = verify(str(out))
        assert (found.problems, found.pending) == ([], status.pending_rows)

        disk.remount("size=8m")
        result = run_job(spec)
        assert (result.exit_code, result.status.ok_rows) == (0, 160)
        assert verify(str(out)).closes and list((out / "_job/tmp").iterdir()) == []
        assert [row["text"] for row in read_output(disk.path)] == texts
