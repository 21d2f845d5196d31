"""How many CPUs this process has."""

import os
from pathlib import Path


def available_cores() -> int:
    """CPUs that this process may use: those it is bound to, or the container's share where that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return count
