"""The processor's name, and the number of CPUs that this process may use."""

import os
import platform
from contextlib import suppress
from math import ceil
from pathlib import Path

from moray.engine.platform.control_group import cpu_quota


def available_cores() -> int:
    """Return how many CPUs this process may use: those it is bound to, or the container's share if that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, ceil(quota)))


def processor_name() -> str:
    """Return the processor's model name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
