"""Where a model runs, and on which kernels."""

import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import UserError
from engine.layers.backend import Backend
from engine.memory import available_bytes


@dataclass(frozen=True)
class Device:
    """torch: where tensors live; backend: the kernels of its layers."""

    torch: torch.device
    backend: Backend

    @property
    def is_async(self) -> bool:
        """Whether work that was launched runs on while the host goes on."""
        return self.torch.type == "cuda"

    @property
    def name(self) -> str:
        """The card's, or the processor's, as its maker calls it."""
        if self.torch.type == "cuda":
            return torch.cuda.get_device_name(self.torch)
        return processor_name()

    @property
    def available_bytes(self) -> int:
        """Memory that is free there now."""
        if self.torch.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch)
            return free
        return available_bytes()


CPU = Device(torch.device("cpu"), "torch")


def processor_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def choose_device(name: str) -> Device:
    """The device for EngineConfig.device. Raises UserError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CPU
    if name != "cuda":
        raise UserError(f"the device is {name!r}; it can be auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UserError("the device is 'cuda' and this process sees no CUDA device; use auto or cpu")
    return Device(torch.device("cuda", torch.cuda.current_device()), "triton")
