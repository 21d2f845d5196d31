"""LaunchGraph: repeats a computation in the same memory with few calls, as a CUDA graph does on a GPU.

In a step of one sequence, Python takes as long between the kernels as some of them run. A graph makes all launches
between two operations of PyTorch in one compiled call. It consists of addresses: inputs, weights and the KV cache must
stay where they are.
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

from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.launch import observed
from moray.kernels.cpu.numba_intrinsics import compiled
from moray.kernels.cpu.thread_pool import num_cores

aten = torch.ops.aten
MAKES_MEMORY = {aten.empty, aten.empty_like, aten.new_empty}
MAKES_CONSTANTS = {aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones, aten.new_full, aten.arange}
COPIES = {aten.to, aten._to_copy, aten.clone}
LAUNCH_WORDS = 3  # address of the function, address of its arguments, number of pieces
LINE = 64  # bytes: a tensor begins with a line of the cache
CHUNK_BYTES = 1 << 20  # memory is allocated in chunks, of at least so many bytes


class NotCapturable(Exception):
    """A computation does something that a graph cannot repeat."""


class GraphMemory:
    """Holds the tensors of graphs that share it, of which one runs at a time."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self.start()

    @property
    def num_bytes(self) -> int:
        """Return the size of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def start(self) -> None:
        """Begin with the memory of another graph."""
        self._chunk, self._used = 0, 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor whose memory no other tensor of this graph has."""
        num_bytes = math.prod(shape) * dtype.itemsize
        while self._chunk < len(self._chunks) and self._used + num_bytes > self._chunks[self._chunk].nbytes:
            self._chunk, self._used = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(CHUNK_BYTES, num_bytes), dtype=torch.uint8))
        start = self._used
        self._used += -(-num_bytes // LINE) * LINE
        return self._chunks[self._chunk][start : start + num_bytes].view(dtype).view(shape)


class LaunchGraph:
    """Repeats what it has captured; see `capture`."""

    def __init__(self) -> None:
        self._pool = pool_of(num_cores())
        self._parts: list[Callable[[], object]] = []
        self._arguments: list[array[int]] = []
        self._launches = array("Q")  # since the last part

    @property
    def fits_cores(self) -> bool:
        """Return whether the caller may use as many cores as were used when this was captured."""
        return pool_of(num_cores()) == self._pool

    def replay(self) -> None:
        """Do everything again. The results are in the tensors that `capture` returned."""
        for part in self._parts:
            part()

    def add_launch(self, function: int, arguments: "array[int]", num_pieces: int) -> None:
        """Add a launch of a compiled function."""
        self._arguments.append(arguments)
        self._launches.extend((function, arguments.buffer_info()[0], num_pieces))

    def add_call(self, function: Callable[[], object]) -> None:
        """Add a call of a Python function."""
        self.end()
        self._parts.append(function)

    def end(self) -> None:
        """Add the launches since the last part, as one call."""
        if self._launches:
            launches = np.array(self._launches, np.uint64).reshape(-1, LAUNCH_WORDS)
            self._parts.append(partial(_replay, self._pool, launches))
            self._launches = array("Q")


@compiled
def _replay(pool: int, launches: Any) -> None:
    for i in range(len(launches)):
        run_job(uint64(pool), launches[i, 0], launches[i, 1], launches[i, 2])


def capture(function: Callable[[], tuple[Tensor, ...]], memory: GraphMemory) -> tuple[tuple[Tensor, ...], LaunchGraph]:
    """Call a function; return its results, and a graph that computes them again in the same memory.

    The graph has given the same bits already, after all that was in its memory had been overwritten. So where the
    function adds to something, it has done so twice.

    memory: is used again by each graph that has it

    Raises NotCapturable if the function does something that the graph does not see, or cannot repeat.
    """
    memory.start()
    graph = LaunchGraph()
    operations = _Operations(graph, memory)
    with observed(graph), operations:
        results = function()
    graph.end()
    wanted = [result.clone() for result in results]
    for tensor in operations.made:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    graph.replay()
    if not all(torch.equal(got, want) for got, want in zip(results, wanted, strict=True)):
        raise NotCapturable("a replay gives other numbers: some kernel is not launched by launch.py")
    return results, graph


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Adds the operations of PyTorch to a graph.

    made: the tensors that do not have the memory of another one
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else torch imports its compiler, which takes over a second and 75 MB."""
        return False

    def __init__(self, graph: LaunchGraph, memory: GraphMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []
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
        if result.is_contiguous():
            before, result = result, self._memory.empty(result.shape, result.dtype)
            result.copy_(before)
        self.made.append(result)
        if function.overloadpacket in COPIES:
            self._graph.add_call(partial(result.copy_, args[0]))
        elif function.overloadpacket in MAKES_CONSTANTS:
            self._graph.add_call(partial(result.copy_, result.clone()))
        elif function.overloadpacket not in MAKES_MEMORY:
            self._graph.add_call(partial(_writer(function), *args, **kwargs, out=result))
        return result


def _writer(function: Any) -> Any:
    """Return the form of an operation that writes its result to memory that is there."""
    names = [*(argument.name for argument in function._schema.arguments), "out"]
    for name in ("out", f"{function._overloadname}_out"):
        if name in function.overloadpacket.overloads():
            writer = getattr(function.overloadpacket, name)
            if [argument.name for argument in writer._schema.arguments] == names:
                return writer
    raise NotCapturable(f"{function} cannot write to memory that is there")
