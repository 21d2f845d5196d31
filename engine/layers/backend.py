"""Which kernels the layers run on. Each layer settles it once, in prepare(), when its weights are loaded."""

from typing import Literal, Protocol, runtime_checkable

Backend = Literal["torch", "triton"]  # kernels/cpu and kernels/gpu


@runtime_checkable
class Prepared(Protocol):
    """A layer that wants its weights in another form, or another kernel, by backend."""

    def prepare(self, backend: Backend) -> None:
        """Once, after loading and before the first forward. What the backend does not read is given up."""
