"""Keep weights in Linux's pages of 2 MiB, which make address translation faster and the first access cheaper."""

import ctypes
import sys
from threading import Lock

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25  # since Linux 6.1

SLAB_BYTES = 32 * HUGE_PAGE  # memory that small blocks share
MAX_SHARED_BYTES = SLAB_BYTES // 4
LINE = 64

_lock = Lock()
_unused = torch.empty(0, dtype=torch.uint8)  # the rest of the last slab


def allocate(num_bytes: int) -> Tensor:
    """Return memory in huge pages, [num_bytes] uint8, that begins at a cache line and holds any values.

    Blocks of up to MAX_SHARED_BYTES share slabs: alone, a block below the size of a huge page would lie in small pages.
    A slab is freed when no block in it is used any more.
    """
    global _unused
    if num_bytes > MAX_SHARED_BYTES:
        block = _new(num_bytes)
        advise_huge_pages(block)
        return block
    with _lock:
        if num_bytes > len(_unused):
            slab = _new(SLAB_BYTES + HUGE_PAGE)
            begin = -slab.data_ptr() % HUGE_PAGE
            _unused = slab[begin : begin + SLAB_BYTES]
            advise_huge_pages(_unused)
        block = _unused[:num_bytes]
        _unused = _unused[-(-num_bytes // LINE) * LINE :]
    return block


def _new(num_bytes: int) -> Tensor:
    with torch.inference_mode(False):  # else a block could not be written outside of inference mode
        return torch.empty(num_bytes, dtype=torch.uint8)


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
