import pytest
import torch

from kernels.row_step import STEPS, row_step


@pytest.mark.parametrize("inner", [32, 64, 80, 96, 128])
def test_rows_agree_in_multiples_of_the_step(inner: int) -> None:
    step = row_step(inner, 64)
    assert step in STEPS
    for columns, depth in ((64, inner), (512, inner), (inner, 64), (inner, 512)):
        a, b = torch.randn(5, 192, depth), torch.randn(5, depth, columns)
        full = torch.bmm(a, b)
        for batch in (1, 2, 5):
            for rows in range(step, 192, step):
                got = torch.bmm(a[:batch, :rows].contiguous(), b[:batch])
                assert torch.equal(got, full[:batch, :rows]), (columns, depth, batch, rows)
