"""TRITON: the CUDA backend under test, on the GPU or else under Triton's interpreter."""

from collections.abc import Callable

import torch
from triton_device import DEVICE

from moray.engine.backends.cuda.backend import CudaBackend
from moray.engine.platform.memory import available_bytes


class InterpretedBackend(CudaBackend):
    """The CUDA backend with its tensors in the host's memory, where there is nothing to wait for and no graph."""

    is_async = False
    device_name = "Triton's interpreter"  # type: ignore[assignment]

    @property
    def available_bytes(self) -> int:
        return available_bytes()

    def check_dtype(self, dtype: torch.dtype) -> None:
        pass

    def wait_for_memory(self) -> None:
        pass

    def measure_peak(self, step: Callable[[], object]) -> int:
        return 0

    def capture_graphs(self, *_: object) -> None:
        pass


TRITON = (InterpretedBackend if DEVICE == "cpu" else CudaBackend)(torch.device(DEVICE))
