"""Run pieces of work on several cores, where each core computes one piece at a time alone.

Torch starts and joins its own threads around every operation. Waking them takes longer than most operations of a decode
step: `single_threaded` keeps those on the caller's core, and `all_cores` is for the few that are worth it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier

import torch

MIN_PARALLEL_ELEMENTS = 2**18  # one pass over fewer elements takes less time than waking another core
MIN_PARALLEL_PRODUCTS = 2**26  # a matrix product of fewer multiplications takes less time than waking another core
WEIGHT_READ_COST_ROWS = 16  # cost of reading the weights of a product, in rows multiplied in the same time


class _ThreadState(threading.local):
    """Holds the state of each thread."""

    num_cores: int | None = None  # torch's number of threads before single_threaded(); None outside of it


_local = _ThreadState()


def num_cores() -> int:
    """Return how many cores the caller's work may use, inside or outside of single_threaded()."""
    return _local.num_cores or torch.get_num_threads()


def is_large_product(num_rows: int, num_weights: int) -> bool:
    """Return whether a matrix product takes longer than waking another core. num_weights: elements of the weight"""
    return (num_rows + WEIGHT_READ_COST_ROWS) * num_weights > MIN_PARALLEL_PRODUCTS


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations on the caller's core, except within all_cores() and in parallel_for()."""
    with _threads(1, num_cores()):
        yield


@contextmanager
def all_cores() -> Iterator[None]:
    """Run torch's operations on all cores, also inside single_threaded()."""
    with use_cores(num_cores()):
        yield


@contextmanager
def use_cores(number: int) -> Iterator[None]:
    """Run torch's operations, and parallel_for(), on `number` cores."""
    with _threads(number, number):
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


def parallel_for(function: Callable[[int], None], pieces: Sequence[int]) -> None:
    """Call function(piece) for each piece on num_cores() threads, including the caller's; they start in order.

    Raises what the function raises.
    """
    num_threads = min(num_cores(), len(pieces))
    remaining = list(reversed(pieces))

    def work() -> None:
        while True:
            try:
                piece = remaining.pop()
            except IndexError:
                return
            function(piece)

    inference = torch.is_inference_mode_enabled()  # a setting of each thread

    def work_in_helper() -> None:
        with torch.inference_mode(inference):
            work()

    helpers = [_helpers(num_cores()).submit(work_in_helper) for _ in range(num_threads - 1)]
    with _threads(1, 1):
        work()
        for helper in helpers:
            helper.result()


def parallel_rows(function: Callable[[int, int], None], num_rows: int, width: int) -> None:
    """Call function(start, stop) on each core for its part of the rows, or once for all rows if they are few.

    width: elements in a row
    """
    num_parts = num_cores() if num_rows * width >= MIN_PARALLEL_ELEMENTS else 1
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    parallel_for(lambda i: function(bounds[i], bounds[i + 1]), range(num_parts))


@cache
def _helpers(num_cores: int) -> ThreadPoolExecutor:
    """Return a pool of num_cores - 1 threads, in each of which torch's operations are single-threaded."""
    started = Barrier(num_cores - 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    helpers = ThreadPoolExecutor(num_cores - 1, thread_name_prefix="core")
    for done in [helpers.submit(start) for _ in range(num_cores - 1)]:
        done.result()
    return helpers
