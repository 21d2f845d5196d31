"""Copy small tensors to the device without waiting: via pinned memory, in the order of the device's work."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of `values` on the device. On a GPU the copy is complete before work launched later reads it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    # PyTorch reuses a block of pinned memory only after the copies from it are complete.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
