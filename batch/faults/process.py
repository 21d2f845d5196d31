"""Processes of this machine, told apart although their ids are used again."""

import os
import signal
from pathlib import Path


def start_time(pid: int) -> str:
    """When the process was started, in ticks since the machine was; empty where there is no such process, or one that
    is dead and not yet buried."""
    if not Path("/proc/self/stat").exists():
        return _unknown_start(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    except OSError:
        return ""
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else started


def is_alive(pid: int, started: str) -> bool:
    """Whether it is there, and the one that was started then."""
    return started != "" and start_time(pid) == started


def end_process(pid: int, started: str, *, kill: bool) -> bool:
    """Kill it, or only look. Returns whether it was there."""
    found = is_alive(pid, started)
    if found and kill:
        os.kill(pid, signal.SIGKILL)  # one that is stopped or stuck in the kernel heeds no other
    return found


def _unknown_start(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
