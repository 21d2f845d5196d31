"""LaunchGraph: repeats a computation in the same memory with few calls, as a CUDA graph does on a GPU.

In a step of one sequence, Python takes as long between the kernels as some of them run. A graph makes all launches
between two operations of PyTorch in one compiled call. It consists of addresses: inputs, weights and the KV cache must
stay where they are.

A graph does not see what reads or writes tensors in another way: a kernel that is not launched by launch.py, or a
number that Python reads. So compare some replays, after spoil(), with what the function computes.
"""

import math
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import uint64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moray.kernels.cpu.atomics import read, write
from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.launch import NO_REPORT, observed
from moray.kernels.cpu.numba_intrinsics import array_at, compiled
from moray.kernels.cpu.thread_pool import num_cores

aten = torch.ops.aten
MAKES_MEMORY = {aten.empty, aten.empty_like, aten.new_empty}
LAUNCH_WORDS = 4  # address of the function, address of its arguments, number of pieces, address of its report
LINE = 64  # bytes: a tensor begins with a line of the cache
CHUNK_BYTES = 1 << 20  # of the smallest chunk of memory


class NotCapturable(Exception):
    """A computation does something that a graph cannot repeat."""


class GraphMemory:
    """Holds the tensors of graphs that share it, of which one runs at a time.

    Chunks have sizes of powers of two: larger graphs, which mostly come later, fill those of smaller ones.
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used: list[int] = []  # bytes of each chunk, of this graph

    @property
    def num_bytes(self) -> int:
        """Return the size of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def start(self) -> None:
        """Begin another graph, which may have all of the memory."""
        self._used = [0] * len(self._chunks)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor whose memory no other tensor of this graph has."""
        num_bytes = math.prod(shape) * dtype.itemsize
        for i, chunk in enumerate(self._chunks):
            if self._used[i] + num_bytes <= chunk.nbytes:
                break
        else:
            i, size = len(self._chunks), max(CHUNK_BYTES, 1 << (num_bytes - 1).bit_length())
            self._chunks.append(torch.empty(size, dtype=torch.uint8))
            self._used.append(0)
        start = self._used[i]
        self._used[i] += -(-num_bytes // LINE) * LINE
        return self._chunks[i][start : start + num_bytes].view(dtype).view(shape)


class LaunchGraph:
    """Repeats what it has captured; see `capture`.

    made: the tensors of the computation that have memory of their own
    """

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self._pool = pool_of(num_cores())
        self._parts: list[Callable[[], object]] = []
        self._arguments: list[array[int]] = []
        self._launches = array("Q")  # since the last part

    @property
    def fits_cores(self) -> bool:
        """Return whether the caller may use as many cores as were used when this was captured."""
        return pool_of(num_cores()) == self._pool

    def replay(self) -> None:
        """Do everything again. The results are in the tensors that `capture` returned.

        Raises MemoryError if a kernel found no memory.
        """
        for part in self._parts:
            part()

    def spoil(self) -> None:
        """Overwrite what the computation has made: with NaN, and with zeros where numbers are whole."""
        for tensor in self.made:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    def add_launch(self, function: int, arguments: "array[int]", num_pieces: int, report: int) -> None:
        """Add a launch of a compiled function."""
        self._arguments.append(arguments)
        self._launches.extend((function, arguments.buffer_info()[0], num_pieces, report))

    def add_call(self, function: Callable[[], object]) -> None:
        """Add a call of a Python function."""
        self.end()
        self._parts.append(function)

    def end(self) -> None:
        """Add the launches since the last part, as one call."""
        if self._launches:
            self._parts.append(partial(_replay_all, self._pool, self._launches))
            self._launches = array("Q")


def _replay_all(pool: int, words: "array[int]") -> None:
    if not _replay(pool, *words.buffer_info()):
        raise MemoryError("a kernel found no memory")


@compiled
def _replay(pool: int, address: int, num_words: int) -> bool:
    """Make launches until one fails; return whether none did."""
    launches = array_at(uint64(address), (num_words // LAUNCH_WORDS, LAUNCH_WORDS), np.uint64)
    for i in range(len(launches)):
        report = launches[i, 3]
        if report != uint64(NO_REPORT):
            write(report, uint64(0))
        run_job(uint64(pool), launches[i, 0], launches[i, 1], launches[i, 2])
        if report != uint64(NO_REPORT) and read(report) == uint64(0):
            return False
    return True


def capture(function: Callable[[], tuple[Tensor, ...]], memory: GraphMemory) -> tuple[tuple[Tensor, ...], LaunchGraph]:
    """Call a function; return its results, and a graph that computes them again in the same memory.

    memory: is used again by each graph that has it

    Raises NotCapturable if the function does something that the graph cannot repeat.
    """
    memory.start()
    graph = LaunchGraph()
    with observed(graph), _Operations(graph, memory):
        results = function()
    graph.end()
    return results, graph


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Adds the operations of PyTorch to a graph."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else torch imports its compiler, which takes over a second and 75 MB."""
        return False

    def __init__(self, graph: LaunchGraph, memory: GraphMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph, self._memory = graph, memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            raise NotCapturable(f"{function} returns no tensor")
        if function._schema.is_mutable:
            self._graph.add_call(partial(function, *args, **kwargs))
            return result
        storage = result.untyped_storage().data_ptr()
        if any(isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == storage for arg in args):
            return result  # a view, or a copy that was not necessary
        if not result.is_contiguous():
            raise NotCapturable(f"{function} returns a tensor with gaps")
        kept = self._memory.empty(result.shape, result.dtype)
        self._graph.made.append(kept)
        if function.overloadpacket not in MAKES_MEMORY:
            kept.copy_(result)
            self._graph.add_call(partial(_compute, kept, function, args, kwargs))
        return kept


def _compute(result: Tensor, function: Any, args: Any, kwargs: Any) -> None:
    result.copy_(function(*args, **kwargs))
