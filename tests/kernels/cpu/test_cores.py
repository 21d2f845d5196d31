import threading
from collections.abc import Iterator

import pytest
import torch

from kernels.cpu.cores import each_on_one_core


@pytest.fixture(params=(1, 2, 3))
def num_cores(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_pieces", [0, 1, 2, 100])
def test_each_piece_is_done_once_by_threads_of_one_core(num_cores: int, num_pieces: int) -> None:
    done: list[tuple[int, str, int, bool]] = []
    num_threads = min(num_cores, num_pieces)
    all_here = threading.Barrier(max(1, num_threads))

    def work(piece: int) -> None:
        if piece < num_threads:  # the first pieces wait for one another, and so take a thread each
            all_here.wait(timeout=60)
        name = threading.current_thread().name
        done.append((piece, name, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with torch.inference_mode():
        each_on_one_core(work, range(num_pieces))
    pieces, names, cores, inference = zip(*done, strict=True) if done else ((), (), (), ())
    assert sorted(pieces) == list(range(num_pieces))
    assert set(cores) <= {1} and all(inference)
    assert len(set(names)) == num_threads
    assert torch.get_num_threads() == num_cores, "the caller's threads are as before"


@pytest.mark.parametrize("bad", [0, 7])
def test_errors_reach_the_caller(num_cores: int, bad: int) -> None:
    def work(piece: int) -> None:
        if piece == bad:
            raise ValueError(piece)

    with pytest.raises(ValueError, match=str(bad)):
        each_on_one_core(work, range(8))
    assert torch.get_num_threads() == num_cores
