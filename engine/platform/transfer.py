"""Copy small tensors to the device without waiting: via pinned memory, in the order of the device's work."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUMPY_DTYPES = {
    torch.uint8: np.uint8, torch.int32: np.int32, torch.int64: np.int64,
    torch.float32: np.float32, torch.float64: np.float64,
}  # fmt: skip


def to_device(
    values: "Sequence[int] | Sequence[float] | array[int] | NDArray[Any]", dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor of `values` on the device. On a GPU the copy is complete before work launched later reads it.

    values: an array, which may be NumPy's, is not converted number by number if it has this dtype; it may not change
            later then
    """
    host = torch.from_numpy(np.asarray(values, NUMPY_DTYPES[dtype]))
    # PyTorch reuses a block of pinned memory only after the copies from it are complete.
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
