"""Every Python process that has this folder on its PYTHONPATH imports this at its start: see hold.py beside it."""

import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["MORAY_TEST_HOLD"])
EVERY_S = 0.01


def find_point(event: str, args: tuple[Any, ...]) -> str | None:
    """Which of hold.py's points a process has come to, by what Python tells its audit hooks."""
    if event == "pickle.find_class":  # a shard is unpacked, a shard's rows are
        point = {"Shard": "prepare", "SamplingParams": "worker"}.get(args[1]) if args[0].startswith("moray.") else None
        return None if point == "worker" and not is_worker() else point  # the forecast in prepare unpacks rows too
    if event == "os.rename":
        return "commit" if os.fspath(args[1]).rpartition("/")[2].startswith("part-") else None
    if event == "subprocess.Popen":
        return "raylet" if str(args[1][0]).endswith("/raylet") else None
    return None


def is_worker() -> bool:
    """Ray gives the processes of actors titles with the names of their classes."""
    return b"WorkerActor" in Path("/proc/self/cmdline").read_bytes()


def read_limit(point: str) -> float:
    try:
        return int((FOLDER / point).read_text())
    except (OSError, ValueError):  # not held, or not any more
        return float("inf")


def num_parts() -> int:
    return len(list((FOLDER.parent / "out").rglob("part-*.parquet")))


def hold(event: str, args: tuple[Any, ...]) -> None:
    if event not in EVENTS or (point := find_point(event, args)) is None:
        return
    waiting = FOLDER / f"{point}-{os.getpid()}"
    while num_parts() >= read_limit(point):
        waiting.touch()
        time.sleep(EVERY_S)
    waiting.unlink(missing_ok=True)


EVENTS = {"pickle.find_class", "os.rename", "subprocess.Popen"}
sys.addaudithook(hold)
