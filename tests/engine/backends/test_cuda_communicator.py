"""Tests of ranks on GPUs that gather through torch's process groups; here the ranks are threads, and use gloo."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moray.engine.backends.cuda import communicator
from moray.engine.backends.cuda.communicator import CudaCommunicator
from moray.engine.errors import EngineError
from moray.engine.partition import Partition

SIZE = 3
CPU = torch.device("cpu")


def wait_a_minute(seconds: float, rank: int | None) -> None:
    assert seconds < 60 and rank is None


def on_each(function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(function, range(SIZE)))


@pytest.fixture
def ranks() -> Iterator[list[CudaCommunicator]]:
    memory = os.memfd_create("test")
    made = on_each(lambda rank: CudaCommunicator(Partition(rank, SIZE), CPU, memory, wait_a_minute))
    os.close(memory)  # each has a descriptor of its own
    yield made


def parts_of(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 9).to(dtype) for rank in range(SIZE)]


def test_each_rank_gets_the_columns_of_all(ranks: list[CudaCommunicator]) -> None:
    shapes = [(1, 1), (1, 4096), (5, 7), (64, 33), (0, 5)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    rounds = [parts_of(shape, dtype) for shape in shapes for dtype in dtypes]

    def run(rank: int) -> None:
        for parts in rounds:
            whole = ranks[rank].gather(parts[rank])
            assert torch.equal(whole, torch.cat(parts, dim=1)) and whole.is_contiguous()
        strided = parts_of((6, 8), torch.float32)
        assert torch.equal(
            ranks[rank].gather(strided[rank][::2, ::2]), torch.cat([p[::2, ::2] for p in strided], dim=1)
        )

    on_each(run)


def test_a_rank_that_does_not_come_is_noticed_before_the_ranks_are_connected() -> None:
    memory = os.memfd_create("test")

    def give_up(seconds: float, rank: int | None) -> None:
        raise EngineError("rank 1 has ended")

    with pytest.raises(EngineError, match="rank 1 has ended"):
        CudaCommunicator(Partition(0, 2), CPU, memory, give_up)
    os.close(memory)


def test_who_waits_for_the_gpu_learns_that_a_rank_has_failed(ranks: list[CudaCommunicator]) -> None:
    """The GPU waits in a gather that the other rank has left, so what was launched after it never comes."""
    seen: list[float] = []

    def give_up(seconds: float, rank: int | None) -> None:
        seen.append(seconds)
        if len(seen) == 3:
            raise EngineError("rank 1 has ended")

    aborted: list[str] = []
    group = ranks[0]._group
    ranks[0]._on_wait = give_up
    ranks[0]._group = SimpleNamespace(abort=lambda: aborted.append("once"))  # type: ignore[assignment]
    with pytest.raises(EngineError, match="rank 1 has ended"):
        ranks[0].wait_for(SimpleNamespace(query=lambda: False))  # type: ignore[arg-type]
    ranks[0]._group = group
    assert seen == pytest.approx([0.05, 0.1, 0.15])
    assert aborted == ["once"], "or the GPU would wait for ever"


def test_an_error_of_the_gpu_is_that_of_the_rank_that_caused_it(
    ranks: list[CudaCommunicator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a process is noticed later than what it does to the memory that GPUs share."""
    calls: list[float] = []

    def notice(seconds: float, rank: int | None) -> None:
        calls.append(seconds)
        if len(calls) == 2:
            raise EngineError("rank 1 of 3 was ended by SIGKILL")

    def fail() -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")

    ranks[0]._on_wait = notice
    with pytest.raises(EngineError, match="was ended by SIGKILL"):
        ranks[0].wait_for(SimpleNamespace(query=fail))  # type: ignore[arg-type]
    monkeypatch.setattr(communicator, "NOTICED_S", 0.1)
    ranks[1]._on_wait = lambda seconds, rank: None
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        ranks[1].wait_for(SimpleNamespace(query=fail))  # type: ignore[arg-type]
