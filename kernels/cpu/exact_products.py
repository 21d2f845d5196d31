"""Which shapes of batched fp32 products give the same bits for the same row.

BLAS libraries add in another order for few rows or for some lengths, and do not document which (MKL on AVX2: other
kernels below four rows; sums of more than 192 terms are cut in places that depend on their number). So we ask the
library at hand, once.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

ROW_STEPS = (1, 2, 4, 8, 16)
ENOUGH_ROWS = 64


@cache
def row_step(inner: int, columns: int) -> int:
    """Smallest step in whose multiples a product may have rows: a row's bits then do not depend on their number.

    The largest of ROW_STEPS if none does.
    """
    a, b = _random(3, ENOUGH_ROWS, inner), _random(3, columns, inner)
    full = a @ b.transpose(1, 2)
    for step in ROW_STEPS:
        counts = [(n, rows) for n in (1, 3) for rows in (step, 2 * step, 3 * step)]
        if all(torch.equal(torch.bmm(a[:n, :r].contiguous(), b[:n].transpose(1, 2)), full[:n, :r]) for n, r in counts):
            return step
    return ROW_STEPS[-1]


def key_step(steps: Sequence[int], num_keys: int, head_dim: int) -> int:
    """Smallest of `steps` in whose multiples attention over num_keys may be cut short where the rest weighs nothing.

    num_keys itself if none will do.
    """
    return next((step for step in steps if _may_cut(step, num_keys, head_dim)), num_keys)


@cache
def _may_cut(step: int, num_keys: int, head_dim: int) -> bool:
    q, k, v = _random(3, 16, head_dim), _random(3, num_keys, head_dim), _random(3, num_keys, head_dim)
    scores = q @ k.transpose(1, 2)
    for length in range(step, num_keys, step):
        cut = torch.bmm(q, k[:, :length].contiguous().transpose(1, 2))
        padded = scores.clone()
        padded[:, :, length:] = -1e30
        short, long = cut.softmax(-1), padded.softmax(-1)
        if not torch.equal(torch.bmm(short, v[:, :length].contiguous()), torch.bmm(long, v)):
            return False
    return True


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
