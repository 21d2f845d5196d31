"""Which of its descendants a process ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

from moray.batch.processes.descendants import end_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's process control")

SCRIPT = """
import subprocess
from moray.batch.processes.descendants import MARK, adopt_orphans, end_descendants, mark_descendants
adopt_orphans()
foreign = [subprocess.Popen(["sleep", "1000"]), subprocess.Popen(["sleep", "1000"], env={MARK: "theirs"})]
mark_descendants("ours")
subprocess.run(["bash", "-c", "setsid sleep 1000 & echo $! > orphan"], check=True)
end_descendants("ours", timeout_s=1e9)
print(*(process.poll() for process in foreign))
for process in foreign:
    process.kill()
"""


def test_those_with_the_mark_are_ended_and_nobody_waits_for_others(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == "None None\n"
    assert not Path(f"/proc/{(tmp_path / 'orphan').read_text().strip()}").exists()


def test_programs_are_ended_by_a_word_with_all_below_them(tmp_path: Path) -> None:
    """They stand for a Ray in a folder, and for its workers, which write their titles over their arguments."""
    word = str(tmp_path / "moray-0123456789abcdef")
    script = "sleep 1000 & echo $!; wait"
    named = subprocess.Popen(["bash", "-c", script, f"--temp-dir={word}"], stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen(["sleep", "1000"])
    try:
        assert named.stdout is not None
        below = int(named.stdout.readline())
        end_programs(word, timeout_s=PATIENCE_S)
        assert named.wait(PATIENCE_S) == -signal.SIGKILL
        assert other.poll() is None
        assert not Path(f"/proc/{below}/cmdline").exists() or not Path(f"/proc/{below}/cmdline").read_bytes()
    finally:
        for process in (named, other):
            process.kill()
            process.communicate()
