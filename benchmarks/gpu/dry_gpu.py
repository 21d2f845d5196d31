"""The GPU of a dry run: Triton's interpreter, in each rank's process."""

from triton_backend import InterpretedBackend  # type: ignore[import-not-found]  # of tests/

from gpu.shared_gpu import SharedGpuBackend


class DryBackend(SharedGpuBackend, InterpretedBackend):  # type: ignore[misc]  # as above
    """Runs ranks on the CPU as SharedGpuBackend runs them on one GPU."""
