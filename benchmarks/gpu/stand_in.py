"""A stand-in for a GPU: the host does all that it does for a step on a GPU, and what it launches is dropped.

Triton binds and specializes the arguments of every launch, and finds the program in its cache, as on a GPU; there is no
program, and nothing runs. CUDA graphs are captured and replayed in the same way. Tensors are in the host's memory, so
PyTorch's own operations run there, on the tiny tensors of a tiny model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moray.engine.backends.cuda.backend import CudaBackend

TARGET = GPUTarget("cuda", 80, 32)
SAMPLED = 7  # the token that every row gets


class StandInBackend(CudaBackend):
    """Represents a GPU of which there is only the host's part."""

    device_name = "a stand-in for a GPU"

    @property
    def available_bytes(self) -> int:
        return 1 << 32

    def check_dtype(self, dtype: torch.dtype) -> None:
        pass

    def wait_for_memory(self) -> None:
        pass

    def measure_peak(self, step: Callable[[], object]) -> int:
        return 0


class Counts:
    """Counts what was launched.

    kernels:  launches of Triton's kernels, those of captures included
    replays:  replayed graphs
    """

    kernels = 0
    replays = 0


class _Program:
    """A compiled kernel whose launch is dropped."""

    function = packed_metadata = None

    def __init__(self, kernel: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        is_sampling = kernel.fn.__name__ == "_sample_kernel"
        # Where the launcher gets the sampled tokens, after grid, stream, function, two metadata and two hooks.
        self._token_ids = 9 + names.index("token_ids") if is_sampling else None

    def launch_metadata(self, *_: object) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        Counts.kernels += 1
        if self._token_ids is not None:
            arguments[self._token_ids].fill_(SAMPLED)


class _Driver:
    """Triton's driver of a GPU that has no memory, and no queue of work."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


class _Graph:
    def capture_begin(self, **_: Any) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        Counts.replays += 1


@contextmanager
def _capture(graph: _Graph, **_: Any) -> Iterator[None]:
    yield


@contextmanager
def _on_stream(stream: object) -> Iterator[None]:
    yield


def _compile(kernel: Any, key: object, signature: object, device: int, *_: object) -> _Program:
    program = _Program(kernel)
    kernel.device_caches[device][0][key] = program
    return program


def use_stand_in() -> StandInBackend:
    """Replace this process's GPU by the stand-in, and return the backend that uses it."""
    driver.set_active(_Driver())
    JITFunction._do_compile = _compile
    of_cuda: dict[str, Any] = {
        "CUDAGraph": _Graph,
        "graph": _capture,  # as checkouts capture that compare themselves with this one
        "Stream": lambda device=None: None,
        "stream": _on_stream,
        "graph_pool_handle": lambda: None,
        "synchronize": lambda device=None: None,
    }
    for name, value in of_cuda.items():
        setattr(torch.cuda, name, value)
    return StandInBackend(torch.device("cpu"))


def zeros(tensor: Tensor) -> object:
    """Fill a weight, which nothing reads."""
    return tensor.zero_()
