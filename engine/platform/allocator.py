"""Control glibc's allocator, which keeps freed memory between memory that is in use, and name torch's failures."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 1 << 20
# What glibc arrives at by itself, at most: from then on, steps reuse memory and need not ask the system for it.
USUAL_MMAP_BYTES, USUAL_TRIM_BYTES = 32 << 20, 64 << 20

CPU_FAILURE = "DefaultCPUAllocator: can't allocate memory"  # in the message of the RuntimeError that torch raises


@contextlib.contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Raise torch.OutOfMemoryError where an allocation of a tensor or of a kernel on the CPU fails, inside the block.

    torch raises that by itself on a GPU alone. On a CPU an allocation fails where the address space is limited, as by
    `ulimit -v`, or the kernel does not overcommit; where a control group's memory ends, Linux ends a process instead.
    """
    try:
        yield
    except RuntimeError as error:
        _, found, rest = str(error).partition(CPU_FAILURE)
        if not found:
            raise
        raise torch.OutOfMemoryError(found + rest) from error
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error


@contextlib.contextmanager
def large_memory_returned() -> Iterator[None]:
    """Return memory of 1 MiB and more to the system as soon as it is freed, inside the block.

    Outside it, memory up to 32 MiB comes from the heap. Short-lived memory of some megabytes there, between memory that
    stays, leaves holes that are as large together as what stays. Does nothing with another allocator than glibc's.
    """
    _set(M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, USUAL_MMAP_BYTES)
        _set(M_TRIM_THRESHOLD, USUAL_TRIM_BYTES)


def _set(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(parameter, value)
