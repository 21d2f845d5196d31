"""The journal of a process that was killed is read by the process that replaces it."""

import subprocess
import sys
from pathlib import Path

from moray.batch.worker.journal import Journal
from moray.batch.worker.quarantine import RowsInFlight

WRITE = """
import os, sys
from pathlib import Path
from moray.batch.worker.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.write([(2, number) for number in range(600)], is_trial=False)
journal.write([(2, 7), (3, 1)], is_trial=False)
if len(sys.argv) > 2:
    journal.write([(3, 1)], is_trial=True)
os.kill(os.getpid(), 9)
"""


def kill(path: Path, *arguments: str) -> None:
    assert subprocess.run([sys.executable, "-c", WRITE, path, *arguments], check=False).returncode == -9


def test_what_was_in_flight_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    kill(path)
    assert Journal(path).lost_rows == RowsInFlight([(2, 7), (3, 1)], is_trial=False)
    assert Journal(path).lost_rows is None, "its rows are blamed once"
    kill(path, "alone")
    assert Journal(path).lost_rows == RowsInFlight([(3, 1)], is_trial=True)


def test_a_worker_that_was_idle_blames_nobody(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    journal = Journal(path)
    assert journal.lost_rows is None
    journal.write([(1, 1)], is_trial=True)
    journal.write([], is_trial=False)
    assert Journal(path).lost_rows is None
    for content in (b"", b"{", b"{}\n", b'{"rows": 3}\n', b"\xff\n"):
        path.write_bytes(content)
        assert Journal(path).lost_rows is None
