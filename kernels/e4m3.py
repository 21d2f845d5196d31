"""Numbers of e4m3 (float8_e4m3fn), floats of 8 bits, and the scales of a KV cache that holds them."""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0  # the largest number; there is no infinity


def to_e4m3(x: Tensor) -> Tensor:
    """Round to nearest even; beyond the largest number to that, infinities too. NaN stays NaN."""
    return x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class KvScales:
    """Holds what the numbers in one layer's KV cache of e4m3 are multiplied by: one number a head, keys then values.

    A key or value x is stored as to_e4m3(x * inverse), and stands for what is stored * scale.

    scales:    [2, num_kv_heads] fp32
    inverses:  [2, num_kv_heads] fp32, 1 / scales
    """

    scales: Tensor
    inverses: Tensor

    @classmethod
    def of(cls, scales: Tensor) -> "KvScales":
        """Make the scales of a layer. scales: [2, num_kv_heads], positive"""
        scales = scales.float().contiguous()
        return cls(scales, 1 / scales)

    def quantize(self, heads: Tensor, row: int) -> Tensor:
        """Return what is stored of keys (row 0) or values (row 1). heads: [num_tokens, num_kv_heads, head_dim]"""
        return to_e4m3(heads.float() * self.inverses[row, :, None])

    def dequantize(self, cache: Tensor, row: int) -> Tensor:
        """Return what a cache of keys (row 0) or values (row 1) stands for, in fp32.

        cache: [num_blocks, num_kv_heads, block_size, head_dim]
        """
        return cache.float() * self.scales[row, :, None, None]
