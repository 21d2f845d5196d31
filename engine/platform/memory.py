"""The memory of the machine, and how much of it this process may use."""

import os
from pathlib import Path

from moray.engine.platform.control_group import memory_share


def available_bytes() -> int:
    """Return the bytes that can be allocated without swapping: the machine's, or the container's if that is less."""
    share = memory_share()
    machine = _machine_available()
    return machine if share is None else min(machine, share.available_bytes)


def total_bytes() -> int:
    """Return the machine's memory in bytes, or the container's if that is less."""
    share = memory_share()
    machine = _machine_total()
    return machine if share is None else min(machine, share.limit_bytes)


def memory_info() -> dict[str, int]:
    """Return the entries of /proc/meminfo in bytes; empty if there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}


def _machine_total() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _machine_available() -> int:
    return memory_info().get("MemAvailable", _machine_total())
