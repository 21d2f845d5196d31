"""Many rows: the driver's memory does not grow with them."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_jobs import make_spec, write_input

from moray.batch.runtime.driver import run_job
from moray.batch.status.status import Status

pytestmark = [pytest.mark.usefixtures("one_cpu"), pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

ROWS = 10_000
GROWTH_MB = 10.0  # of 40 MB that go through


class MemoryWatcher:
    """Notes this process's memory with each status."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []  # rows committed, MB

    def note(self, message: str) -> None: ...

    def update(self, status: Status) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.seen.append((status.ok_rows, pages * 4096 / 1e6))


@pytest.mark.slow
def test_the_drivers_memory_stays_flat(tmp_path: Path) -> None:
    for n in range(4):
        prompts = [f"{n} and {i} more" for i in range(ROWS // 4)]
        write_input(tmp_path / f"in/{n}.parquet", {"prompt": prompts, "note": ["x" * 4000] * len(prompts)})
    watcher = MemoryWatcher()
    result = run_job(make_spec(tmp_path, sampling={"max_tokens": 2, "ignore_eos": True}), display=watcher)
    assert (result.status.ok_rows, result.status.failed_rows) == (ROWS, 0)
    assert sum(pq.read_metadata(part).num_rows for part in (tmp_path / "out").glob("*.parquet")) == ROWS
    begun = next(megabytes for done, megabytes in watcher.seen if done > 0)
    assert max(megabytes for _, megabytes in watcher.seen) - begun < GROWTH_MB, summary(watcher.seen)


def summary(seen: list[tuple[int, float]]) -> Any:
    return seen[:: max(1, len(seen) // 20)]
