"""The processes of ranks other than 0, as the system shows them."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import PATIENCE_S


def ranks_below(ancestor: int) -> set[int]:
    """Return the processes of ranks among the descendants of a process."""
    parents: dict[int, int] = {}
    ranks = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"follower import main" in (folder / "cmdline").read_bytes():
                ranks.add(pid)
        except OSError:
            continue

    def is_below(pid: int) -> bool:
        while (parent := parents.get(pid)) is not None:
            if parent == ancestor:
                return True
            pid = parent
        return False

    return {pid for pid in ranks if is_below(pid)}


@contextmanager
def watched_ranks() -> Iterator[set[int]]:
    """Collect the ranks that run below this process meanwhile, and wait for their end.

    They end with their engine, which a thread that is about to end may still hold.
    """
    seen, is_over = set[int](), threading.Event()

    def look() -> None:
        while not is_over.wait(0.05):
            seen.update(ranks_below(os.getpid()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
    end_s = time.monotonic() + PATIENCE_S
    while left := {pid for pid in seen if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < end_s, f"ranks are still there: {left}"
        gc.collect()
        time.sleep(0.05)
