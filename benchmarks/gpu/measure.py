"""Timing on the device: CUDA graphs replayed in turns, medians of events.

Contenders of one comparison alternate, so that whatever the card's clocks do meanwhile befalls them alike. A
contender is a list of calls, each on weights and caches of its own, together more than the L2 cache holds: each call
finds them cold, as in a step, and its activations warm, as in a step. Times are of one call.
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
    """us: median of one call; spread: 10th to 90th percentile, over the median; error: why there is no time"""

    us: float = math.nan
    spread: float = math.nan
    error: str | None = None


def turns_for(num_bytes: float, most: int = 32) -> int:
    """Over how many copies to rotate what a call reads."""
    return max(2, min(most, math.ceil(COLD_BYTES / max(num_bytes, 1.0))))


def measure(contenders: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, Timing]:
    """Time contenders in turns. One that fails gets its error and does not stop the others."""
    if device.type != "cuda":
        return {name: _once(calls) for name, calls in contenders.items()}
    found: dict[str, Timing] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in contenders.items():
        try:
            graphs[name] = _captured(calls)
        except Exception as error:  # a peer's fault, or the kernel's: a row of the result either way
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
    """Without a GPU: that it runs, and how long it took under Triton's interpreter, which says nothing."""
    started = time.perf_counter()
    for call in calls:
        call()
    return Timing((time.perf_counter() - started) * 1e6 / len(calls), 0.0)


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Not by torch.cuda.graph, which gives the allocator's memory back each time: there are hundreds to capture."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream()):
        for call in calls:  # what is not compiled or reserved yet cannot be while capturing
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
    """One for all captures: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def replayed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def ceilings(device: torch.device) -> tuple[Ceilings, dict[str, Any]]:
    """What this card can do, and the same for the record with its read-only rate. Brings the clocks up meanwhile."""
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
