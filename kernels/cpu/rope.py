"""Rotary position embedding in the half layout: dims (i, i + rotary_dim/2) of a head rotate together."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dims of each head; dims from 2 * cos.shape[-1] on are copied. (RoFormer, arXiv 2104.09864)

    x:        [num_tokens, num_heads, head_dim]
    cos, sin: [num_tokens, rotary_dim / 2] fp32, already multiplied by any mscale
    returns:  shape and dtype of x; computed in fp32 and rounded once
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)
