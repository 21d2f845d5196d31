"""The limits of this process's control group: of a container, a Slurm step or a service.

A limit applies to everything below the group that has it, so the group of the process and all groups above it are
read. Containers see their own group as the root. Linux has two versions of control groups; some machines have both.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60  # bytes; version 1 writes the largest number of pages when there is no limit, which is above this


@dataclass(frozen=True)
class MemoryShare:
    """Holds the memory limit of a control group, and the memory it uses.

    used_bytes: without the files in the page cache that could be reclaimed
    """

    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        """Return the bytes that the group may still allocate."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_share(root: Path = ROOT, own: Path = OWN) -> MemoryShare | None:
    """Return the tightest limit on this process's memory, or None if there is no limit."""
    shares = [
        *_memory_shares(_groups(root, own, ""), "memory.max", "memory.current", "inactive_file"),
        *_memory_shares(
            _groups(root, own, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        ),
    ]
    return min(shares, key=lambda share: share.available_bytes, default=None)


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Return how many CPUs' time this process may use, or None if there is no limit."""
    quotas = []
    for group in _groups(root, own, ""):
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))  # "max" is no number
    for group in _groups(root, own, "cpu"):
        with suppress(OSError, ValueError):
            quota_us = int((group / "cpu.cfs_quota_us").read_text())
            period_us = int((group / "cpu.cfs_period_us").read_text())
            if quota_us > 0:
                quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def process_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Return how many processes and threads this process's group may have, or None if there is no limit."""
    limits = []
    for group in (*_groups(root, own, ""), *_groups(root, own, "pids")):
        with suppress(OSError, ValueError):
            limits.append(int((group / "pids.max").read_text()))  # "max" is no number
    return min(limits, default=None)


def _groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all groups above it. controller: "" for version 2"""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        tops = [root / controllers] if controllers else [root, root / "unified"]
        for top in (top for top in tops if top.is_dir()):
            group = top / inside.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top) and folder.is_dir())


def _memory_shares(groups: Iterator[Path], limit: str, used: str, reclaimable: str) -> Iterator[MemoryShare]:
    for group in groups:
        with suppress(OSError, ValueError):
            limit_bytes = int((group / limit).read_text())  # "max" is no number
            if limit_bytes < UNLIMITED:
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used_bytes = int((group / used).read_text()) - int(statistics.get(reclaimable, 0))
                yield MemoryShare(limit_bytes, used_bytes)
