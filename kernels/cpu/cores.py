"""Work for several cores at once: each takes the next piece and computes it alone.

Torch's own threads part and meet again around every operation, which costs some ten microseconds each time. Pieces of
a hundred microseconds had better stay on one core.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


def each_on_one_core(function: Callable[[int], None], pieces: Sequence[int]) -> None:
    """Call function(piece) for each, first things first, on torch.get_num_threads() threads, the caller's among them.

    Raises what the function raises.
    """
    num_cores = torch.get_num_threads()
    left = list(reversed(pieces))

    def work() -> None:
        while True:
            try:
                piece = left.pop()
            except IndexError:
                return
            function(piece)

    if num_cores == 1:
        return work()
    inference = torch.is_inference_mode_enabled()  # each thread has its own

    def work_beside() -> None:
        with torch.inference_mode(inference):
            work()

    others = [_helpers(num_cores).submit(work_beside) for _ in range(min(num_cores, len(pieces)) - 1)]
    torch.set_num_threads(1)
    try:
        work()
        for other in others:
            other.result()
    finally:
        torch.set_num_threads(num_cores)


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
