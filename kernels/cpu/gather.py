"""Put the columns of several processes next to each other, through memory that they share.

Each process has a line with the number of the last gather to which it has contributed, and two places for its columns,
used in turn. A process that has contributed to gather n has read what gather n - 1 brought. So a place is written again
when all others have contributed to the gather between. Nothing is added up: the bits are those that were written.

The first process may cancel a gather instead of contributing to it; the others, which wait for it, find a mark. A mark
is written again like a place: a process that has contributed may not have looked at the mark yet.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import uint64
from torch import Tensor

from moray.kernels.cpu.atomics import nap, now_ns, pause, read, write
from moray.kernels.cpu.numba_intrinsics import array_at, compiled

LINE = 64  # a line of the cache: what different processes write is that far apart
PLACES = 2
PLACE_BYTES = 4 << 20  # larger parts are gathered in several turns
SPIN_NS = 200_000  # how long a process spins for others before it naps between two looks
PAUSES_PER_LOOK = 8

DONE, WAITING, CANCELLED = 0, 1, 2  # what a call comes back with


def shared_bytes(size: int) -> int:
    """Return the bytes of memory that `size` processes share, zeros at first. What is never written takes no room."""
    return (size + 1) * LINE + size * PLACES * PLACE_BYTES


def rows_at_once(row_bytes: int) -> int:
    """Return how many rows of a part are gathered in one turn."""
    return max(1, PLACE_BYTES // max(1, row_bytes))


def contribute(memory: int, rank: int, size: int, number: int, part: Tensor, slice_ns: int) -> int:
    """Write this process's rows for gather `number`, and return DONE; or WAITING if others need more than slice_ns.

    memory: address of the shared memory
    part:   [num_rows, num_columns], contiguous, at most PLACE_BYTES
    """
    state = np.zeros(1, np.int64)
    _contribute(memory, rank, size, number, part.data_ptr(), part.nbytes, slice_ns, state)
    return int(state[0])


def collect(memory: int, rank: int, size: int, number: int, part: Tensor, out: Tensor, slice_ns: int) -> int:
    """Write the columns of all processes to `out`, after contribute(), and return DONE, WAITING or CANCELLED.

    After WAITING it may be called again: what was not done is done then.

    part: as for contribute
    out:  [num_rows, size * num_columns], contiguous
    """
    state = np.zeros(1, np.int64)
    row_bytes = part.shape[1] * part.element_size()
    _collect(memory, rank, size, number, part.data_ptr(), out.data_ptr(), part.shape[0], row_bytes, slice_ns, state)
    return int(state[0])


def cancel(memory: int, size: int, number: int, slice_ns: int) -> int:
    """Cancel gather `number`, to which the first process has not contributed; return DONE or WAITING."""
    state = np.zeros(1, np.int64)
    _cancel(memory, size, number, slice_ns, state)
    return int(state[0])


def contributed(memory: int, rank: int) -> int:
    """Return the number of the last gather to which a process has contributed."""
    state = np.zeros(1, np.int64)
    _contributed(memory, rank, state)
    return int(state[0])


def gather_ref(parts: list[Tensor]) -> Tensor:
    """Compute what all processes get, from what each contributes."""
    return torch.cat(parts, dim=1)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _has_reached(memory: Any, rank: Any, number: Any, slice_ns: Any) -> bool:
    """Wait until a process has contributed to gather `number`; return False if it needs longer than slice_ns."""
    line = memory + uint64(rank) * uint64(LINE)
    if read(line) >= number:
        return True
    started = now_ns()
    while True:
        for _ in range(PAUSES_PER_LOOK):
            pause()
            if read(line) >= number:
                return True
        waited = now_ns() - started
        if waited > slice_ns:
            return False
        if waited > uint64(SPIN_NS):
            nap()


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _have_all_reached(memory: Any, size: Any, number: Any, slice_ns: Any) -> bool:
    for other in range(size):  # noqa: SIM110 - Numba compiles no generator here
        if not _has_reached(memory, other, number, slice_ns):
            return False
    return True


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _place(memory: Any, size: Any, rank: Any, number: Any) -> Any:
    """Return the address of a process's rows of gather `number`."""
    index = uint64(rank) * uint64(PLACES) + number % uint64(PLACES)
    return memory + (uint64(size) + uint64(1)) * uint64(LINE) + index * uint64(PLACE_BYTES)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _mark(memory: Any, size: Any, number: Any) -> Any:
    """Return the address of the number of the last gather that was cancelled, of those that use the same place."""
    return memory + uint64(size) * uint64(LINE) + number % uint64(PLACES) * uint64(8)


@compiled
def _contribute(
    memory: int, rank: int, size: int, number: int, part: int, num_bytes: int, slice_ns: int, state: Any
) -> None:
    start, turn = uint64(memory), uint64(number)
    state[0] = WAITING
    if _have_all_reached(start, size, turn - uint64(1), uint64(slice_ns)):
        source = array_at(uint64(part), (num_bytes,), np.uint8)
        target = array_at(_place(start, size, rank, turn), (num_bytes,), np.uint8)
        target[:] = source
        write(start + uint64(rank) * uint64(LINE), turn)
        state[0] = DONE


@compiled
def _collect(
    memory: int,
    rank: int,
    size: int,
    number: int,
    part: int,
    out: int,
    num_rows: int,
    row_bytes: int,
    slice_ns: int,
    state: Any,
) -> None:
    start, turn = uint64(memory), uint64(number)
    rows = array_at(uint64(out), (num_rows, size, row_bytes), np.uint8)
    state[0] = DONE
    for other in range(size):
        source = uint64(part)
        if other != rank:
            if not _has_reached(start, other, turn, uint64(slice_ns)):
                state[0] = WAITING
                return
            if other == 0 and read(_mark(start, size, turn)) == turn:
                state[0] = CANCELLED
                return
            source = _place(start, size, other, turn)
        columns = array_at(source, (num_rows, row_bytes), np.uint8)
        for row in range(num_rows):
            rows[row, other] = columns[row]


@compiled
def _cancel(memory: int, size: int, number: int, slice_ns: int, state: Any) -> None:
    start, turn = uint64(memory), uint64(number)
    state[0] = WAITING
    if _have_all_reached(start, size, turn - uint64(1), uint64(slice_ns)):
        write(_mark(start, size, turn), turn)
        write(start, turn)
        state[0] = DONE


@compiled
def _contributed(memory: int, rank: int, state: Any) -> None:
    state[0] = np.int64(read(uint64(memory) + uint64(rank) * uint64(LINE)))
