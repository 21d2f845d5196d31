"""Hold: a job that does not get past a point before its test lets it, however fast the machine is.

The job's processes are real; they wait where the test says, as on a machine that stalls there. What makes them wait is
an audit hook of Python's, in held/sitecustomize.py, which they import at their start.
"""

import os
from pathlib import Path

import pytest
from moray_run import MorayRun

from moray.batch.processes.process import start_time

HELD = Path(__file__).parent / "held"
POINTS = ("prepare", "worker", "commit", "raylet")


class Hold:
    """Where the processes of the jobs below a folder wait. The points:

    prepare:  before a shard is read
    worker:   before the rows of a shard go into the engine that has been admitted
    commit:   between the writing of a part and its publication
    raylet:   before a driver that starts a Ray of its own starts the raylet; the GCS runs

    A process that has come to a point waits while the output folder, `out`, has as many parts as the test allows; for
    the batches of an endpoint `out` is its store, and the parts of all of them count.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Jobs that are started from now on, and nodes for them, heed it."""
        self._folder = folder / "held"
        self._folder.mkdir()
        monkeypatch.setenv("MORAY_TEST_HOLD", str(self._folder))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HELD), *os.environ.get("PYTHONPATH", "").split()]))

    def at(self, num_parts: int, *points: str) -> None:
        """Have nobody past these points once there are so many parts."""
        for point in points:
            written = self._folder / f"{point}.new"
            written.write_text(str(num_parts))
            written.rename(self._folder / point)

    def release(self, *points: str) -> None:
        """Let all processes past these points; past all of them where none is named."""
        for point in points or POINTS:
            (self._folder / point).unlink(missing_ok=True)

    def at_parts(self, run: MorayRun, more: int = 1) -> None:
        """Wait until the run has so many more parts and has told of all, and the next one is written and waits."""
        wanted = len(run.parts()) + more
        self.at(wanted, "commit")
        run.wait_for(lambda: self.waiting("commit") and wanted <= len(run.parts()) == len(run.told_commits()))

    def waiting(self, point: str) -> list[int]:
        """Processes that wait there."""
        found = (int(path.name.rpartition("-")[2]) for path in self._folder.glob(f"{point}-*"))
        return [pid for pid in found if start_time(pid)]
