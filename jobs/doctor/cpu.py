"""Check the processor, and what moray compiles for it."""

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moray.engine.platform.control_group import cpu_quota
from moray.engine.platform.cpus import available_cores, processor_name
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning

CPUINFO = Path("/proc/cpuinfo")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Variables that change what moray's libraries compute, or how fast.
LIBRARY_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "KMP_BLOCKTIME",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "NUMBA_CPU_FEATURES",
    "NUMBA_CPU_NAME",
    "NUMBA_OPT",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_VERBOSE",
)


def processor(_: Subject) -> Iterable[Finding]:
    """Report the processor and how many of its cores this process may use."""
    cores, quota = available_cores(), cpu_quota()
    share = "" if quota is None else f", {quota:g} CPUs by its control group"
    value = f"{processor_name()}, {cores} of {os.cpu_count()} cores{share}"
    if quota is not None and quota < 1:
        yield warning(value, "give the container one CPU or more: Ray's own processes need most of a smaller share")
    else:
        yield ok(value)


def instructions(_: Subject) -> Iterator[Finding]:
    """Report the vector instructions that the kernels use, and those that the system or a variable disables."""
    from moray.kernels.cpu.isa import VARIABLE, isas

    try:
        found = isas()
    except ValueError as error:
        yield problem(str(error), f"unset {VARIABLE}")
        return
    value = ", ".join(found) or "none that moray has kernels for; oneDNN or torch multiply"
    if VARIABLE in os.environ:
        yield warning(f"{value}, by {VARIABLE}={os.environ[VARIABLE]}", f"unset {VARIABLE}, unless it is meant")
    elif "amx" not in found and {"amx_tile", "amx_bf16"} <= _flags():
        fix = "run Linux 5.16 or newer; in a container, a seccomp profile that lets arch_prctl pass"
        yield warning(f"{value}; the processor has AMX, but the system does not allow its use", fix)
    elif not found and platform.machine() in ("x86_64", "AMD64"):
        yield warning(value, "use a processor with AVX2 (2013 or newer), or a virtual machine that exposes it")
    else:
        yield ok(value)


def _flags() -> set[str]:
    """Return the processor's features, as Linux names them."""
    with suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def load(_: Subject) -> Iterable[Finding]:
    """Compare the machine's load average with its number of cores."""
    waiting, cores = os.getloadavg()[0], os.cpu_count() or 1
    value = f"{waiting:.1f} runnable on average of the last minute, on {cores} cores"
    if waiting > 2 * cores:
        yield warning(value, "end other programs, or leave them some cores: workers.cpus")
    else:
        yield ok(value)


def compiler(_: Subject) -> Iterator[Finding]:
    """Check that what Numba compiles is kept on disk."""
    import numba

    from moray.kernels.cpu.code_cache import code_folder

    if numba.config.DISABLE_JIT:
        yield problem("NUMBA_DISABLE_JIT is set, and moray's kernels do not run uncompiled", "unset NUMBA_DISABLE_JIT")
    elif folder := code_folder():
        yield ok(f"Numba {numba.__version__}, cache in {folder}")
    else:
        yield warning(
            f"Numba {numba.__version__}, without a cache: each process compiles for itself, for some seconds",
            "export NUMBA_CACHE_DIR=FOLDER, a folder that can be written",
        )


def huge_pages(_: Subject) -> Iterator[Finding]:
    """Check whether Linux can give the weights pages of 2 MiB."""
    try:
        setting = HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        yield ok("this system has none; weights are read somewhat slower")
        return
    if setting == "never":
        yield warning("never: weights are read somewhat slower", f"echo madvise | sudo tee {HUGE_PAGES}")
    else:
        yield ok(setting)


def variables(_: Subject) -> Iterator[Finding]:
    """List the environment variables that change what moray's libraries do."""
    found = [f"{name}={os.environ[name]}" for name in LIBRARY_VARIABLES if name in os.environ]
    if found:
        yield warning(", ".join(found), "unset them, unless you mean what they change: speed, or bits of the results")
    else:
        yield ok("none that changes what libraries compute")
