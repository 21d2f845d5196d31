"""RotaryEmbedding: rotary angles of a step's tokens, for plain rope, YaRN and LongRoPE (arXiv 2402.13753)."""

import torch
from torch import Tensor, nn

from moray.engine.config import RopeConfig

# cos and sin: [num_tokens, rotary_dim / 2] fp32, already multiplied by the mscale
Rotary = tuple[Tensor, Tensor]


class RotaryEmbedding(nn.Module):
    """Computes cos and sin for every token of a step, with the factor set of the token's sequence.

    The mscale multiplies both. It is the config's value unchanged: Phi-3.5-MoE publishes 1.243163, which differs from
    the formula's 1.190238, and applies it at every length.
    """

    inv_freq: Tensor  # [2, rotary_dim / 2]: row 0 short (or plain), row 1 long
    mscale: Tensor  # [2, 1]

    def __init__(self, rope: RopeConfig) -> None:
        super().__init__()
        device = torch.get_default_device()
        with torch.device("cpu"):  # powers differ in the last bits on other devices
            exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
            ones = [1.0] * len(exponents)
            factors = torch.tensor([rope.short_factor or ones, rope.long_factor or ones], dtype=torch.float32)
            inv_freq = 1.0 / (factors * rope.theta**exponents)
            mscale = torch.tensor([[rope.short_mscale], [rope.long_mscale]], dtype=torch.float32)
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)
        self.register_buffer("mscale", mscale.to(device), persistent=False)

    def forward(self, positions: Tensor, rope_sets: Tensor) -> Rotary:
        """Return cos and sin of the tokens. positions, rope_sets: [num_tokens] int64"""
        angles = positions.float().unsqueeze(1) * self.inv_freq[rope_sets]
        mscale = self.mscale[rope_sets]
        return angles.cos() * mscale, angles.sin() * mscale
