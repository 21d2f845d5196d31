"""Run the pieces of a compiled job on several cores, without Python: helper threads wait in compiled code.

A helper that has just worked spins for SPIN_NS before it sleeps, so the jobs of a step find it awake, and an idle
engine uses no core. Pieces are taken one after the other, in their order, from one counter. The caller waits for the
pieces, not for the helpers: a helper that the operating system has stopped delays nobody unless it is inside a piece.
"""

import os
import threading
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import uint64

from moray.kernels.cpu.atomics import (
    SEMAPHORE_BYTES,
    add,
    call_with_2,
    exchange,
    now_ns,
    pause,
    read,
    replace,
    sem_init,
    sem_post,
    sem_wait,
    write,
)
from moray.kernels.cpu.numba_intrinsics import compiled
from moray.kernels.cpu.vectors import address_of

SPIN_NS = 50_000  # how long a thread spins for work, or for the end of a job, before it sleeps
PAUSES_PER_LOOK = 16  # pauses between two looks at the clock

ALONE = 0  # the address of a pool without helpers

# A pool's memory: a line of the cache for each of these, then two for each helper. Offsets in bytes.
LINE = 64
TICKET = 0  # the number of the job in the upper half, the next piece in the lower half
BUSY = LINE  # 1 while a caller uses the pool
JOB = 2 * LINE  # function, arguments, number of pieces
DONE = 3 * LINE  # pieces that are done
WAITS = 4 * LINE  # 1 if the caller sleeps until the job is done
CALLER = 5 * LINE  # the semaphore on which it sleeps
NUM_HELPERS = 6 * LINE
HELPERS = 7 * LINE
HELPER_BYTES = LINE + SEMAPHORE_BYTES  # 1 if the helper sleeps, and its semaphore
CLOSED = 0xFFFFFFFF  # instead of the next piece, while the next job is written


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def run_job(pool: Any, function: Any, arguments: Any, num_pieces: Any) -> None:
    """Call function(arguments, piece) for the pieces 0 .. num_pieces - 1; call it from compiled code.

    pool:     the address of a pool, or ALONE; a pool that another thread uses is not waited for
    function: address of a C function of two 64-bit numbers. A piece may wait for pieces before it.
    """
    if pool == uint64(ALONE) or num_pieces <= 1 or not replace(pool + uint64(BUSY), uint64(0), uint64(1)):
        for piece in range(num_pieces):
            call_with_2(function, arguments, uint64(piece))
        return
    number = _publish(pool, function, arguments, uint64(num_pieces))
    _work(pool, number)
    _wait(pool, uint64(num_pieces))
    write(pool + uint64(BUSY), uint64(0))


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _publish(pool: Any, function: Any, arguments: Any, num_pieces: Any) -> Any:
    """Offer a job to the helpers, wake as many as there are pieces for; return its number."""
    number = read(pool + uint64(TICKET)) >> uint64(32)
    # A helper may still be looking for a piece of the job before; it must not take one while this job is written.
    write(pool + uint64(TICKET), (number << uint64(32)) | uint64(CLOSED))
    write(pool + uint64(JOB), function)
    write(pool + uint64(JOB + 8), arguments)
    write(pool + uint64(JOB + 16), num_pieces)
    write(pool + uint64(DONE), uint64(0))
    number = (number + uint64(1)) & uint64(0xFFFFFFFF)
    write(pool + uint64(TICKET), number << uint64(32))
    for i in range(min(read(pool + uint64(NUM_HELPERS)), num_pieces - uint64(1))):
        helper = pool + uint64(HELPERS) + uint64(i) * uint64(HELPER_BYTES)
        if read(helper) == uint64(1) and exchange(helper, uint64(0)) == uint64(1):
            sem_post(helper + uint64(LINE))
    return number


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _work(pool: Any, number: Any) -> None:
    """Do pieces of a job until all are taken."""
    while True:
        ticket = read(pool + uint64(TICKET))
        piece = ticket & uint64(0xFFFFFFFF)
        function, arguments = read(pool + uint64(JOB)), read(pool + uint64(JOB + 8))
        num_pieces = read(pool + uint64(JOB + 16))
        if ticket >> uint64(32) != number or piece >= num_pieces:
            return
        # If another job has been written since the ticket was read, the ticket has changed too.
        if replace(pool + uint64(TICKET), ticket, ticket + uint64(1)):
            call_with_2(function, arguments, piece)
            is_last = add(pool + uint64(DONE), uint64(1)) + uint64(1) == num_pieces
            if is_last and exchange(pool + uint64(WAITS), uint64(0)) == uint64(1):
                sem_post(pool + uint64(CALLER))
        else:
            pause()


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _wait(pool: Any, num_pieces: Any) -> None:
    """Wait until all pieces are done: other threads compute the last ones."""
    _spin_while(pool + uint64(DONE), uint64(0), num_pieces, False)
    while read(pool + uint64(DONE)) != num_pieces:
        write(pool + uint64(WAITS), uint64(1))
        if read(pool + uint64(DONE)) != num_pieces or exchange(pool + uint64(WAITS), uint64(0)) == uint64(0):
            sem_wait(pool + uint64(CALLER))  # may end early, by a signal or by the thread that ended the job before


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _spin_while(address: Any, shift: Any, value: Any, is_equal: bool) -> None:
    """Spin while the number at the address, shifted right, is `value`, or is not; for at most SPIN_NS."""
    if (read(address) >> shift == value) != is_equal:
        return
    end = now_ns() + uint64(SPIN_NS)
    while now_ns() < end:
        for _ in range(PAUSES_PER_LOOK):
            pause()
            if (read(address) >> shift == value) != is_equal:
                return


