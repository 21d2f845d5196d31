"""Rotary position embedding in the half layout: dims (i, i + rotary_dim/2) of a head turn together."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dims of each head; the dims beyond 2 * cos.shape[-1] pass. (RoFormer, arXiv 2104.09864)

    x:        [num_tokens, num_heads, head_dim]
    cos, sin: [num_tokens, rotary_dim / 2] fp32, any mscale multiplied in
    returns:  like x; computed in fp32 and rounded once
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)
