import threading
from collections.abc import Iterator

import pytest
import torch
from patience import PATIENCE_S

from moray.kernels.cpu import thread_pool as module
from moray.kernels.cpu.thread_pool import all_cores, num_cores, parallel_for, parallel_rows, single_threaded


@pytest.fixture(params=(1, 2, 3))
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_pieces", [0, 1, 2, 100])
def test_each_piece_is_done_once_by_threads_of_one_core(cores: int, num_pieces: int) -> None:
    done: list[tuple[int, str, int, bool]] = []
    num_threads = min(cores, num_pieces)
    all_here = threading.Barrier(max(1, num_threads))

    def work(piece: int) -> None:
        if piece < num_threads:  # the first pieces wait for each other, so each has its own thread
            all_here.wait(timeout=PATIENCE_S)
        name = threading.current_thread().name
        done.append((piece, name, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with torch.inference_mode():
        parallel_for(work, range(num_pieces))
    pieces, names, threads, inference = zip(*done, strict=True) if done else ((), (), (), ())
    assert sorted(pieces) == list(range(num_pieces))
    assert set(threads) <= {1} and all(inference)
    assert len(set(names)) == num_threads
    assert torch.get_num_threads() == cores, "the caller's threads are as before"


@pytest.mark.parametrize("bad", [0, 7])
def test_errors_reach_the_caller(cores: int, bad: int) -> None:
    def work(piece: int) -> None:
        if piece == bad:
            raise ValueError(piece)

    with pytest.raises(ValueError, match=str(bad)):
        parallel_for(work, range(8))
    assert torch.get_num_threads() == cores


def test_one_core_keeps_torch_to_itself_and_leaves_the_others_to_those_who_ask(cores: int) -> None:
    with single_threaded():
        assert (torch.get_num_threads(), num_cores()) == (1, cores)
        with all_cores():
            assert torch.get_num_threads() == num_cores() == cores
        seen: list[tuple[int, int]] = []
        parallel_for(lambda _: seen.append((torch.get_num_threads(), num_cores())), range(5))
        assert set(seen) == {(1, 1)}, "a piece has its core alone, whatever it asks for"
        assert (torch.get_num_threads(), num_cores()) == (1, cores)
    assert torch.get_num_threads() == num_cores() == cores


def test_one_core_ends_with_an_error_too(cores: int) -> None:
    with pytest.raises(ValueError), single_threaded():
        raise ValueError
    assert torch.get_num_threads() == num_cores() == cores


@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 8), (7, 2), (10, module.MIN_PARALLEL_ELEMENTS)])
def test_shares_are_all_the_rows(cores: int, num_rows: int, width: int) -> None:
    shares: list[tuple[int, int]] = []
    parallel_rows(lambda start, stop: shares.append((start, stop)), num_rows, width)
    rows = [row for start, stop in sorted(shares) for row in range(start, stop)]
    assert rows == list(range(num_rows))
    assert len(shares) == (cores if num_rows * width >= module.MIN_PARALLEL_ELEMENTS else 1)
