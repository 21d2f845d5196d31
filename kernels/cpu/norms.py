"""LayerNorm on the CPU, and the reference of RMSNorm."""

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each row to mean 0 and variance 1, then scale and shift.

    x: [num_tokens, hidden_size]; weight, bias: [hidden_size]
    """
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Compute `rms_norm` (rms_norm.py) slowly and obviously, on any device and for any number of dimensions."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed).to(x.dtype) if rounds_last else weight * normed.to(x.dtype)
