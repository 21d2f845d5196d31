"""Tests of ranks on a CPU that exchange columns through shared memory; here the ranks are threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import Tensor

from moray.engine.backends.communicator import GatherCancelled
from moray.engine.backends.cpu.communicator import SharedMemoryCommunicator
from moray.engine.partition import Partition
from moray.kernels.cpu import gather

SIZE = 3
LARGE = (gather.PLACE_BYTES // 1000, 330)  # in fp32, more than a place holds
Ranks = list[SharedMemoryCommunicator]


def wait_a_minute(seconds: float, rank: int) -> None:
    assert seconds < 60, f"rank {rank} does not come"


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    memory = os.memfd_create("test")
    os.ftruncate(memory, gather.shared_bytes(SIZE))
    yield [SharedMemoryCommunicator(Partition(rank, SIZE), memory, wait_a_minute) for rank in range(SIZE)]
    os.close(memory)


def on_each(function: Callable[[int], Tensor | None]) -> list[Tensor | None]:
    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(function, range(SIZE)))


def parts_of(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(SIZE)]


def test_each_rank_gets_the_columns_of_all(ranks: Ranks) -> None:
    assert 4 * LARGE[0] * LARGE[1] > gather.PLACE_BYTES
    shapes = [(1, 1), (5, 7), (1, 4096), LARGE, (64, 33), (2, 3)]
    rounds = [
        parts_of(shape, dtype, seed) for seed, shape in enumerate(shapes) for dtype in (torch.float32, torch.bfloat16)
    ]

    def run(rank: int) -> None:
        for parts in rounds:
            whole = ranks[rank].gather(parts[rank])
            assert torch.equal(whole, gather.gather_ref(parts)), parts[0].shape

    on_each(run)


def test_rank_0_cancels_what_the_others_wait_for(ranks: Ranks) -> None:
    first, second = parts_of((4, 8), torch.float32, 0), parts_of((4, 8), torch.float32, 1)

    def run(rank: int) -> Tensor:
        ranks[rank].gather(first[rank])
        for _ in range(3):  # twice in a row, too: nobody misses one
            if rank == 0:
                ranks[rank].cancel()
            else:
                with pytest.raises(GatherCancelled):
                    ranks[rank].gather(first[rank])
        return ranks[rank].gather(second[rank])

    for whole in on_each(run):
        assert whole is not None and torch.equal(whole, gather.gather_ref(second))


def test_a_rank_that_waits_says_for_whom(ranks: Ranks) -> None:
    parts, late, told = parts_of((1, 8), torch.float32, 0), Event(), list[tuple[float, int]]()

    def note(seconds: float, rank: int) -> None:
        told.append((seconds, rank))
        if len(told) == 3:
            late.set()

    ranks[0]._on_wait = note

    def run(rank: int) -> Tensor:
        if rank == 2:
            assert late.wait(60)
        return ranks[rank].gather(parts[rank])

    on_each(run)
    assert [rank for _, rank in told[:3]] == [2, 2, 2]
    assert [seconds for seconds, _ in told[:3]] == pytest.approx([0.05, 0.1, 0.15])
