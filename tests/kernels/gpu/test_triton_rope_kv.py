import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.e4m3 import KvScales, to_e4m3
from moray.kernels.gpu.rope_kv import rope_kv, rope_kv_ref


def make_arguments(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, block_size: int, dtype: torch.dtype
) -> list[Tensor]:
    """Return qkv, cos, sin, empty caches and slots, of which every third is -1."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, generator=g).to(dtype)
    angles = torch.randn(num_tokens, rotary_dim // 2, generator=g)
    num_blocks = num_tokens // block_size + 2
    caches = (torch.full((num_blocks, kv_heads, block_size, head_dim), -7.0, dtype=dtype) for _ in "kv")
    slots = torch.randperm(num_blocks * block_size, generator=g)[:num_tokens]
    slots[::3] = -1
    return [qkv, angles.cos() * 1.243, angles.sin() * 1.243, *caches, slots]


def run(op, arguments: list[Tensor], heads: int) -> list[Tensor]:
    """Return q, k_cache and v_cache after the operation."""
    qkv, cos, sin, k_cache, v_cache, slots = (a.to(DEVICE, copy=True) for a in arguments)
    q = op(qkv, cos, sin, k_cache, v_cache, slots, heads)
    return [q.cpu(), k_cache.cpu(), v_cache.cpu()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "block_size"),
    [(32, 8, 128, 128, 16), (4, 4, 80, 32, 64), (3, 1, 96, 96, 16), (5, 1, 64, 16, 32)],
)
def test_agrees_with_the_reference(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    arguments = make_arguments(7, heads, kv_heads, head_dim, rotary_dim, block_size, dtype)
    got, wanted = run(rope_kv, arguments, heads), run(rope_kv_ref, arguments, heads)
    for name, a, b in zip(("q", "k_cache", "v_cache"), got, wanted, strict=True):
        # A GPU fuses one of the two products with the sum: at most the last bit differs.
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(got[2], wanted[2]), "v is copied"
    assert torch.equal(got[0][..., rotary_dim:], wanted[0][..., rotary_dim:]), "dims past rotary_dim pass"
    assert torch.equal(got[1] == -7, wanted[1] == -7), "other slots stay"


def test_v_is_copied_bit_by_bit() -> None:
    arguments = make_arguments(4, 2, 1, 64, 64, 16, torch.bfloat16)
    arguments[0][1, -64:-60] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    got, wanted = run(rope_kv, arguments, 2), run(rope_kv_ref, arguments, 2)
    assert torch.equal(got[2].view(torch.int16), wanted[2].view(torch.int16))


def test_a_row_has_the_same_bits_alone() -> None:
    arguments = make_arguments(5, 4, 2, 80, 32, 16, torch.bfloat16)
    together = run(rope_kv, arguments, 4)
    qkv, cos, sin, k_cache, v_cache, slots = arguments
    for i in range(5):
        alone = run(rope_kv, [qkv[i : i + 1], cos[i : i + 1], sin[i : i + 1], k_cache, v_cache, slots[i : i + 1]], 4)
        assert torch.equal(alone[0][0], together[0][i])
        if (slot := int(slots[i])) >= 0:
            place = slot // 16, slice(None), slot % 16
            assert torch.equal(alone[1][place], together[1][place])
            assert torch.equal(alone[2][place], together[2][place])


def test_a_step_of_padding_writes_nothing() -> None:
    arguments = make_arguments(3, 2, 1, 64, 64, 16, torch.float16)
    arguments[-1].fill_(-1)
    _, k_cache, v_cache = run(rope_kv, arguments, 2)
    assert (k_cache == -7).all() and (v_cache == -7).all()


def test_a_cache_of_e4m3_holds_what_is_stored_otherwise_divided_by_the_scale_of_its_head() -> None:
    heads, kv_heads, head_dim = 5, 3, 80
    arguments = make_arguments(9, heads, kv_heads, head_dim, 32, 16, torch.bfloat16)
    # Zeros, numbers beyond the largest code, infinity, and the least numbers, which are subnormal codes or nothing.
    numbers = [0.0, -0.0, 1e30, -470.0, float("inf"), 2**-9, 2**-10, 1.1 * 2**-10, 2**-6 - 2**-10, float("nan")]
    arguments[0][1:, -head_dim : len(numbers) - head_dim] = torch.tensor(numbers)
    scales = KvScales.of(torch.tensor([[0.25, 0.3, 2.0], [0.5, 0.017, 1.0]]))
    keys, values = (cache.float() for cache in run(rope_kv_ref, arguments, heads)[1:])
    caches = [torch.zeros(cache.shape, dtype=torch.float8_e4m3fn) for cache in arguments[3:5]]
    quantized = [*arguments[:3], *caches, arguments[5]]

    def of(op):
        return lambda *args: op(*args, KvScales(scales.scales.to(DEVICE), scales.inverses.to(DEVICE)))

    got, wanted = run(of(rope_kv), quantized, heads), run(of(rope_kv_ref), quantized, heads)
    assert torch.equal(got[0], run(rope_kv, arguments, heads)[0]), "queries stay"
    assert torch.equal(got[2].view(torch.uint8), wanted[2].view(torch.uint8))
    for row, (plain, cache) in enumerate(zip((keys, values), wanted[1:], strict=True)):
        by_hand = to_e4m3(torch.where(plain == -7, 0, plain) * scales.inverses[row, :, None, None])
        assert torch.equal(cache.view(torch.uint8), by_hand.view(torch.uint8))
    torch.testing.assert_close(
        got[1].float(), wanted[1].float(), rtol=2**-3, atol=2**-9
    )  # a last bit of q k, see above


def test_every_number_is_rounded_to_the_nearest_code() -> None:
    """Numbers of bfloat16 over its whole range, as values."""
    every = torch.arange(0, 2**16, 32, dtype=torch.int32).add(5).to(torch.uint16).view(torch.bfloat16)
    near = torch.arange(0x3A80, 0x4400, 3, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)[:768]
    every = torch.cat((every, near, -near)).view(-1, 128)
    qkv = torch.cat((torch.zeros(len(every), 256, dtype=torch.bfloat16), every), 1)
    angles = torch.zeros(len(every), 64)
    caches = [torch.zeros(len(every) // 16 + 1, 1, 16, 128, dtype=torch.float8_e4m3fn) for _ in "kv"]
    slots = torch.arange(len(every))
    one = KvScales.of(torch.ones(2, 1, device=DEVICE))
    stored = run(lambda *args: rope_kv(*args, one), [qkv, angles, angles, *caches, slots], 1)[2].view(-1, 128)[
        : len(every)
    ]
    wanted = to_e4m3(every.float())
    is_number = ~every.isnan()
    assert torch.equal(stored.view(torch.uint8)[is_number], wanted.view(torch.uint8)[is_number])
    assert stored.float()[~is_number].isnan().all()
    assert not stored.float()[is_number].isnan().any()
