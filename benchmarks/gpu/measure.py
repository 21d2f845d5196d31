"""Measure times on the device: medians of CUDA events over replayed CUDA graphs, of all contenders in turns.

Contenders alternate, so that changes of the GPU's clocks affect all of them. A contender is a list of calls, each with
weights and caches of its own that together exceed the L2 cache: as in a step, weights and caches are cold, activations
warm. Times are those of one call.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gpu.roofline import Ceilings

Call = Callable[[], object]

ROUNDS = 11
SAMPLE_MS = 2.0  # a sample lasts at least this long: events resolve half a microsecond
COLD_BYTES = 1 << 28  # four times the L2 cache of an H200


@dataclass(frozen=True)
class Timing:
    """Holds the time of a contender.

    us:      median of one call
    spread:  range from the 10th to the 90th percentile, divided by the median
    error:   why there is no time
    """

    us: float = math.nan
    spread: float = math.nan
    error: str | None = None


def turns_for(num_bytes: float, max_turns: int = 32) -> int:
    """Return how many copies of what a call reads exceed the L2 cache.

    num_bytes: bytes that a call reads
    """
    return max(2, min(max_turns, math.ceil(COLD_BYTES / max(num_bytes, 1.0))))


def measure(contenders: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, Timing]:
    """Time contenders in turns. One that fails gets its error and does not stop the others."""
    if device.type != "cuda":
        return {name: _once(calls) for name, calls in contenders.items()}
    found: dict[str, Timing] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in contenders.items():
        try:
            graphs[name] = captured(calls)
        except Exception as error:  # of a peer or of our kernel: the row of the result has it
            found[name] = Timing(error=f"{type(error).__name__}: {str(error)[:300]}")
    repeats = {name: max(1, math.ceil(SAMPLE_MS / replayed(graph, 1))) for name, graph in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            samples[name].append(replayed(graph, repeats[name]) * 1000 / len(contenders[name]))
    for name, times in samples.items():
        tenths = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        found[name] = Timing(median, (tenths[-1] - tenths[0]) / median)
    return {name: found[name] for name in contenders}


def _once(calls: Sequence[Call]) -> Timing:
    """Run each call once without a GPU; its time under Triton's interpreter means nothing."""
    started = time.perf_counter()
    for call in calls:
        call()
    return Timing((time.perf_counter() - started) * 1e6 / len(calls), 0.0)


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Capture the calls as a CUDA graph.

    torch.cuda.graph frees the allocator's memory each time, which takes long for hundreds of graphs.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream()):
        for call in calls:  # compiles kernels and reserves memory, which is not possible during a capture
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return graph


@cache
def _stream() -> torch.cuda.Stream:
    """Return one stream for all captures: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def replayed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Return the milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def ceilings(device: torch.device) -> tuple[Ceilings, dict[str, Any]]:
    """Measure the rates of this GPU, which also raises its clocks.

    Returns them, and a row for the results that has the rate of reading too.
    """
    if device.type != "cuda":
        return Ceilings(1e10, 1e10), {"made_up": True}
    size = 1 << 31
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    wide = source.view(torch.int64)
    calls: dict[str, list[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "read": [lambda: wide.sum()],
        "matmul": [lambda: torch.matmul(a, b, out=out)] * 4,
    }
    measure(calls, device)
    times = measure(calls, device)
    found = Ceilings(2 * size / times["copy"].us * 1e6, 2 * 8192**3 / times["matmul"].us * 1e6)
    record = {
        "copy_tb_per_s": round(found.bytes_per_s / 1e12, 3),
        "read_tb_per_s": round(size / times["read"].us / 1e6, 3),
        "bf16_tflop_per_s": round(found.flops_per_s / 1e12, 1),
    }
    return found, record
