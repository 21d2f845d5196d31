"""Check the system's limits on a user's processes: files, processes, memory."""

import os
import resource
from collections.abc import Iterator

from moray.batch.units import memory
from moray.engine.platform.control_group import process_limit
from moray.engine.settings.sizes import GIB
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning
from moray.jobs.doctor.memory import object_store_bytes

FILES = 4096  # open files of a process; Ray warns below
MIN_FILES = 128  # open files with which a small job on two cores ran
PROCESSES = 1024  # processes and threads of a user; a job on two cores has about 300 threads
MAPPED_BYTES = 8 * GIB  # address space of a worker with a small model, without the object store, which it maps too


def open_files(_: Subject) -> Iterator[Finding]:
    """Check how many files a process may open. Ray raises the soft limit to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    fix = f"raise the hard limit: ulimit -Hn {2 * FILES} as root, or docker run --ulimit nofile={2 * FILES}"
    if hard == resource.RLIM_INFINITY or hard >= FILES:
        yield ok(f"{_amount(hard)} may be open in a process")
    elif hard >= MIN_FILES:
        yield warning(f"{hard:,} may be open in a process; a job of many workers needs more", fix)
    else:
        yield problem(f"{hard:,} may be open in a process: too few for Ray", fix)


def processes(_: Subject) -> Iterator[Finding]:
    """Check how many processes and threads the user may have."""
    limits = {"the user": resource.getrlimit(resource.RLIMIT_NPROC)[0]} if os.geteuid() != 0 else {}
    group = process_limit()
    if group is not None:
        limits["the control group"] = group
    known = {owner: limit for owner, limit in limits.items() if limit != resource.RLIM_INFINITY}
    value = ", ".join(f"{limit:,} for {owner}" for owner, limit in known.items()) or "no limit"
    if any(limit < PROCESSES for limit in known.values()):
        yield warning(value, f"ulimit -u {4 * PROCESSES}, or docker run --pids-limit=-1: Ray and torch start hundreds")
    else:
        yield ok(value)


def address_space(_: Subject) -> Iterator[Finding]:
    """Check whether a process's address space is limited. Ray and CUDA map far more memory than they use."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    value = f"{memory(soft)} a process (ulimit -v)"
    fix = "ulimit -v unlimited; limit the memory of a container or a Slurm step instead"
    if soft == resource.RLIM_INFINITY:
        yield ok("no limit")
    elif soft < object_store_bytes() + MAPPED_BYTES:
        yield problem(f"{value}; Ray hangs for lack of more", fix)
    else:
        yield warning(f"{value}; Ray and CUDA map far more than they use", fix)


def _amount(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"
