"""Small tensors between host and device, without waiting: through pinned memory, in the order of the device's work."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values`. On a GPU it is there by the time that work launched later reads it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    # PyTorch hands a pinned block out again only when the copies out of it are done.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class OnItsWay:
    """Tensors that are being copied to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for copy, tensor in zip(self._tensors, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, once they are complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
