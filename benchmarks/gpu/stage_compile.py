"""Compile all programs into Triton's cache on disk, in many processes: one process would take minutes.

What does not compile fails again in the stage that measures it.
"""

import multiprocessing
import time
from collections.abc import Iterator

import torch

from gpu.cases import DRY_ROWS, ROWS
from gpu.setup import NO_TIME, Row, Setup
from gpu.stage_kernels import groups

PROCESSES = 12
PARTS = 3  # processes that share the numbers of rows of a group of operations


def run(setup: Setup) -> Iterator[Row]:
    started = time.time()
    rows = DRY_ROWS if setup.is_dry else ROWS
    jobs = [
        (setup, i, rows[part::PARTS]) for part in range(PARTS) for i in range(len(groups(setup.device, setup.is_dry)))
    ]
    if setup.is_dry:  # one group is enough
        compile_some(*jobs[1])
        yield {"compiled": 1, "seconds": time.time() - started}
        return
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        results = [pool.apply_async(compile_some, job) for job in jobs]
        for done, result in enumerate(results, 1):
            try:
                result.get(setup.seconds_left)
            except multiprocessing.TimeoutError:
                yield {"compiled": done - 1, "of": len(jobs), "error": NO_TIME}
                return
            except Exception as error:
                print(f"{jobs[done - 1][1:]}: {error}", flush=True)
    yield {"compiled": len(jobs), "seconds": time.time() - started}


def compile_some(setup: Setup, index: int, rows: tuple[int, ...]) -> None:
    """Run each operation of a group once at each number of rows."""
    for op in groups(setup.device, setup.is_dry)[index]():
        for count in rows:
            if count <= op.max_rows:
                try:
                    case = op.build(count)
                    for calls in (case.ours, *case.peers.values()):
                        calls[0]()
                except Exception as error:
                    print(f"{op.name}, {count} rows: {error}", flush=True)
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
