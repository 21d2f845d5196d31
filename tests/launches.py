"""Launches: records what is launched of Triton's kernels, on the GPU or under the interpreter."""

from typing import Any

import pytest
from torch import Tensor

from moray.kernels.gpu.combine import _combine_kernel

KERNEL = type(_combine_kernel)  # of all kernels


class Launches:
    """Records each launch while it is active: the kernel's name, the grid, the numbers, and the shapes of tensors."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Launches":
        run = KERNEL.run

        def record(kernel: Any, *args: Any, grid: Any, **options: Any) -> Any:
            given = [(None, value) for value in args] + sorted(options.items())
            seen = [(name, value.shape if isinstance(value, Tensor) else value) for name, value in given]
            self.found.append((kernel.__name__, grid, *seen))
            return run(kernel, *args, grid=grid, **options)

        self._patch.setattr(KERNEL, "run", record)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
