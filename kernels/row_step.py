"""How many rows a batched fp32 product must have so that a row's bits do not depend on their number."""

from functools import cache

import torch

STEPS = (1, 2, 4, 8, 16)


@cache
def row_step(inner: int, columns: int) -> int:
    """Smallest step such that products of step, 2 * step and 64 rows agree bit by bit on the rows they share.

    BLAS libraries have kernels of their own for few rows, which add in another order; which ones is not documented
    (MKL on AVX2: fewer than four). So we ask the library at hand, once. The largest of STEPS if none agree.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 64, inner, generator=generator)
    b = torch.randn(3, columns, inner, generator=generator)
    full = torch.bmm(a, b.transpose(1, 2))
    for step in STEPS:
        if all(
            torch.equal(torch.bmm(a[:n, :rows].contiguous(), b[:n].transpose(1, 2)), full[:n, :rows])
            for n in (1, 3)
            for rows in (step, 2 * step)
        ):
            return step
    return STEPS[-1]
