"""Copy small tensors to the device without waiting: via pinned memory, in the order of the device's work."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    values: "Sequence[int] | Sequence[float] | array[int]", dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor of `values` on the device. On a GPU the copy is complete before work launched later reads it.

    values: an array, whose items have the size of `dtype`, is not converted number by number, and may not change later
    """
    is_cpu = device.type == "cpu"
    # PyTorch reuses a block of pinned memory only after the copies from it are complete.
    if isinstance(values, array):
        host = torch.frombuffer(values, dtype=dtype)
        host = host if is_cpu else host.pin_memory()
    else:
        host = torch.tensor(values, dtype=dtype, pin_memory=not is_cpu)
    return host.to(device, non_blocking=True)
