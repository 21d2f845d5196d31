"""Parameters without memory. The loader gives memory to those that are loaded as they are; the others are quantized."""

import torch
from torch import nn


def unallocated(*shape: int) -> nn.Parameter:
    """Return a parameter of the default dtype that has a shape and no memory."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
