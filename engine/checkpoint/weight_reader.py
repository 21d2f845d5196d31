"""Read stored tensors into their targets: one system call per run of consecutive bytes, in a few threads.

If the target is in memory and has the stored dtype, the system writes directly into it; else the bytes go through a
small buffer.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.checkpoint.weight_files import Place, StoredTensor
from moray.engine.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Few long calls: each acquires Python's lock again, and waits for it if other work needs the cores.
RUN_BYTES = 16 << 20
RUN_PIECES = 512  # buffers per call; Linux allows 1024
NUM_HELPERS = min(4, os.cpu_count() or 1) - 1 or 1  # one thread cannot use the whole bandwidth of memory

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """Describes a part of a stored tensor.

    begin:     its first byte in the file
    num_read:  how many numbers are read: more than the target has if the tensor is in a matrix with others
    target:    where they go, in the target's own dtype: flat, or [rows, columns] if the tensor is in a matrix
    """

    tensor: StoredTensor
    begin: int
    num_read: int
    target: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored dtype."""
        return DTYPES[self.tensor.dtype]

    @property
    def num_bytes(self) -> int:
        """Return the number of its bytes in the file."""
        return self.num_read * self.dtype.itemsize

    @property
    def end(self) -> tuple[str, int]:
        """Return the file, and the offset after the piece."""
        return self.tensor.file, self.begin + self.num_bytes

    @property
    def is_direct(self) -> bool:
        """Return whether the bytes can be read directly into the target."""
        is_as_stored = self.tensor.place is None and self.target.dtype == self.dtype
        return is_as_stored and self.target.device.type == "cpu"


def read_tensors(targets: Iterable[tuple[StoredTensor, Tensor]], progress: Progress | None = None) -> int:
    """Fill each target (contiguous, of the stored shape) from its tensor's file; return the bytes read.

    targets:   in the order of the tensors' bytes in the files
    progress:  called with (bytes done, bytes in all) now and then, and at the end

    Raises CheckpointError if a file ends early or a value does not fit float16.
    """
    runs = deque(_runs(targets))
    total, counts = sum(piece.num_bytes for run in runs for piece in run), list[int]()

    def work(progress: Progress | None) -> None:
        try:
            while runs:
                with contextlib.suppress(IndexError):  # another thread took the last run
                    counts.append(_read_run(runs.popleft()))
                if progress is not None:
                    progress(sum(counts), total)
        finally:
            runs.clear()  # after an error, all threads stop

    with ThreadPoolExecutor(NUM_HELPERS, "load") as threads:
        helpers = [threads.submit(work, None) for _ in range(NUM_HELPERS)]
        work(progress)
        for helper in helpers:
            helper.result()
    if progress is not None:
        progress(total, total)
    return total


def _runs(targets: Iterable[tuple[StoredTensor, Tensor]]) -> Iterator[list[Piece]]:
    """Yield runs of pieces that are consecutive in a file, up to RUN_BYTES each."""
    run: list[Piece] = []
    length = 0
    for tensor, target in targets:
        for piece in _pieces(tensor, target):
            follows = bool(run) and run[-1].end == (tensor.file, piece.begin)
            if run and (not follows or length + piece.num_bytes > RUN_BYTES or len(run) == RUN_PIECES):
                yield run
                run, length = [], 0
            run.append(piece)
            length += piece.num_bytes
    if run:
        yield run


def _pieces(tensor: StoredTensor, target: Tensor) -> Iterator[Piece]:
    """Cut a tensor into pieces of up to RUN_BYTES."""
    item_size, place = DTYPES[tensor.dtype].itemsize, tensor.place
    most = RUN_BYTES // item_size
    if place is None:
        flat = target.view(-1)
        for first in range(0, flat.numel(), most):
            part = flat[first : first + most]
            yield Piece(tensor, tensor.begin + first * item_size, len(part), part)
        return
    rows = target.view(len(target), -1)
    if place.are_columns:
        for first in range(0, rows.shape[1], most // place.total):
            part = rows[:, first : first + most // place.total]
            yield Piece(tensor, tensor.begin + first * place.total * item_size, part.shape[1] * place.total, part)
        return
    width = rows.shape[1]
    for first in range(0, len(rows), most // (place.step * width)):
        part = rows[first : first + most // (place.step * width)]
        begin = tensor.begin + (place.first + first * place.step) * width * item_size
        yield Piece(tensor, begin, ((len(part) - 1) * place.step + 1) * width, part)


def _read_run(run: list[Piece]) -> int:
    """Read a run of pieces, and return the number of bytes read."""
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
    file, remaining = run[0].tensor.file, deque(views)
    with open(file, "rb", buffering=0) as stream:
        stream.seek(run[0].begin)
        while remaining:
            count = os.readv(stream.fileno(), remaining)
            if not count:
                name = run[len(run) - len(remaining)].tensor.name
                raise CheckpointError(f"{file} ended while {name} was read. Fetch it again.")
            while remaining and count >= len(remaining[0]):
                count -= len(remaining.popleft())
            if count:
                remaining[0] = remaining[0][count:]


def _convert(piece: Piece, buffer: Tensor) -> None:
    target = piece.target
    numbers = buffer if piece.tensor.place is None else _take_rows(piece.tensor.place, buffer.to(target.device), target)
    target.copy_(numbers)
    if target.dtype == torch.float16 != piece.dtype:
        overflow = target.isinf() & numbers.to(target.device).isfinite()
        if overflow.any():
            raise CheckpointError(
                f"{piece.tensor.name} in {piece.tensor.file} has a value beyond float16's 65,504; "
                "use bfloat16 or float32."
            )


def _take_rows(place: Place, buffer: Tensor, target: Tensor) -> Tensor:
    """Return the numbers of a piece, [rows, columns] as the target, from all that were read."""
    if not place.are_columns:
        return buffer.view(-1, target.shape[1])[:: place.step]
    stop = place.first + (len(target) - 1) * place.step + 1
    return buffer.view(-1, place.total)[:, place.first : stop : place.step].T


_thread_local = threading.local()


def _scratch(is_pinned: bool) -> Tensor:
    """Return this thread's scratch memory for a run. Allocating it for each run would leave many of them in the heap.

    is_pinned: use pinned memory, from which a GPU copies several times as fast
    """
    if not hasattr(_thread_local, "scratch"):
        size = RUN_BYTES + 8 * RUN_PIECES
        _thread_local.scratch = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
    scratch: Tensor = _thread_local.scratch
    return scratch
