"""Work for several cores at once: each takes the next piece and computes it alone.

Torch's own threads part and meet again around every operation. To wake them takes longer than most operations of a
decode step: `one_core` keeps those on the caller's core, `all_cores` is for the few that are worth it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier

import torch

FEW_NUMBERS = 2**18  # that are passed over once take less than waking another core


class _Local(threading.local):
    num_cores: int | None = None  # that torch had before one_core


_local = _Local()


def num_cores() -> int:
    """Cores that the caller's work may be shared among, be it within one_core or not."""
    return _local.num_cores or torch.get_num_threads()


@contextmanager
def one_core() -> Iterator[None]:
    """Torch's operations stay on the caller's core, but for those that ask for all_cores or each_on_one_core."""
    with _threads(1, num_cores()):
        yield


@contextmanager
def all_cores() -> Iterator[None]:
    """Torch's operations share all cores, within one_core too."""
    with _threads(num_cores(), num_cores()):
        yield


@contextmanager
def _threads(num_threads: int, num_cores: int) -> Iterator[None]:
    before = torch.get_num_threads(), _local.num_cores
    torch.set_num_threads(num_threads)
    _local.num_cores = num_cores
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        _local.num_cores = before[1]


def each_on_one_core(function: Callable[[int], None], pieces: Sequence[int]) -> None:
    """Call function(piece) for each, first things first, on num_cores() threads, the caller's among them.

    Raises what the function raises.
    """
    num_threads = min(num_cores(), len(pieces))
    left = list(reversed(pieces))

    def work() -> None:
        while True:
            try:
                piece = left.pop()
            except IndexError:
                return
            function(piece)

    inference = torch.is_inference_mode_enabled()  # each thread has its own

    def work_beside() -> None:
        with torch.inference_mode(inference):
            work()

    others = [_helpers(num_cores()).submit(work_beside) for _ in range(num_threads - 1)]
    with _threads(1, 1):
        work()
        for other in others:
            other.result()


def each_share(function: Callable[[int, int], None], num_rows: int, width: int) -> None:
    """Call function(start, stop) on each core for its share of the rows, or once for all where they are few.

    width: numbers in a row
    """
    num_shares = num_cores() if num_rows * width >= FEW_NUMBERS else 1
    cuts = [num_rows * i // num_shares for i in range(num_shares + 1)]
    each_on_one_core(lambda i: function(cuts[i], cuts[i + 1]), range(num_shares))


@cache
def _helpers(num_cores: int) -> ThreadPoolExecutor:
    """num_cores - 1 threads, in each of which torch computes on one."""
    started = Barrier(num_cores - 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    helpers = ThreadPoolExecutor(num_cores - 1, thread_name_prefix="core")
    for done in [helpers.submit(start) for _ in range(num_cores - 1)]:
        done.result()
    return helpers
