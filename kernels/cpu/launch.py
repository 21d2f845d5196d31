"""Launch compiled functions on the cores, and let a graph (launch_graph.py) see what is launched."""

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from numba import uint64

from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.numba_intrinsics import CFunction, compiled
from moray.kernels.cpu.thread_pool import num_cores

NO_REPORT = 0  # in place of the address of a report


class Observer(Protocol):
    """Sees what a thread launches."""

    def add_launch(self, function: int, arguments: "array[int]", num_pieces: int, report: int) -> None:
        """Note a launch of a compiled function.

        function: its address
        report:   the address of its report, or NO_REPORT
        """

    def add_call(self, function: Callable[[], object]) -> None:
        """Note a call of a Python function."""


class _ThreadState(threading.local):
    """Holds the state of each thread."""

    observer: Observer | None = None


_local = _ThreadState()


def launch(function: CFunction, arguments: Sequence[int], num_pieces: int = 1, *, reports: bool = False) -> None:
    """Call function(address of the arguments, piece) for the pieces 0 .. num_pieces - 1, on the cores, and wait.

    What a kernel does with tensors goes through here: a graph contains nothing else of it.

    arguments: 64-bit numbers, at least 0. What they are the addresses of must live as long as the call, and as long as
               a graph of it.
    reports:   the function ends by writing 1 after the arguments. An exception in a C function is lost otherwise; those
               that allocate memory by the number of rows need this.

    Raises MemoryError if the function was to report and did not.
    """
    words = array("Q", arguments)
    if reports:
        words.append(0)
    address = words.buffer_info()[0]
    _launch(pool_of(num_cores()), function.address, address, num_pieces)
    if reports and not words[-1]:
        raise MemoryError("a kernel found no memory")
    if _local.observer is not None:
        report = address + words.itemsize * (len(words) - 1) if reports else NO_REPORT
        _local.observer.add_launch(function.address, words, num_pieces, report)


@compiled
def _launch(pool: int, function: int, arguments: int, num_pieces: int) -> None:
    run_job(uint64(pool), uint64(function), uint64(arguments), uint64(num_pieces))


def call(function: Callable[[], object]) -> None:
    """Call a Python function between launches; a graph calls it again there. It does nothing with PyTorch."""
    function()
    if _local.observer is not None:
        _local.observer.add_call(function)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Let an observer see what this thread launches."""
    before = _local.observer
    _local.observer = observer
    try:
        yield
    finally:
        _local.observer = before
