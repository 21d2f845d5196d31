"""Check the GPUs: the driver and its GPUs, torch's build for them, and the compiler that Triton needs."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

from moray.batch.units import memory
from moray.engine.platform.gpu_support import MIN_BFLOAT16_CAPABILITY, find_capability_problem
from moray.engine.platform.toolchain import find_toolchain_problems, has_built_launchers
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning
from moray.jobs.doctor.nvml import AMD, COMPUTE_CLASSES, NVIDIA, Driver, NvmlError, NvmlGpu, gpus_on_bus, read_driver

# environment variable -> values with which the CPU is used although there are GPUs
HIDING = {"MORAY_DEVICE": ("cpu",), "CUDA_VISIBLE_DEVICES": ("", "-1")}
USE_CPU = "export MORAY_DEVICE=cpu"
AMD_PACKAGE = "amdsmi"  # the package with which Ray finds AMD's GPUs
FREE_SHARE = 0.9  # free share of a GPU's memory that moray expects: it takes what the weights leave for its KV cache


def devices(_: Subject) -> Iterator[Finding]:
    """Report the GPUs, and those that moray cannot use."""
    try:
        driver = read_driver()
    except NvmlError as error:
        yield problem(f"NVIDIA's driver does not work: {error}", "restart the machine, or install the driver again")
        return
    if driver is None or not driver.gpus:
        yield _without_gpus(driver)
        return
    version = f"driver {driver.version}, which supports CUDA {_dotted(driver.cuda)}"
    if variable := _hidden_by():
        yield ok(f"{len(driver.gpus)}, but the CPU is used: {variable}={os.environ[variable]}; {version}")
        return
    yield ok(f"{len(driver.gpus)}, {version}")
    for index, device in enumerate(driver.gpus):
        yield check_gpu(device, f"GPU {index}")


def _hidden_by() -> str | None:
    """Return the environment variable that makes moray use the CPU although there are GPUs."""
    return next((name for name, values in HIDING.items() if os.environ.get(name) in values), None)


def _without_gpus(driver: Driver | None) -> Finding:
    none = "none; the CPU is used"
    if os.environ.get("MORAY_DEVICE") == "cuda":
        return problem("none, and MORAY_DEVICE is cuda", "unset MORAY_DEVICE")
    if count := gpus_on_bus(NVIDIA):
        reason = "no driver was found" if driver is None else "the driver sees none"
        fix = "install NVIDIA's driver; in a container: docker run --gpus all, with NVIDIA's container toolkit"
        return warning(f"{count} of NVIDIA on the bus, but {reason}; the CPU is used", fix)
    count = gpus_on_bus(AMD, COMPUTE_CLASSES)
    if count and _hidden_by() is None and find_spec(AMD_PACKAGE):
        value = f"{count} of AMD, which moray has no kernels for; Ray counts them, with the package {AMD_PACKAGE}"
        return problem(f"{value}, and a worker that gets one does not start", USE_CPU)
    if count:
        return warning(f"{count} of AMD, which moray does not use; the CPU is used", "use a machine with NVIDIA GPUs")
    return ok(none)


def check_gpu(device: NvmlGpu, name: str) -> Finding:
    """Check whether moray can run on a GPU."""
    value = f"{device.name}, capability {_dotted(device.capability)}, {memory(device.free_bytes)} of "
    value += f"{memory(device.total_bytes)} free"
    if refusal := find_capability_problem(device.capability):
        return problem(f"{device.name}: {refusal}", f"{USE_CPU}, or use a newer GPU", name)
    if device.is_prohibited:
        fix = "sudo nvidia-smi --compute-mode=DEFAULT"
        return problem(f"{value}: its compute mode is Prohibited, so no process may use it", fix, name)
    if device.is_split:
        fix = "export CUDA_VISIBLE_DEVICES=MIG-UUID (nvidia-smi -L lists them), one for a worker; or turn MIG off"
        return warning(f"{value}: it is split by MIG, and Ray counts GPUs, not MIG instances", fix, name)
    if device.free_bytes < FREE_SHARE * device.total_bytes:
        fix = "end those processes (nvidia-smi lists them), or set engine.kv_cache_memory"
        return warning(f"{value}: other processes hold the rest", fix, name)
    if device.capability < MIN_BFLOAT16_CAPABILITY:
        return warning(f"{value}: it has no bfloat16", "set model.dtype=float16 (or float32), or use a newer GPU", name)
    return ok(value, name)


def torch_build(_: Subject) -> Iterator[Finding]:
    """Compare torch's build with the GPUs and the driver, and compute something on each GPU."""
    driver = working_driver()
    if driver is None and not gpus_on_bus(AMD, COMPUTE_CLASSES):
        return
    import torch

    from moray.engine.platform.cuda_driver import describe_torch

    cuda = None if torch.version.cuda is None else _parse(torch.version.cuda)
    value = describe_torch()
    if torch.version.hip is not None:
        fix = "install the build for the CPU: pip install torch --index-url https://download.pytorch.org/whl/cpu"
        yield warning(f"{value}, and moray's kernels run on NVIDIA GPUs only; the CPU is used", fix)
    elif driver is None:
        return
    elif cuda is None:
        fix = f"pip install --force-reinstall torch; {USE_CPU} if the CPU is meant"
        yield problem(f"{value}, so the GPUs stay idle", fix)
    elif driver.cuda[0] < cuda[0]:
        fix = f"update the driver, or install a torch for CUDA {driver.cuda[0]}"
        yield problem(f"{value}; the driver supports {_dotted(driver.cuda)}", fix)
    else:
        yield _compute(value)


def _compute(value: str) -> Finding:
    """Multiply matrices on each GPU, which loads the driver, the libraries and a kernel."""
    import torch

    from moray.engine.platform.cuda_driver import explain_missing_cuda

    if not torch.cuda.is_available():
        reason, _, fix = explain_missing_cuda().partition(". ")
        return problem(f"torch sees no GPU: {reason}", fix)
    for index in range(torch.cuda.device_count()):
        try:
            torch.ones(64, 64, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return problem(f"{value} and cannot compute on GPU {index}: {reason}", "see nvidia-smi and dmesg")
    return ok(f"{value} and computes on {torch.cuda.device_count()} of the GPUs")


def kernel_compiler(_: Subject) -> Iterator[Finding]:
    """Check that Triton finds the compiler that builds its launchers."""
    if working_driver() is None:
        return
    import triton

    value = f"Triton {triton.__version__}"
    missing = find_toolchain_problems()
    if not missing:
        yield ok(f"{value}, a C compiler and Python's headers")
        return
    facts, fixes = zip(*(one.split(": ", 1) for one in missing), strict=True)
    value, fix = f"{value}; {'; '.join(facts)}", "; ".join(fixes)
    if has_built_launchers():
        yield warning(f"{value}; launchers that were compiled before still run", fix)
    else:
        yield problem(value, fix)


def working_driver() -> Driver | None:
    """Return the driver if moray would use its GPUs, else None. devices() reports what is wrong with it."""
    if _hidden_by():
        return None
    try:
        driver = read_driver()
    except NvmlError:
        return None
    return driver if driver and driver.gpus else None


def _parse(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
