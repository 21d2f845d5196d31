"""Forbid the tokens that a grammar does not allow, from packed masks, on the CPU."""

from typing import Any

import numpy as np
import torch
from numba import uint32
from torch import Tensor

from moray.kernels.cpu.numba_intrinsics import array, compiled

ALL = 0xFFFFFFFF  # a word in which all tokens are allowed


def keep_allowed(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    logits:  [num_rows, vocab_size] fp32, contiguous
    masks:   [num_masks, at least vocab_size / 32] int32; token i is allowed if bit i % 32 of word i / 32 is set
    rows:    [num_masks] int32, each mask's row of the logits
    """
    _keep_allowed(array(logits), array(masks), array(rows))


@compiled
def _keep_allowed(logits: Any, masks: Any, rows: Any) -> None:
    vocab_size = logits.shape[1]
    for i in range(len(rows)):
        row = logits[rows[i]]
        for first in range(0, vocab_size, 32):
            word = uint32(masks[i, first // 32])
            if word != uint32(ALL):
                for bit in range(min(32, vocab_size - first)):
                    if (word >> uint32(bit)) & uint32(1) == uint32(0):
                        row[first + bit] = -np.inf


def keep_allowed_ref(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Compute `keep_allowed` slowly and obviously, on any device."""
    bits = (masks[:, :, None] >> torch.arange(32, device=masks.device)) & 1
    is_forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows.long()] = logits[rows.long()].masked_fill(is_forbidden, -torch.inf)