@compiled
def _help(pool: Any, helper: Any) -> None:
    """Work on the jobs of a pool for ever. helper: the address of this helper's part of the pool's memory"""
    pool, helper = uint64(pool), uint64(helper)
    seen = uint64(0)
    while True:
        _spin_while(pool + uint64(TICKET), uint64(32), seen, True)
        if read(pool + uint64(TICKET)) >> uint64(32) == seen:
            write(helper, uint64(1))
            if read(pool + uint64(TICKET)) >> uint64(32) == seen or exchange(helper, uint64(0)) == uint64(0):
                sem_wait(helper + uint64(LINE))  # may end early, by a signal
                write(helper, uint64(0))
        number = read(pool + uint64(TICKET)) >> uint64(32)
        if number != seen:
            _work(pool, number)
            seen = number


@compiled
def _prepare(memory: Any, num_helpers: int) -> None:
    pool = address_of(memory)
    write(pool + uint64(NUM_HELPERS), uint64(num_helpers))
    sem_init(pool + uint64(CALLER))
    for i in range(num_helpers):
        sem_init(pool + uint64(HELPERS + LINE) + uint64(i) * uint64(HELPER_BYTES))


def pool_of(num_cores: int) -> int:
    """Return the address of the pool with which a caller and its helpers use num_cores cores, or ALONE for one core."""
    return ALONE if num_cores == 1 else _pool(num_cores)[0]


@cache
def _pool(num_cores: int) -> tuple[int, Any]:
    """Start the helpers of a pool; return its address and its memory.

    The helpers are daemon threads, which the end of the process ends.
    """
    memory = np.zeros(HELPERS + num_cores * HELPER_BYTES, np.uint8)
    memory = memory[-memory.ctypes.data % LINE :]
    _prepare(memory, num_cores - 1)
    for i in range(num_cores - 1):
        arguments = memory.ctypes.data, memory.ctypes.data + HELPERS + i * HELPER_BYTES
        threading.Thread(target=_help, args=arguments, name="core", daemon=True).start()
    return int(memory.ctypes.data), memory


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads
