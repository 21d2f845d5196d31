"""Stored tensors read into their places: runs of bytes that follow each other, a system call each, in a few threads.

Where the target is in memory and the stored dtype is its own, the system writes straight into it; else a small buffer
lies between.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.weight_files import StoredTensor
from engine.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Few long calls: each takes Python's lock anew, and waits for it where other work wants the cores.
RUN_BYTES = 16 << 20
RUN_PIECES = 512  # Linux takes 1024 places a call
NUM_HELPERS = min(4, os.cpu_count() or 1) - 1 or 1  # one thread cannot copy as fast as memory could

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """Some of a stored tensor. begin: its first byte in the file; target: where it goes, flat, in its own dtype."""

    tensor: StoredTensor
    begin: int
    target: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.tensor.dtype]

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    @property
    def end(self) -> tuple[Path, int]:
        return self.tensor.file, self.begin + self.num_bytes

    @property
    def is_direct(self) -> bool:
        return self.target.dtype == self.dtype and self.target.device.type == "cpu"


def read_tensors(places: Iterable[tuple[StoredTensor, Tensor]], progress: Progress | None = None) -> int:
    """Fill each tensor (contiguous, of the stored shape) from its file; returns the bytes read.

    places:    in the order of their bytes in the files
    progress:  called with (bytes done, bytes in all) now and then, and at the end

    Raises CheckpointError where a file ends early or a value does not fit float16.
    """
    runs = deque(_runs(places))
    total, counts = sum(piece.num_bytes for run in runs for piece in run), list[int]()

    def work(progress: Progress | None) -> None:
        try:
            while runs:
                with contextlib.suppress(IndexError):  # another thread was quicker
                    counts.append(_read_run(runs.popleft()))
                if progress is not None:
                    progress(sum(counts), total)
        finally:
            runs.clear()  # an error ends the work of all

    with ThreadPoolExecutor(NUM_HELPERS, "load") as threads:
        helpers = [threads.submit(work, None) for _ in range(NUM_HELPERS)]
        work(progress)
        for helper in helpers:
            helper.result()
    if progress is not None:
        progress(total, total)
    return total


def _runs(places: Iterable[tuple[StoredTensor, Tensor]]) -> Iterator[list[Piece]]:
    """Pieces that follow each other in a file, up to RUN_BYTES together."""
    run: list[Piece] = []
    length = 0
    for tensor, target in places:
        flat, item_size = target.view(-1), DTYPES[tensor.dtype].itemsize
        for first in range(0, flat.numel(), RUN_BYTES // item_size):
            piece = Piece(tensor, tensor.begin + first * item_size, flat[first : first + RUN_BYTES // item_size])
            follows = bool(run) and run[-1].end == (tensor.file, piece.begin)
            if run and (not follows or length + piece.num_bytes > RUN_BYTES or len(run) == RUN_PIECES):
                yield run
                run, length = [], 0
            run.append(piece)
            length += piece.num_bytes
    if run:
        yield run


def _read_run(run: list[Piece]) -> int:
    """-> bytes read"""
    buffers, used = [], 0
    for piece in run:
        if piece.is_direct:
            buffers.append(piece.target)
        else:
            buffers.append(_scratch(is_pinned=piece.target.is_cuda)[used : used + piece.num_bytes].view(piece.dtype))
            used += -(-piece.num_bytes // 8) * 8
    _read_into(run, [buffer.view(torch.uint8).numpy().data for buffer in buffers])
    for piece, buffer in zip(run, buffers, strict=True):
        if not piece.is_direct:
            _convert(piece, buffer)
    return sum(piece.num_bytes for piece in run)


def _read_into(run: list[Piece], views: list[memoryview]) -> None:
    file, waiting = run[0].tensor.file, deque(views)
    with open(file, "rb", buffering=0) as stream:
        stream.seek(run[0].begin)
        while waiting:
            count = os.readv(stream.fileno(), waiting)
            if not count:
                name = run[len(run) - len(waiting)].tensor.name
                raise CheckpointError(f"{file} ended while {name} was read. Fetch it again.")
            while waiting and count >= len(waiting[0]):
                count -= len(waiting.popleft())
            if count:
                waiting[0] = waiting[0][count:]


def _convert(piece: Piece, buffer: Tensor) -> None:
    target = piece.target
    target.copy_(buffer)
    if target.dtype == torch.float16 != piece.dtype:
        overflow = target.isinf() & buffer.to(target.device).isfinite()
        if overflow.any():
            raise CheckpointError(
                f"{piece.tensor.name} in {piece.tensor.file} has a value beyond float16's 65,504; "
                "use bfloat16 or float32."
            )


_of_thread = threading.local()


def _scratch(is_pinned: bool) -> Tensor:
    """A run's worth of memory of this thread's own; allocated anew for each run, the heap would keep many of them.

    is_pinned: a GPU fetches from pinned memory several times as fast
    """
    if not hasattr(_of_thread, "scratch"):
        size = RUN_BYTES + 8 * RUN_PIECES
        _of_thread.scratch = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
    scratch: Tensor = _of_thread.scratch
    return scratch
