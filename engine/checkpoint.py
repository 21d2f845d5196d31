"""Checkpoint: published weight files, streamed tensor by tensor into a model's own (fused) parameters.

Everything is checked against the headers before a byte of data is read. Where the stored dtype is the parameter's, the
kernel reads straight into the parameter's memory; else a small buffer lies between. Peak memory is the model.
"""

import contextlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.huge_pages import advise_huge_pages
from engine.weight_files import StoredTensor, find_weight_files, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tables and masks that older files carry and that are computed here.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.\w+|masked_bias|causal_mask|attn\.bias)$")
PIECE_BYTES = 8 << 20  # read at once, by one thread
NUM_THREADS = min(4, os.cpu_count() or 1)  # one cannot copy out of the page cache as fast as memory could
PROGRESS_SECONDS = 0.2
MAX_ALIKE = 8  # tensors whose names differ by numbers only that are named one by one

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Target:
    """Where one stored tensor goes.

    param:  dotted name of the model's parameter
    shape:  as stored
    index:  the region of the parameter that it fills, contiguous; () = all of it
    """

    param: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()


TensorMap = Mapping[str, Target]


@dataclass(frozen=True)
class LoadReport:
    """bytes: read from the files."""

    bytes: int
    seconds: float


class Checkpoint:
    """The weight files of a folder. `tensors` is every stored tensor by name, from the headers.

    Raises CheckpointError where the layout is not supported, a file is missing or cut short, or index and files differ.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; a model is a folder with config.json and weights in it.")
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._read_headers()
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None

    def _read_headers(self) -> None:
        names = {path.name for path in self.folder.iterdir() if path.is_file()}
        indexed = find_weight_files(names, lambda name: (self.folder / name).read_bytes(), str(self.folder))
        self.files = tuple(self.folder / name for name in indexed)
        for file, promised in zip(self.files, indexed.values(), strict=True):
            header = read_header(file)
            if promised is not None and promised != header.keys():
                raise CheckpointError(
                    f"{file} and the index differ."
                    + _list("In the index only", promised - header.keys())
                    + _list("In the file only", header.keys() - promised)
                )
            self.tensors |= header

    def load_into(self, model: nn.Module, tensor_map: TensorMap, progress: Progress | None = None) -> LoadReport:
        """Fill the parameters that `tensor_map` (stored name -> Target) names, converting to their dtypes.

        progress: called with (bytes done, bytes in all) now and then, and at the end

        Raises CheckpointError naming every missing, extra, misshapen or wrongly typed tensor, before reading any;
        while reading, where a file ends early or a value does not fit float16.
        """
        self._check(tensor_map)
        regions = _regions(model, tensor_map)
        for param in model.parameters():
            advise_huge_pages(param)
        wanted = [tensor for tensor in self.tensors.values() if tensor.name in regions]
        total = sum(tensor.end - tensor.begin for tensor in wanted)
        start = time.perf_counter()
        _read_all(deque(piece for tensor in wanted for piece in _pieces(tensor, regions[tensor.name])), total, progress)
        return LoadReport(total, time.perf_counter() - start)

    def _check(self, tensor_map: TensorMap) -> None:
        stored = {name: tensor for name, tensor in self.tensors.items() if name in tensor_map}
        misshapen = [
            f"{name} {list(tensor.shape)}, must be {list(tensor_map[name].shape)}"
            for name, tensor in stored.items()
            if tensor.shape != tensor_map[name].shape
        ]
        problems = (
            _list("Missing", tensor_map.keys() - stored.keys())
            + _list(
                "Not of this model", (name for name in self.tensors.keys() - stored.keys() if not IGNORED.search(name))
            )
            + _list("Of another shape", misshapen)
            + _list(
                f"Of a dtype other than {', '.join(DTYPES)}",
                (f"{name} {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in DTYPES),
            )
        )
        if problems:
            raise CheckpointError(f"The weights in {self.folder} do not fit its config.json.{problems}")


@dataclass(frozen=True)
class _Piece:
    """Some of a stored tensor. begin: its first byte in the file; target: where it goes, flat, in the parameter."""

    tensor: StoredTensor
    begin: int
    target: Tensor

    def read(self) -> int:
        """-> bytes read"""
        dtype, target = DTYPES[self.tensor.dtype], self.target
        is_direct = target.dtype == dtype and target.device.type == "cpu"
        buffer = target if is_direct else _scratch()[: target.numel() * dtype.itemsize].view(dtype)
        self._read_into(buffer.view(torch.uint8).numpy().data)
        if not is_direct:
            target.copy_(buffer)
            if target.dtype == torch.float16 != dtype and bool(
                (target.isinf() & buffer.to(target.device).isfinite()).any()
            ):
                raise CheckpointError(
                    f"{self.tensor.name} in {self.tensor.file} has a value beyond float16's 65,504; "
                    "use bfloat16 or float32."
                )
        return buffer.nbytes

    def _read_into(self, memory: memoryview) -> None:
        with open(self.tensor.file, "rb", buffering=0) as stream:
            stream.seek(self.begin)
            while memory:
                count = stream.readinto(memory)
                if not count:
                    raise CheckpointError(
                        f"{self.tensor.file} ended while {self.tensor.name} was read. Fetch it again."
                    )
                memory = memory[count:]


def _pieces(tensor: StoredTensor, region: Tensor) -> Iterator[_Piece]:
    flat, item_size = region.view(-1), DTYPES[tensor.dtype].itemsize
    step = PIECE_BYTES // item_size
    for begin in range(0, flat.numel(), step):
        yield _Piece(tensor, tensor.begin + begin * item_size, flat[begin : begin + step])


def _read_all(pieces: deque[_Piece], total: int, progress: Progress | None) -> None:
    """Empties `pieces`. One task a thread, not one a piece: waking this thread for each would double the time."""
    counts: list[int] = []

    def work() -> None:
        while pieces:
            with contextlib.suppress(IndexError):  # another thread was quicker
                counts.append(pieces.popleft().read())

    with ThreadPoolExecutor(NUM_THREADS, "load") as threads:
        tasks = {threads.submit(work) for _ in range(NUM_THREADS)}
        try:
            while tasks:
                finished, tasks = wait(tasks, PROGRESS_SECONDS, FIRST_COMPLETED)
                if progress is not None:
                    progress(sum(counts), total)
                for task in finished:
                    task.result()
        finally:
            pieces.clear()


_of_thread = threading.local()


def _scratch() -> Tensor:
    """PIECE_BYTES of memory of this thread's own; allocated anew for each piece, the heap would keep many of them."""
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = torch.empty(PIECE_BYTES, dtype=torch.uint8)
    scratch: Tensor = _of_thread.scratch
    return scratch


def _regions(model: nn.Module, tensor_map: TensorMap) -> dict[str, Tensor]:
    """Stored name -> the region it fills; together the regions are all of the model's parameters, asserted."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    regions = {name: params[target.param][target.index] for name, target in tensor_map.items()}
    filled = dict.fromkeys(params, 0)
    for name, target in tensor_map.items():
        region = regions[name]
        assert region.shape == target.shape and region.is_contiguous(), f"{name} {target} gives {region.shape}"
        filled[target.param] += region.numel()
    uneven = {name: (count, params[name].numel()) for name, count in filled.items() if count != params[name].numel()}
    assert not uneven, f"parameters not filled exactly once (elements mapped, elements there): {uneven}"
    return regions


def _list(title: str, names: Iterable[str]) -> str:
    """A line of names; many that differ by numbers only are named by their pattern, their count and the first."""
    alike: dict[str, list[str]] = {}
    for name in sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        alike.setdefault(re.sub(r"\d+(?=\.)", "*", name), []).append(name)
    items = [
        text
        for pattern, group in alike.items()
        for text in (group if len(group) <= MAX_ALIKE else [f"{pattern} ({len(group)} tensors, the first {group[0]})"])
    ]
    return f"\n{title}: {', '.join(items)}." if items else ""
