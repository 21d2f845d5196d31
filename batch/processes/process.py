"""Identifies processes of this machine by id and start time, because ids are used again."""

import os
import signal
from pathlib import Path


def start_time(pid: int) -> str:
    """Return the start time of a process, in ticks since the machine was started.

    Returns an empty text where there is no such process, or one that is dead and not reaped yet.
    """
    if not Path("/proc/self/stat").exists():
        return _unknown_start(pid)
    try:
        # the process name before it may contain anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else started


def is_alive(pid: int, started: str) -> bool:
    """Return whether the process with this id is alive and is the one that was started then."""
    return started != "" and start_time(pid) == started


def end_process(pid: int, started: str, *, kill: bool) -> bool:
    """Kill the process if `kill` is set; return whether it was alive."""
    is_there = is_alive(pid, started)
    if is_there and kill:
        os.kill(pid, signal.SIGKILL)  # a process that is stopped or stuck in the kernel ignores every other signal
    return is_there


def _unknown_start(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
