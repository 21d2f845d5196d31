import pytest
import torch

from moray.kernels.activation import GELU, SWIGLU, Activation
from moray.kernels.cpu.experts import (
    PackedExpert,
    PackedExperts,
    _partition_experts,
    experts,
    experts_of_rank,
    experts_ref,
    pack_expert,
)

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 48, 40, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-6}
CLAMPED = Activation("clamped_swiglu", 0.7)
every_activation = pytest.mark.parametrize("activation", [SWIGLU, CLAMPED, GELU], ids=lambda one: one.kind)
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def make(
    activation: Activation, dtype: torch.dtype, num_experts: int = NUM_EXPERTS
) -> tuple[Weights, list[PackedExpert]]:
    g = torch.Generator().manual_seed(1)
    width = INTERMEDIATE * (1 + activation.is_gated)
    has_bias = activation != SWIGLU
    up = (torch.randn(num_experts, width, HIDDEN, generator=g) * 0.2).to(dtype)
    down = (torch.randn(num_experts, HIDDEN, INTERMEDIATE, generator=g) * 0.2).to(dtype)
    up_bias = torch.randn(num_experts, width, generator=g).to(dtype) if has_bias else None
    down_bias = torch.randn(num_experts, HIDDEN, generator=g).to(dtype) if has_bias else None
    packed = [
        pack_expert(up[e], down[e], *(None if b is None else b[e] for b in (up_bias, down_bias)), activation=activation)
        for e in range(num_experts)
    ]
    return (up, down, up_bias, down_bias), packed


def tokens(n: int, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    ids = torch.rand(n, NUM_EXPERTS, generator=g).argsort(dim=1)[:, :top_k]
    return torch.randn(n, HIDDEN, generator=g).to(dtype), torch.rand(n, top_k, generator=g), ids


def check(
    activation: Activation, dtype: torch.dtype, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    plain, packed = make(activation, dtype)
    want = experts_ref(x, weights, ids, *plain, activation=activation)
    for given in (packed, PackedExperts(packed)):
        got = experts(x, weights, ids, given)
        assert got.dtype == dtype and got.shape == x.shape
        if len(x):
            assert (got.float() - want.float()).abs().max() <= TOLERANCE[dtype] * want.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, NUM_EXPERTS])
@every_activation
def test_agrees_with_the_reference(activation: Activation, top_k: int, dtype: torch.dtype) -> None:
    for n in (0, 1, 2, 3, 33, 100):
        check(activation, dtype, *tokens(n, top_k, dtype))


@every_activation
def test_uneven_routing(activation: Activation) -> None:
    x, weights, _ = tokens(40, 2, torch.float32)
    for pair in ((0, 1), (3, 2), (NUM_EXPERTS - 1, 0)):
        check(activation, torch.float32, x, weights, torch.tensor(pair).repeat(40, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@every_activation
def test_rows_do_not_depend_on_the_batch(activation: Activation, dtype: torch.dtype) -> None:
    packed = PackedExperts(make(activation, dtype)[1])
    x, weights, ids = tokens(150, 2, dtype)
    together = experts(x, weights, ids, packed)
    for n in (*range(1, 20), 63, 64, 65, 149):
        assert torch.equal(experts(x[:n], weights[:n], ids[:n], packed), together[:n]), n
    for seed in range(5):
        some = torch.randperm(150, generator=torch.Generator().manual_seed(seed))[: 40 + 20 * seed]
        assert torch.equal(experts(x[some], weights[some], ids[some], packed), together[some])
    everyone_to_one = torch.zeros_like(ids)
    everyone_to_one[0] = ids[0]
    assert torch.equal(experts(x, weights, everyone_to_one, packed)[0], together[0])


@pytest.mark.parametrize("dtype", DTYPES)
@every_activation
def test_ranks_with_whole_experts_get_the_bits_of_one(activation: Activation, dtype: torch.dtype) -> None:
    """Four ranks of two experts each: with all of them used, with few, and with none of three ranks'."""
    size, held = 4, 2
    packed = make(activation, dtype, size * held)[1]
    generator = torch.Generator().manual_seed(5)
    for n, choices in ((50, 8), (1, 8), (3, 8), (7, 2)):
        x = torch.randn(n, HIDDEN, generator=generator).to(dtype)
        weights = torch.rand(n, 2, generator=generator)
        ids = torch.rand(n, choices, generator=generator).argsort(dim=1)[:, :2]
        counted = torch.zeros(size * held, dtype=torch.int64)
        want = experts(x, weights, ids, PackedExperts(packed), counted)
        parts: dict[int, torch.Tensor] = {}

        def gather(part: torch.Tensor, parts: dict[int, torch.Tensor] = parts) -> torch.Tensor:
            parts.setdefault(len(parts), part)  # in the first round, one rank after the other
            return torch.cat([parts.get(r, part) for r in range(size)], dim=1)

        for is_complete in (False, True):
            for rank in range(size):
                counts = torch.zeros(size * held, dtype=torch.int64)
                own = PackedExperts(packed[rank * held : (rank + 1) * held])
                got = experts_of_rank(x, weights, ids, own, rank, size * held, gather, counts)
                assert torch.equal(counts, counted)
                assert not is_complete or torch.equal(got, want), (n, rank)


def test_rows_do_not_depend_on_the_threads() -> None:
    """The rows are so wide that torch splits the activation among threads in the middle of a row."""
    g = torch.Generator().manual_seed(2)
    width = 1001
    up = torch.randn(2 * width, width, generator=g) * width**-0.5
    packed = [pack_expert(up, torch.eye(width), activation=SWIGLU)]  # nothing is summed that could hide a last bit
    x, weights, ids = torch.randn(64, width, generator=g), torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.int64)
    before = torch.get_num_threads()
    want = experts(x, weights, ids, packed)
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(experts(x, weights, ids, packed), want), num_threads
            for n in (1, 31, 41, 63):
                assert torch.equal(experts(x[:n], weights[:n], ids[:n], packed), want[:n]), (num_threads, n)
    finally:
        torch.set_num_threads(before)


def test_slots_are_added_in_their_order() -> None:
    """Experts give equal rows and weights cancel, so the sum shows which two were added first."""
    up, down = torch.randn(2 * INTERMEDIATE, HIDDEN), torch.randn(HIDDEN, INTERMEDIATE)
    packed = [pack_expert(up, down, activation=SWIGLU) for _ in range(3)]
    x, ids = torch.randn(1, HIDDEN), torch.tensor([[2, 0, 1]])
    one = experts(x, torch.ones(1, 1), ids[:, :1], packed)
    assert torch.equal(experts(x, torch.tensor([[2.0**40, -(2.0**40), 1.0]]), ids, packed), one)
    assert not torch.equal(experts(x, torch.tensor([[2.0**40, 1.0, -(2.0**40)]]), ids, packed), one)


@pytest.mark.parametrize(
    ("counts", "cores", "shared"),
    [
        ([2, 0, 3, 1, 2], 2, []),
        ([64] * 16, 2, []),
        ([64] * 16, 16, []),
        ([500, 0, 4, 4], 2, [0]),
        ([0, 7, 0], 2, [1]),
        ([1, 1], 16, [0, 1]),
        ([1, 1], 1, []),
    ],
)
def test_all_cores_share_an_expert_that_would_keep_one_busy_for_long(
    counts: list[int], cores: int, shared: list[int]
) -> None:
    together, apart = _partition_experts(counts, cores)
    assert together == shared
    assert sorted(together + apart) == [e for e, count in enumerate(counts) if count]
