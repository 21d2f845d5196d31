"""Explain why torch sees no CUDA device: the build of torch, the driver or a setting that hides the GPUs."""

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

PROC = Path("/proc/driver/nvidia/version")
_USE_CPU = "set MORAY_DEVICE=cpu to compute on the CPU"
MIN_DRIVER_BRANCH = {11: 450, 12: 525, 13: 580}  # major version of CUDA -> oldest driver branch that supports it


def driver_version() -> str | None:
    """Read the version of NVIDIA's driver from /proc, else from NVML (WSL has no such file); None if neither has it."""
    with suppress(OSError):
        if found := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", PROC.read_text()):
            return found[1]
    with suppress(OSError, AttributeError):
        return _query_nvml(ctypes.CDLL("libnvidia-ml.so.1"))
    return None


def _query_nvml(nvml: ctypes.CDLL) -> str | None:
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        return text.value.decode() if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0 else None
    finally:
        nvml.nvmlShutdown()


def describe_torch() -> str:
    """Return a phrase with torch's version and the CUDA or ROCm that it is built for."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm {torch.version.hip}"
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    return f"torch {torch.__version__} is built {built}"


def explain_missing_cuda() -> str:
    """Return the known reasons why torch.cuda.is_available() is False, with the fix."""
    version = driver_version()
    driver = "no NVIDIA driver is found" if version is None else f"the NVIDIA driver is {version}"
    return f"{describe_torch()}, {driver}. {_fix(version)}"


def _fix(driver: str | None) -> str:
    if torch.version.hip is not None:
        return f"The kernels run on NVIDIA GPUs alone, of compute capability 7.5 and newer: {_USE_CPU}"
    if torch.version.cuda is None and driver is None:  # the GPUs that Ray counts may be another vendor's
        return f"For an NVIDIA GPU install its driver and a torch with CUDA; for any other {_USE_CPU}"
    if torch.version.cuda is None:
        return f"Install a torch with CUDA: pip install --force-reinstall torch; or {_USE_CPU}"
    cuda = int(torch.version.cuda.split(".")[0])
    min_branch = MIN_DRIVER_BRANCH.get(cuda, max(MIN_DRIVER_BRANCH.values()))
    if driver is None:
        return (
            f"Install the driver, {min_branch} or newer; in a container, start it with the NVIDIA runtime "
            "(docker run --gpus all; runtimeClassName: nvidia on Kubernetes)"
        )
    if int(driver.split(".")[0]) < min_branch:
        return f"CUDA {cuda} needs driver {min_branch} or newer: update it, or install a torch for an older CUDA"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}: it must name a GPU of this machine"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"CUDA reports: {str(error).splitlines()[0]}. nvidia-smi shows whether the GPU works"
    return "nvidia-smi shows whether the GPU works"
