"""Find which vector instruction sets the linear kernels may use on this CPU."""

import ctypes
import os
import platform
import sys
from functools import cache

from numba.core.registry import cpu_target

# The features, by LLVM's names, that each instruction set needs, slowest first. A CPU that has one set is assumed to
# have all sets before it, except for the optional one.
NEEDED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avxvnni"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512vnni"},
    "avx512_bf16": {"avx512bf16"},
    "amx": {"amx-tile", "amx-bf16", "amx-int8"},
}
OPTIONAL = "avx_vnni"  # servers before Sapphire Rapids and Zen 5 have AVX-512 without it
VARIABLE = "MORAY_CPU_ISA"

ARCH_PRCTL = 158  # the system call's number on x86-64
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


def isas() -> tuple[str, ...]:
    """Return the instruction sets that may be used, best first; MORAY_CPU_ISA names the best one allowed.

    Raises ValueError if the variable names an instruction set that this machine lacks.
    """
    return _isas(os.environ.get(VARIABLE, ""))


@cache
def _isas(best: str) -> tuple[str, ...]:
    have: list[str] = []
    features = _features()
    for name, needed in NEEDED.items():
        if not needed <= features or (name == "amx" and not _may_use_tiles()):
            if name == OPTIONAL:
                continue
            break
        have.append(name)
    if best and best not in have:
        raise ValueError(f"{VARIABLE} is {best!r}; on this machine it can be {', '.join(have) or 'left unset only'}")
    return tuple(reversed(have[: have.index(best) + 1] if best else have))


def _features() -> frozenset[str]:
    """Return the features that Numba compiles for: the CPU's, or those that NUMBA_CPU_FEATURES names."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


def _may_use_tiles() -> bool:
    """Request the tile registers from Linux, for all threads of the process; some Linux kernels refuse."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
