"""Finds the processes that a child process started and left behind, by a mark, and ends them.

It works on Linux only; on other systems nothing is found.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MARK = "MORAY_RUN_TOKEN"  # environment variable that marks a process with a token
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, in place of the system's first process."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def mark_descendants(token: str) -> None:
    """Give the token to every program that this process starts from now on, and to those that they start."""
    os.environ[MARK] = token
    # otherwise Ray's processes, which set their titles, write them over their environment
    os.environ["SPT_NOENV"] = "1"


def end_descendants(token: str, timeout_s: float = 10.0) -> None:
    """Kill the descendants that carry the token, and wait until they are gone.

    Others are left alone: what a shell had started before it became this process, and orphans that a container's first
    process gets. Call adopt_orphans before: without it, only descendants whose parents live are found.
    """
    end_s = time.monotonic() + timeout_s
    left: set[int] = set()
    while time.monotonic() < end_s:
        _reap()
        children = _find_children()
        marked = {pid for pid in _find_below(os.getpid(), children) if _carries(pid, token)}
        for pid in marked:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        dying = {pid for pid in children.get(os.getpid(), ()) if _is_dying(pid)}
        left = {pid for pid in left | marked | dying if Path(f"/proc/{pid}").exists()}
        if not left:
            break
        time.sleep(0.01)


def end_programs(word: str, timeout_s: float = 5.0) -> None:
    """Kill the programs that have the word in an argument, and their descendants, and wait until they are gone.

    No other program may have the word in an argument: use the name of a folder with a random part.
    """
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        children = _find_children()
        all_pids = {pid for pids in children.values() for pid in pids} - {os.getpid()}
        named = [pid for pid in all_pids if word.encode() in _arguments(pid)]
        # parents first: they could start more processes
        found = [*named, *(pid for program in named for pid in _find_below(program, children))]
        if not found:
            break
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _arguments(pid: int) -> bytes:
    """Return the command line; empty where the process is gone, or gives up its memory."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def find_descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants of a process."""
    return _find_below(pid, _find_children())


def _find_below(pid: int, children: Mapping[int, list[int]]) -> list[int]:
    found, todo = [], [pid]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


def _find_children() -> dict[int, list[int]]:
    """Return the children of each process of the machine."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    return children


def _carries(pid: int, token: str) -> bool:
    """Return whether the process was started with the token."""
    try:
        return f"{MARK}={token}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _is_dying(pid: int) -> bool:
    """Return whether the process has given up its memory, and the mark with it, but still has threads or files.

    It may still hold a GPU, whose memory the next driver needs.
    """
    return Path(f"/proc/{pid}").exists() and not _arguments(pid)


def _reap() -> None:
    """Collect the exit statuses of the children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
