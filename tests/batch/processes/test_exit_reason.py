"""The texts that explain why a process ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moray.batch.processes.exit_reason import OomKills, describe_exit, read_exit_status


@pytest.mark.parametrize(
    ("status", "oom_kills", "expected"),
    [
        (3 << 8, 0, "exited with code 3"),
        (signal.SIGSEGV, None, "was killed by SIGSEGV"),
        (signal.SIGABRT | 0x80, 1, "was killed by SIGABRT"),  # with a core dump
        (signal.SIGKILL, 0, "was killed by SIGKILL"),
        (signal.SIGKILL, 1, "was killed by SIGKILL, just when the kernel killed for lack of memory"),
        (signal.SIGKILL, None, "was killed by SIGKILL, perhaps by the kernel for lack of memory (dmesg says so then)"),
        (63, 0, "was killed by signal 63"),
    ],
)
def test_words(status: int, oom_kills: int | None, expected: str) -> None:
    assert describe_exit(status, oom_kills) == expected


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_status_of_one_that_nobody_has_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert read_exit_status(process.pid) is None, "it lives"
        process.send_signal(signal.SIGSEGV)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        status = read_exit_status(process.pid)
        assert status is not None and os.WTERMSIG(status) == signal.SIGSEGV
    assert read_exit_status(process.pid) is None, "it is gone"


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/pod/job\n", "sys/fs/cgroup/pod/job/memory.events"),
        ("5:cpu:/a\n4:memory:/pod\n", "sys/fs/cgroup/memory/pod/memory.oom_control"),
        ("4:memory:/of/the/host\n", "sys/fs/cgroup/memory/memory.oom_control"),
        ("0::/\n", "proc/vmstat"),
    ],
)
def test_kills_for_lack_of_memory_are_counted(tmp_path: Path, group: str, file: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("oom 9\noom_kill 4\n")
    kills = OomKills(tmp_path)
    assert kills.recent == 0
    (tmp_path / file).write_text("oom 9\noom_kill 6\n")
    assert kills.recent == 2
    for _ in range(2):
        kills.sample(0.0)
    assert kills.recent == 0, "those were long ago"


def test_where_nothing_counts_them(tmp_path: Path) -> None:
    assert OomKills(tmp_path).recent is None
