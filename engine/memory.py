"""How much memory the KV cache may take on this machine."""

import os
from pathlib import Path


def available_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or the container's where that is less."""
    return min(_machine_available(), _container_available())


def _machine_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_available(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the cgroup (v2) of this process leaves; more than any machine has where there is no limit."""
    limit, used = root / "memory.max", root / "memory.current"
    try:
        text = limit.read_text().strip()
        return 1 << 62 if text == "max" else max(0, int(text) - int(used.read_text()))
    except OSError:
        return 1 << 62
