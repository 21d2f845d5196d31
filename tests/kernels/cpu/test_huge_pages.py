"""Tests of moving memory to huge pages: contents stay, and huge pages are used if the system has them."""

import platform
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import pytest
import torch

from moray.kernels.cpu.huge_pages import (
    HUGE_PAGE,
    LINE,
    MAX_SHARED_BYTES,
    SLAB_BYTES,
    advise_huge_pages,
    allocate,
    collapse,
)

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def can_collapse() -> bool:
    version = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    return SETTING.exists() and "[never]" not in SETTING.read_text() and version >= (6, 1)


@pytest.mark.parametrize("num_bytes", [1, 4096, HUGE_PAGE, 5 * HUGE_PAGE + 1])
@pytest.mark.parametrize("offset", [0, 100])
def test_values_stay(num_bytes: int, offset: int) -> None:
    tensor = torch.arange(offset + num_bytes, dtype=torch.uint8)
    want = tensor.clone()
    advise_huge_pages(tensor)
    collapse(tensor.data_ptr() + offset, num_bytes)
    assert torch.equal(tensor, want)


@pytest.mark.skipif(not can_collapse(), reason="this kernel does not collapse memory when asked")
def test_filled_memory_moves_to_huge_pages() -> None:
    before = huge_bytes()
    # Memory that torch reuses may be in huge pages already.
    memory = mmap(-1, 16 * HUGE_PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    tensor.fill_(1)
    for _ in range(5):  # without a free page the Linux kernel stops, and prepares some meanwhile
        collapse(tensor.data_ptr(), tensor.nbytes)
    assert huge_bytes() - before >= 14 * HUGE_PAGE
    assert bool((tensor == 1).all())


def test_blocks_are_apart_and_begin_at_cache_lines() -> None:
    sizes = [1, LINE, 100, HUGE_PAGE - 1, MAX_SHARED_BYTES, MAX_SHARED_BYTES + 1] * 6
    blocks = [allocate(size) for size in sizes]
    assert sum(sizes) > 2 * SLAB_BYTES, "several slabs"
    for i, block in enumerate(blocks):
        block.fill_(i)
    for i, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        assert block.shape == (size,) and bool((block == i).all())
        assert block.data_ptr() % LINE == 0


def test_blocks_can_be_written_whatever_the_mode_in_which_their_slab_was_made() -> None:
    with torch.inference_mode():
        blocks = [allocate(size) for size in (SLAB_BYTES, *[MAX_SHARED_BYTES] * 9)]
    for block in (*blocks, allocate(LINE)):
        block.copy_(torch.ones_like(block))
    with torch.inference_mode():
        allocate(LINE).copy_(torch.ones(LINE, dtype=torch.uint8))


@pytest.mark.skipif(not can_collapse(), reason="this kernel does not collapse memory when asked")
def test_blocks_smaller_than_a_huge_page_lie_in_huge_pages() -> None:
    before = huge_bytes()
    blocks = [allocate(HUGE_PAGE // 2) for _ in range(3 * SLAB_BYTES // HUGE_PAGE)]
    for block in blocks:
        block.fill_(1)
        collapse(block.data_ptr(), block.nbytes)
    assert huge_bytes() - before >= SLAB_BYTES // 2


def test_a_slab_is_freed_with_its_blocks() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    blocks = [allocate(HUGE_PAGE // 2).fill_(1) for _ in range(8 * SLAB_BYTES // HUGE_PAGE)]
    full = resident()
    assert full - before > 3 * SLAB_BYTES
    del blocks
    assert full - resident() > 2 * SLAB_BYTES
