import threading
from collections.abc import Iterator

import pytest
import torch

from kernels.cpu import cores as module
from kernels.cpu.cores import all_cores, each_on_one_core, each_share, num_cores, one_core


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
        if piece < num_threads:  # the first pieces wait for one another, and so take a thread each
            all_here.wait(timeout=60)
        name = threading.current_thread().name
        done.append((piece, name, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with torch.inference_mode():
        each_on_one_core(work, range(num_pieces))
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
        each_on_one_core(work, range(8))
    assert torch.get_num_threads() == cores


def test_one_core_keeps_torch_to_itself_and_leaves_the_others_to_those_who_ask(cores: int) -> None:
    with one_core():
        assert (torch.get_num_threads(), num_cores()) == (1, cores)
        with all_cores():
            assert torch.get_num_threads() == num_cores() == cores
        seen: list[tuple[int, int]] = []
        each_on_one_core(lambda _: seen.append((torch.get_num_threads(), num_cores())), range(5))
        assert set(seen) == {(1, 1)}, "a piece has its core alone, whatever it asks for"
        assert (torch.get_num_threads(), num_cores()) == (1, cores)
    assert torch.get_num_threads() == num_cores() == cores


def test_one_core_ends_with_an_error_too(cores: int) -> None:
    with pytest.raises(ValueError), one_core():
        raise ValueError
    assert torch.get_num_threads() == num_cores() == cores


@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 8), (7, 2), (10, module.FEW_NUMBERS)])
def test_shares_are_all_the_rows(cores: int, num_rows: int, width: int) -> None:
    shares: list[tuple[int, int]] = []
    each_share(lambda start, stop: shares.append((start, stop)), num_rows, width)
    rows = [row for start, stop in sorted(shares) for row in range(start, stop)]
    assert rows == list(range(num_rows))
    assert len(shares) == (cores if num_rows * width >= module.FEW_NUMBERS else 1)
