"""The bits of a product's columns do not depend on how many columns the weight has, nor on where in it they lie.

A rank of tensor parallelism holds some rows of a weight, hence computes some columns of the product. In fp32 the
interpreter shows into which pieces a sum is cut: it rounds each piece to fp32 once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.engine.partition import Partition
from moray.kernels.activation import GELU, SWIGLU, Activation
from moray.kernels.gpu.experts_down import experts_down
from moray.kernels.gpu.experts_up import experts_up, interleave
from moray.kernels.gpu.linear import count_splits, linear
from moray.kernels.gpu.packed_weight import PackedWeight, Sizes, as_packed, empty_packed
from moray.kernels.gpu.paged_attention import paged_attention
from moray.kernels.gpu.route import Routing, route
from moray.kernels.gpu.weight_formats import PackedFormat

NUM_ROWS = (1, 17)
WIDTH, SLICES = 80, (slice(0, 40), slice(71, 72))  # more than a block of columns
CLAMPED = Activation("clamped_swiglu", 0.7)
EXPERTS, TOP_K, INPUTS, HIDDEN, OUTPUTS = 2, 2, 136, 32, 48


@dataclass(frozen=True)
class Case:
    """A format (None = dense), the inputs of a group (None = all), and whether there are zero points."""

    format: PackedFormat | None
    group_size: int | None = None
    has_zeros: bool = False
    dtype: torch.dtype = torch.float32


CASES = [
    Case(None),
    Case("int4", 32, has_zeros=True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (Case(None, dtype=torch.bfloat16), Case("int8", 64), Case("fp8"))
    ),
]


def label(case: Case) -> str:
    return f"{case.format or 'dense'}-{str(case.dtype).removeprefix('torch.')}"


def made(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill new memory with NaN."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


class Weight:
    """A random weight of experts, [num_experts, n, k], of which parts can be packed."""

    def __init__(self, case: Case, num_experts: int, n: int, k: int) -> None:
        self._case, self._k = case, k
        groups = -(-k // (case.group_size or k))
        generator = torch.Generator().manual_seed(n)
        self._scales = torch.rand(num_experts, n, groups, generator=generator)
        if case.format is None or case.format == "fp8":
            values = torch.randn(num_experts, n, k, generator=generator) / k**0.5
            self._codes = values.to(case.dtype if case.format is None else torch.float8_e4m3fn)
        else:
            half = 8 if case.format == "int4" else 128
            self._codes = torch.randint(-half, half, (num_experts, n, k), generator=generator, dtype=torch.int8)
            self._scales /= half * k**0.5
        self._zeros = torch.randint(-8, 8, (num_experts, n, groups), generator=generator, dtype=torch.int8)

    def part(self, *rows: slice) -> PackedWeight:
        """Pack some rows of each expert; two slices are those of the gate and of what it multiplies."""

        def cut(values: Tensor) -> Tensor:
            parts = [values[:, part].to(DEVICE) for part in rows]
            return parts[0].contiguous() if len(parts) == 1 else interleave(*parts).contiguous()

        codes, scales, zeros = map(cut, (self._codes, self._scales, self._zeros))
        if self._case.format is None:
            return as_packed(codes)
        sizes, given = Sizes(*codes.shape), self._case
        packed = empty_packed(sizes, given.format, given.group_size, has_zeros=given.has_zeros, device=DEVICE)
        for expert in range(len(codes)):
            packed.set_expert(expert, codes[expert], scales[expert], zeros[expert] if given.has_zeros else None)
        return packed


@pytest.mark.parametrize("case", CASES, ids=label)
def test_columns_of_a_linear_layer(case: Case) -> None:
    weight, bias = Weight(case, 1, WIDTH, INPUTS), made(WIDTH, seed=1, dtype=case.dtype)
    for num_rows in NUM_ROWS:
        x = made(num_rows, INPUTS, seed=num_rows, dtype=case.dtype)
        whole = linear(x, weight.part(slice(0, WIDTH)), bias)
        for columns in SLICES:
            part = linear(x, weight.part(columns), bias[columns].contiguous(), num_outputs=WIDTH)
            assert torch.equal(part, whole[:, columns]), columns


@pytest.mark.parametrize("n", [64, 32])
def test_a_sum_is_split_as_that_of_the_whole_weight(n: int) -> None:
    """Half of 64 outputs alone would be split, and all 32 are."""
    assert count_splits(64, 1024, 32) == 1 < count_splits(32, 1024, 32) == count_splits(16, 1024, 32)
    x, weight = made(3, 1024, seed=0, dtype=torch.float32), made(n, 1024, seed=1, dtype=torch.float32)
    whole, half = linear(x, weight, None), weight[: n // 2].contiguous()
    assert torch.equal(linear(x, half, None, num_outputs=n), whole[:, : n // 2])
    assert torch.equal(linear(x, half, None), whole[:, : n // 2]) == (n == 32)


@pytest.mark.parametrize(
    ("activation", "size"),
    [
        (SWIGLU, 2),
        (GELU, 2),
        pytest.param(CLAMPED, 2, marks=pytest.mark.slow),
        pytest.param(SWIGLU, 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_columns_of_experts(case: Case, activation: Activation, size: int) -> None:
    """Rows that are gathered are in another order than those of one rank, which changes no bit either."""
    width = HIDDEN * (1 + activation.is_gated)
    up, down = Weight(case, EXPERTS, width, INPUTS), Weight(case, EXPERTS, OUTPUTS, HIDDEN)
    up_bias, down_bias = (made(EXPERTS, n, seed=n, dtype=case.dtype) for n in (width, OUTPUTS))
    for num_rows in NUM_ROWS:
        x, logits = (made(num_rows, n, seed=num_rows, dtype=case.dtype) for n in (INPUTS, EXPERTS))
        routing = route(logits, method="softmax", top_k=TOP_K, jitter=0.0, block_m=16)

        def run_up(of: int, rank: int, *, in_order: bool, x: Tensor = x, routing: Routing = routing) -> Tensor:
            held = Partition(rank, of).split(*[HIDDEN] * (1 + activation.is_gated)).held
            bias = torch.cat([up_bias[:, part] for part in held], dim=1)
            if activation.is_gated:
                bias = interleave(*bias[..., None].chunk(2, dim=1))[..., 0]
            of_kind = None if activation == SWIGLU else bias
            return experts_up(x, up.part(*held), routing, of_kind, activation, in_order=in_order)

        whole = experts_down(run_up(1, 0, in_order=False), down.part(slice(0, OUTPUTS)), routing, down_bias)
        hidden = torch.cat([run_up(size, rank, in_order=True) for rank in range(size)], dim=1)
        assert hidden.shape == (num_rows * TOP_K, HIDDEN)
        for rank in range(size):
            (held,) = Partition(rank, size).split(OUTPUTS).held
            part = experts_down(hidden, down.part(held), routing, down_bias[:, held].contiguous(), in_order=True)
            assert torch.equal(part, whole[:, held]), (num_rows, rank)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), pytest.param(8, 2, marks=pytest.mark.slow)])
def test_heads_do_not_depend_on_the_heads_beside_them(heads: int, kv_heads: int) -> None:
    """A rank has fewer heads of keys and values, or a part of the heads that share one."""
    tables = torch.arange(2 * 19, dtype=torch.int32, device=DEVICE).view(2, 19)
    starts = torch.tensor([0, 5, 8], dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([5, 270], dtype=torch.int32, device=DEVICE)
    q = made(8, heads, 16, seed=0, dtype=torch.float32)
    k, v = (made(38, kv_heads, 16, 16, seed=seed, dtype=torch.float32) for seed in (1, 2))
    whole = paged_attention(q, k, v, tables, starts, ends, 0.25)
    group = heads // kv_heads
    for begin, end in ((0, group), (group, heads), (0, group // 2), (group, group + 1)):
        kv = slice(begin // group, begin // group + 1)
        part = q[:, begin:end].contiguous(), k[:, kv].contiguous(), v[:, kv].contiguous()
        assert torch.equal(paged_attention(*part, tables, starts, ends, 0.25), whole[:, begin:end]), (begin, end)
