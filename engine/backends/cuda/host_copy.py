"""HostCopy: copies small tensors to the host without waiting: into pinned memory, in the order of the GPU's work."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostCopy:
    """Copies tensors to the host from its creation on.

    wait_for: waits for an event on the device
    """

    def __init__(self, *tensors: Tensor, wait_for: Callable[[torch.cuda.Event], None]) -> None:
        self._wait_for = wait_for
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for copy, tensor in zip(self._tensors, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the copies and return them."""
        if self._event is not None:
            self._wait_for(self._event)
        return self._tensors
