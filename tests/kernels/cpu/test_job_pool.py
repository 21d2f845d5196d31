"""Tests of the pool whose helpers wait in compiled code."""

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from numba import uint64
from patience import PATIENCE_S

from moray.kernels.cpu.atomics import add, nap, pause, read
from moray.kernels.cpu.job_pool import ALONE, pool_of, run_job
from moray.kernels.cpu.numba_intrinsics import CFunction, compiled
from moray.kernels.cpu.vectors import address_of


def count(counters: Any, piece: Any) -> None:
    """Count each piece."""
    add(counters + uint64(8) * piece, uint64(1))


def wait_for_the_last(counters: Any, piece: Any) -> None:
    """Wait, in every piece but the first, until the piece before is done."""
    if piece > uint64(0):
        while read(counters + uint64(8) * (piece - uint64(1))) == uint64(0):
            pause()
            nap()
    add(counters + uint64(8) * piece, uint64(1))


COUNT, WAIT = CFunction(count), CFunction(wait_for_the_last)


@compiled
def run(pool: int, function: int, counters: Any, num_pieces: int, times: int) -> None:
    for _ in range(times):
        run_job(uint64(pool), uint64(function), address_of(counters), uint64(num_pieces))


@pytest.mark.parametrize("cores", [1, 2, 3, 9])
@pytest.mark.parametrize("num_pieces", [0, 1, 2, 100])
def test_each_piece_is_done_once(cores: int, num_pieces: int) -> None:
    counters = np.zeros(100, np.uint64)
    for times in (1, 1, 2000):
        counters[:] = 0
        run(pool_of(cores), COUNT.address, counters, num_pieces, times)
        assert list(counters) == [times] * num_pieces + [0] * (100 - num_pieces)


@pytest.mark.parametrize("cores", [1, 2, 9])
def test_a_piece_may_wait_for_those_before(cores: int) -> None:
    for _ in range(50):
        counters = np.zeros(40, np.uint64)
        run(pool_of(cores), WAIT.address, counters, 40, 1)
        assert list(counters) == [1] * 40


def test_helpers_that_sleep_are_woken() -> None:
    counters = np.zeros(2, np.uint64)
    asleep = threading.Event()
    for i in range(20):
        asleep.wait(0.001 * (i % 3))  # long after the helpers stop spinning, and at once
        run(pool_of(3), COUNT.address, counters, 2, 1)
    assert list(counters) == [20, 20]


def test_several_callers_share_a_pool() -> None:
    counters = [np.zeros(4, np.uint64) for _ in range(4)]

    def call(of_caller: Any) -> None:
        for _ in range(300):
            run(pool_of(2), COUNT.address, of_caller, 4, 3)

    callers = [threading.Thread(target=call, args=(of_caller,)) for of_caller in counters]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert [list(of_caller) for of_caller in counters] == [[900] * 4] * 4


def test_an_idle_pool_uses_no_core() -> None:
    counters = np.zeros(4, np.uint64)
    run(pool_of(9), COUNT.address, counters, 4, 1)
    helpers = [thread.native_id for thread in threading.enumerate() if thread.name == "core"]
    assert len(helpers) >= 8
    deadline = threading.Event()
    for _ in range(int(PATIENCE_S * 10)):
        deadline.wait(0.1)
        if {state_of(helper) for helper in helpers} == {"S"}:
            return
    raise AssertionError("helpers still spin")


def state_of(thread: int | None) -> str:
    """Return the state of a thread of this process as in /proc: S for sleeping."""
    with open(f"/proc/self/task/{thread}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_child_process_has_helpers_of_its_own() -> None:
    counters = np.zeros(30, np.uint64)
    parent = pool_of(2)
    run(parent, COUNT.address, counters, 30, 1)
    child = os.fork()
    if child == 0:
        counters[:] = 0
        pool = pool_of(2)
        run(pool, COUNT.address, counters, 30, 5)
        os._exit(0 if pool != ALONE and list(counters) == [5] * 30 else 1)
    end_s = time.monotonic() + PATIENCE_S
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
