"""Read NVIDIA's GPUs from their driver, through its library NVML, without torch."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
PROHIBITED = 2  # the compute mode in which no process may use a GPU
PCI = Path("/sys/bus/pci/devices")
NVIDIA, AMD = "0x10de", "0x1002"  # PCI ids of the vendors
# First digits of PCI classes: display and 3D controllers, processing accelerators. Compute GPUs are no VGA controllers.
GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
COMPUTE_CLASSES = ("0x0302", "0x0380", "0x1200")


@dataclass(frozen=True)
class NvmlGpu:
    """Describes a GPU.

    capability:     compute capability, (9, 0) for an H100
    is_split:       it is split into MIG instances
    is_prohibited:  its compute mode lets no process use it
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    is_split: bool = False
    is_prohibited: bool = False


@dataclass(frozen=True)
class Driver:
    """Describes NVIDIA's driver and its GPUs.

    cuda: the newest CUDA version that it supports
    """

    version: str
    cuda: tuple[int, int]
    gpus: tuple[NvmlGpu, ...]


class NvmlError(Exception):
    """Means that the driver's library is installed but fails."""


def read_driver() -> Driver | None:
    """Return the driver and its GPUs; None where there is no driver. Raises NvmlError where it does not work."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    with _session(library):
        version, cuda, count = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_uint()
        _call(library.nvmlSystemGetDriverVersion, version, ctypes.c_uint(len(version)))
        _call(library.nvmlSystemGetCudaDriverVersion_v2, ctypes.byref(cuda))
        _call(library.nvmlDeviceGetCount_v2, ctypes.byref(count))
        gpus = tuple(_read_gpu(library, index) for index in range(count.value))
        return Driver(version.value.decode(), (cuda.value // 1000, cuda.value % 1000 // 10), gpus)


def gpus_on_bus(vendor: str, classes: tuple[str, ...] = GPU_CLASSES, bus: Path = PCI) -> int:
    """Count the vendor's GPUs on the PCI bus, with or without a driver. In a container it counts the host's too."""
    found = 0
    for device in bus.glob("*"):
        with suppress(OSError):
            found += (device / "vendor").read_text().strip() == vendor and (
                (device / "class").read_text().strip().startswith(classes)
            )
    return found


@contextmanager
def _session(library: ctypes.CDLL) -> Iterator[None]:
    library.nvmlErrorString.restype = ctypes.c_char_p
    code = library.nvmlInit_v2()
    if code != 0:
        raise NvmlError(library.nvmlErrorString(code).decode())
    try:
        yield
    except _CallError as error:
        raise NvmlError(f"{error.name}: {library.nvmlErrorString(error.code).decode()}") from None
    finally:
        library.nvmlShutdown()


class _CallError(Exception):
    def __init__(self, name: str, code: int) -> None:
        super().__init__(name, code)
        self.name, self.code = name, code


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _read_gpu(library: ctypes.CDLL, index: int) -> NvmlGpu:
    handle = ctypes.c_void_p()
    name, memory = ctypes.create_string_buffer(96), _Memory()
    major, minor, mode = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint()
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    _call(library.nvmlDeviceGetHandleByIndex_v2, ctypes.c_uint(index), ctypes.byref(handle))
    _call(library.nvmlDeviceGetName, handle, name, ctypes.c_uint(len(name)))
    _call(library.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory))
    _call(library.nvmlDeviceGetCudaComputeCapability, handle, ctypes.byref(major), ctypes.byref(minor))
    with suppress(_CallError):  # consumer GPUs have neither a compute mode nor MIG
        _call(library.nvmlDeviceGetComputeMode, handle, ctypes.byref(mode))
        _call(library.nvmlDeviceGetMigMode, handle, ctypes.byref(current), ctypes.byref(pending))
    capability = major.value, minor.value
    is_split, is_prohibited = current.value == 1, mode.value == PROHIBITED
    return NvmlGpu(name.value.decode(), capability, memory.total, memory.free, is_split, is_prohibited)


def _call(function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
    code = function(*arguments)
    if code != 0:
        raise _CallError(function.__name__, code)
