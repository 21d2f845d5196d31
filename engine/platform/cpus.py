"""The processor's name, the CPUs that this process may use, and those that belong to each rank."""

import os
import platform
from collections.abc import Sequence, Set
from contextlib import suppress
from math import ceil
from pathlib import Path

from moray.engine.partition import Partition
from moray.engine.platform.control_group import cpu_quota

NODES = Path("/sys/devices/system/node")  # Linux' folder of NUMA nodes


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


def numa_nodes(root: Path = NODES) -> list[frozenset[int]]:
    """Return the CPUs of each NUMA node that has any, which on most servers is a socket; [] where Linux shows none."""
    nodes = []
    for folder in sorted(root.glob("node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node"))):
        with suppress(OSError, ValueError):
            if cpus := _read_cpus((folder / "cpulist").read_text()):
                nodes.append(cpus)
    return nodes


def _read_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list as the kernel writes it: `0-15,32-47`."""
    spans = [span.partition("-") for span in text.strip().split(",") if span]
    return frozenset(cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1))


def cores_of_rank(
    partition: Partition, allowed: Set[int], nodes: Sequence[Set[int]], num_threads: int
) -> Set[int] | None:
    """Return the CPUs that a rank is bound to, so that its part of the weights lies in memory next to them.

    Ranks are divided among the NUMA nodes, or nodes among the ranks. None = a rank is bound to no node: there is one
    only, the numbers do not divide each other, or a node has fewer CPUs than its ranks have threads.

    allowed:      the CPUs that the process may use
    nodes:        the CPUs of each NUMA node
    num_threads:  threads of a rank
    """
    usable = [node & allowed for node in nodes if node & allowed]
    if len(usable) < 2 or (partition.size % len(usable) and len(usable) % partition.size):
        return None
    num_groups = min(partition.size, len(usable))
    group_size, num_ranks = len(usable) // num_groups, partition.size // num_groups
    groups = [frozenset().union(*usable[at : at + group_size]) for at in range(0, len(usable), group_size)]
    if any(len(group) < num_ranks * num_threads for group in groups):
        return None
    return groups[partition.rank // num_ranks]
