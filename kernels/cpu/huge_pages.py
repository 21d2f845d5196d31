"""Keep weights in Linux's pages of 2 MiB, which make address translation faster and the first access cheaper."""

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25  # since Linux 6.1


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for huge pages under a CPU tensor that is about to be filled. Its values do not change."""
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if tensor.device.type == "cpu" and begin < end:
        _madvise(begin, end, MADV_HUGEPAGE)


def collapse(address: int, num_bytes: int) -> None:
    """Move memory to huge pages, together with its neighbours in its first and last page.

    Memory smaller than a huge page is not moved. Neighbouring tensors share a page once the second one is moved.
    """
    if num_bytes >= HUGE_PAGE:
        begin = address // HUGE_PAGE * HUGE_PAGE
        _madvise(begin, -(-(address + num_bytes) // HUGE_PAGE) * HUGE_PAGE, MADV_COLLAPSE)


def _madvise(begin: int, end: int, advice: int) -> None:
    """Call madvise. If the Linux kernel has no such pages or no such advice, the memory stays as it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
