"""Check the machine's memory, and how much of it Ray's object store gets."""

import os
from collections.abc import Iterator
from pathlib import Path

from moray.batch.units import memory
from moray.engine.platform.control_group import memory_share
from moray.engine.platform.memory import available_bytes, memory_info, total_bytes
from moray.engine.settings.sizes import GIB
from moray.jobs.doctor.finding import Finding, Subject, ok, warning

SHARED_MEMORY = Path("/dev/shm")
# Share of the available memory that Ray's object store takes, in shared memory where there is enough of that.
STORE_SHARE = 0.3
STORE_MAX_BYTES = 200 * 10**9  # most that Ray reserves for it
LOW_BYTES = 2 * GIB  # Ray's processes and one worker with a small model take about this much


def main_memory(_: Subject) -> Iterator[Finding]:
    """Report the total and the available memory."""
    available, total = available_bytes(), total_bytes()
    limit = " (the limit of the control group)" if memory_share() is not None else ""
    value = f"{memory(available)} available of {memory(total)}{limit}"
    if available < LOW_BYTES:
        yield warning(value, "end other processes, or raise the container's limit: Ray and a small model take 2 GiB")
    else:
        yield ok(value)


def swap(_: Subject) -> Iterator[Finding]:
    """Check whether the machine swaps."""
    info = memory_info()
    total, free = info.get("SwapTotal", 0), info.get("SwapFree", 0)
    used = total - free
    value = f"{memory(used)} of {memory(total)} in use" if total else "none"
    if used > info.get("MemTotal", 0) / 10:
        yield warning(
            value, "end the programs that fill the memory: a job with swapped weights takes many times longer"
        )
    else:
        yield ok(value)


def shared_memory(_: Subject) -> Iterator[Finding]:
    """Compare the size of /dev/shm with that of Ray's object store. If it is too small, the store is on the disk."""
    try:
        free = _free_bytes(SHARED_MEMORY)
    except OSError:
        yield ok(f"no {SHARED_MEMORY}; Ray keeps its objects in the temporary folder")
        return
    wanted = object_store_bytes()
    value = f"{SHARED_MEMORY} has {memory(free)} free; Ray's object store takes up to {memory(wanted)}"
    if free < min(wanted, 10**10):  # beyond 10 GB Ray takes what there is
        fix = f"give the container more: docker run --shm-size={-(-wanted // GIB)}g"
        yield warning(f"{value}, and goes to the disk for lack of it", fix)
    else:
        yield ok(value)


def object_store_bytes() -> int:
    """Return how much memory Ray reserves for its object store where nothing limits it."""
    return int(min(available_bytes() * STORE_SHARE, STORE_MAX_BYTES))


def _free_bytes(folder: Path) -> int:
    """Return the free space of a file system, computed as Ray does."""
    found = os.statvfs(folder)
    return found.f_bsize * found.f_bavail
