"""The journal is read by the process that comes after one that was killed."""

import subprocess
import sys
from pathlib import Path

from batch.faults.quarantine import InFlight
from batch.stages.journal import Journal

WRITE = """
import os, sys
from pathlib import Path
from batch.stages.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.write([(2, number) for number in range(600)], is_alone=False)
journal.write([(2, 7), (3, 1)], is_alone=False)
if len(sys.argv) > 2:
    journal.write([(3, 1)], is_alone=True)
os.kill(os.getpid(), 9)
"""


def kill(path: Path, *arguments: str) -> None:
    assert subprocess.run([sys.executable, "-c", WRITE, path, *arguments], check=False).returncode == -9


def test_what_was_in_flight_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    kill(path)
    assert Journal(path).died == InFlight([(2, 7), (3, 1)], is_alone=False)
    assert Journal(path).died is None, "what was read is blamed once"
    kill(path, "alone")
    assert Journal(path).died == InFlight([(3, 1)], is_alone=True)


def test_a_worker_that_was_idle_blames_nobody(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    journal = Journal(path)
    assert journal.died is None
    journal.write([(1, 1)], is_alone=True)
    journal.write([], is_alone=False)
    assert Journal(path).died is None
    for content in (b"", b"{", b"{}\n", b'{"rows": 3}\n', b"\xff\n"):
        path.write_bytes(content)
        assert Journal(path).died is None
