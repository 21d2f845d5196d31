"""Find the CUDA device and check that the kernels run on it. The kernels, and Triton, are imported only after that."""

import logging
import time

import torch

from moray.engine.backends.base import Backend
from moray.engine.errors import DeviceError
from moray.engine.partition import SIZES
from moray.engine.platform.cuda_driver import describe_torch, explain_missing_cuda
from moray.engine.platform.gpu_support import find_capability_problem
from moray.engine.platform.toolchain import find_toolchain_problems, has_built_launchers
from moray.engine.settings.sizes import GIB

logger = logging.getLogger(__name__)

FREE_WITHIN_S = 30.0  # how long to wait for the memory of a process that has ended to be freed
FREE_SHARE = 0.85  # share of a GPU's memory that is free when no other process computes on it; a desktop uses some
POLL_S = 0.5  # time between two checks of the free memory


def has_cuda() -> bool:
    """Return whether torch sees an NVIDIA GPU. A GPU of AMD is logged."""
    if torch.cuda.is_available() and torch.version.hip is not None:
        logger.warning("%s; the kernels run on NVIDIA GPUs alone, so the CPU computes", describe_torch())
        return False
    return torch.cuda.is_available()


def open_cuda() -> Backend:
    """Return the backend of the current CUDA device.

    Raises DeviceError if there is none, or if the kernels do not run on it or cannot be built.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise DeviceError(f"the device is 'cuda' and this process sees no CUDA device: {explain_missing_cuda()}")
    device = torch.device("cuda", torch.cuda.current_device())
    check_capability(device)
    if problems := find_toolchain_problems():
        text = f"Triton cannot build the launchers of its kernels here: {'; '.join(problems)}"
        if not has_built_launchers():
            raise DeviceError(text)
        logger.warning("%s. Its cache holds some; a step that needs another will fail", text)
    from moray.engine.backends.cuda.backend import CudaBackend

    return CudaBackend(device)


def check_capability(device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raise DeviceError if the kernels do not run on this GPU, or not in this dtype."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if problem := find_capability_problem(torch.cuda.get_device_capability(device), name):
        raise DeviceError(f"no kernel runs on {torch.cuda.get_device_name(device)}: {problem} ({describe_torch()})")


def check_gpus(size: int) -> None:
    """Raise DeviceError unless this process sees a GPU for each of `size` ranks, all of one kind and not too old."""
    if (visible := torch.cuda.device_count()) < size:
        raise DeviceError(
            f"engine.tensor_parallel is {size} and this process sees {visible} GPU{'' if visible == 1 else 's'}; give "
            f"it {size}, or lower engine.tensor_parallel to {max(n for n in SIZES if n <= visible)}."
        )
    names = [torch.cuda.get_device_name(index) for index in range(size)]
    if other := next((index for index, name in enumerate(names) if name != names[0]), None):
        raise DeviceError(
            f"engine.tensor_parallel is {size} and the GPUs are of several kinds: GPU 0 is {names[0]}, GPU {other} is "
            f"{names[other]}. All ranks need the same: choose them with CUDA_VISIBLE_DEVICES, or set it to 1."
        )
    for index in range(size):
        check_capability(torch.device("cuda", index))


def wait_for_memory(device: torch.device) -> None:
    """Wait, at most 30 s, until the memory of a GPU that this process has for itself is free.

    The driver frees the memory of a worker some time after the worker has ended; free memory that is measured before
    that is too low.
    """
    end_s = time.monotonic() + FREE_WITHIN_S
    free, total = torch.cuda.mem_get_info(device)
    while free < FREE_SHARE * total:
        if time.monotonic() > end_s:
            logger.warning(
                "%.1f of %.1f GiB of the GPU's memory are in use by other processes", (total - free) / GIB, total / GIB
            )
            return
        time.sleep(POLL_S)
        free, total = torch.cuda.mem_get_info(device)
