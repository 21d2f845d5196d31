"""Explains why a process ended: an exit code, a signal, or the kernel because of too little memory."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path


def describe_exit(status: int, oom_kills: int | None) -> str:
    """Return how a process ended, such as `exited with code 1`.

    status:     as waitpid returns it
    oom_kills:  how many processes the kernel killed recently for lack of memory; None = not known
    """
    if os.WIFEXITED(status):
        return f"exited with code {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    if number != signal.SIGKILL:
        return f"was killed by {_name(number)}"
    if oom_kills is None:
        return "was killed by SIGKILL, perhaps by the kernel for lack of memory (dmesg says so then)"
    return "was killed by SIGKILL" + (", just when the kernel killed for lack of memory" if oom_kills else "")


def read_exit_status(pid: int) -> int | None:
    """Return the exit status, as waitpid returns it, of a process that is dead and not reaped; None where not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[49]) if fields[0] in "ZX" else None
    except (OSError, IndexError, ValueError):
        return None


class OomKills:
    """Counts the processes that the kernel killed for lack of memory.

    They are those of this control group or, where that is not known, of the machine.

    root:  root of the file system
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._previous = self._current = self._read()
        self._due_s = time.monotonic()

    def sample(self, every_s: float) -> None:
        """Read the count, when that is due, and forget the one before the last."""
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + every_s
            self._previous, self._current = self._current, self._read()

    @property
    def recent(self) -> int | None:
        """Return how many were killed since the sample before the last one; None = nothing here counts them."""
        now = self._read()
        return None if now is None or self._previous is None else now - self._previous

    def _read(self) -> int | None:
        for path in self._paths():
            with suppress(OSError):
                if found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE):
                    return int(found[1])
        return None

    def _paths(self) -> list[Path]:
        """Return the files that may have the count, best first: control groups of version 2, of version 1, machine."""
        groups = ""
        with suppress(OSError):
            groups = (self._root / "proc/self/cgroup").read_text()
        v2 = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
        v1 = re.search(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)$", groups, re.MULTILINE)
        mounted = self._root / "sys/fs/cgroup"
        return [
            *([] if v2 is None else [mounted / v2[1] / "memory.events"]),
            *([] if v1 is None else [mounted / "memory" / v1[1] / "memory.oom_control"]),
            mounted / "memory/memory.oom_control",  # in a container that sees only its own group
            self._root / "proc/vmstat",
        ]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
