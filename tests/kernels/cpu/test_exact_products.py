import pytest
import torch

from kernels.cpu.exact_products import ROW_STEPS, key_step, row_step


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_rows_agree_in_multiples_of_the_step(head_dim: int) -> None:
    step = row_step(head_dim, 192)
    assert step in ROW_STEPS
    for inner, columns in ((head_dim, 16), (head_dim, 192), (16, head_dim), (192, head_dim)):
        a, b = torch.randn(5, 192, inner), torch.randn(5, inner, columns)
        full = torch.bmm(a, b)
        for batch in (1, 2, 5):
            for rows in range(step, 192, step):
                got = torch.bmm(a[:batch, :rows].contiguous(), b[:batch])
                assert torch.equal(got, full[:batch, :rows]), (inner, columns, batch, rows)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_keys_may_be_cut_in_multiples_of_the_step(head_dim: int) -> None:
    step = key_step((16, 32, 64), 192, head_dim)
    assert step in (16, 32, 64, 192)
    for rows in (4, 16, 64):
        q, k, v = torch.randn(5, rows, head_dim), torch.randn(5, 192, head_dim), torch.randn(5, 192, head_dim)
        scores = torch.bmm(q, k.transpose(1, 2))
        for length in range(step, 192, step):
            hidden = scores.clone()
            hidden[:, :, length:] = -1e30
            want = torch.bmm(hidden.softmax(-1), v)
            weights = torch.bmm(q, k[:, :length].contiguous().transpose(1, 2)).softmax(-1)
            assert torch.equal(torch.bmm(weights, v[:, :length].contiguous()), want), (rows, length)


def test_a_step_that_changes_bits_is_not_taken() -> None:
    """Softmax adds in vectors: lengths that are no multiple of one add in another order."""
    assert key_step((1, 2, 3), 192, 64) == 192
