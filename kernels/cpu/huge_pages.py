"""Keep weights in Linux's pages of 2 MiB: the CPU finds its way in them sooner, and the first touch takes less."""

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25  # since Linux 6.1


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask for them under a CPU tensor that is about to be filled. Values are untouched."""
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if tensor.device.type == "cpu" and begin < end:
        _madvise(begin, end, MADV_HUGEPAGE)


def collapse(address: int, num_bytes: int) -> None:
    """Move what lies there to huge pages, and what shares its first and last one; nothing if it is less than one.

    Neighbours in memory come to share a page when the second of them is moved.
    """
    if num_bytes >= HUGE_PAGE:
        begin = address // HUGE_PAGE * HUGE_PAGE
        _madvise(begin, -(-(address + num_bytes) // HUGE_PAGE) * HUGE_PAGE, MADV_COLLAPSE)


def _madvise(begin: int, end: int, advice: int) -> None:
    """A refusal (no such pages or no such advice in this kernel) leaves the memory as it was."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
