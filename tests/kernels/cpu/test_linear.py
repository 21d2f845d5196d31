from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moray.kernels.cpu.linear import PLAIN, gelu, linear, linear_ref, pack, silu

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Of the largest result. In fp32 torch adds 1,024 products in an order that depends on the CPU.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 3e-6}
SHAPES = ((64, 16), (96, 31), (100, 1000), (1024, 1536), (1600, 1024), (4096, 96))  # in, out
NUM_ROWS = (*range(1, 131), 159, 160, 161, 255, 300)
SOME_ROWS = (1, 2, 3, 5, 16, 17, 33, 64, 129, 300)  # threads that wait for busy cores are slow


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(in_features + out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    return weight.to(dtype), torch.randn(out_features, generator=generator).to(dtype)


def rows(n: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n)).to(dtype)


def after(name: str, num_rows: int, out_features: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the epilogue as arguments of `linear`."""
    times = {"times": rows(num_rows, out_features, dtype)}
    if name in ("clamped_silu", "clamped_plus_one"):
        return {"activation": name, "limit": 2.0, **(times if name == "clamped_plus_one" else {})}
    return times if name == "times" else {"activation": name}


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "times", "clamped_silu", "clamped_plus_one"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(dtype: torch.dtype, has_bias: bool, activation: str) -> None:
    for in_features, out_features in SHAPES:
        weight, bias = make(in_features, out_features, dtype)
        for n in (1, 2, 7, 129):
            x = rows(n, in_features, dtype)
            how = after(activation, n, out_features, dtype)
            got = linear(x, pack(weight, bias if has_bias else None), **how)
            want = linear_ref(x, weight, bias if has_bias else None, **how)
            assert got.dtype == dtype and got.shape == (n, out_features)
            error = (got.double() - want.double()).abs().max() / want.double().abs().max()
            assert error < TOLERANCE[dtype], (in_features, out_features, n)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "times", "clamped_silu", "clamped_plus_one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_number(threads: int, dtype: torch.dtype, activation: str) -> None:
    shapes = SHAPES if threads == 1 and dtype != torch.float16 else SHAPES[1:2] + SHAPES[-2:]
    for in_features, out_features in shapes:
        packed = pack(*make(in_features, out_features, dtype))
        x = rows(max(NUM_ROWS) + 1, in_features, dtype)
        how = after(activation, len(x), out_features, dtype)
        all_rows = linear(x, packed, **how)
        for n in NUM_ROWS if threads == 1 and in_features < 1024 else SOME_ROWS:
            for part in (slice(0, n), slice(-n, None)):
                of_part = {key: value[part] if key == "times" else value for key, value in how.items()}
                assert torch.equal(linear(x[part], packed, **of_part), all_rows[part]), (in_features, out_features, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    packed, x = pack(*make(1600, 1000, dtype)), rows(65, 1600, dtype)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(linear(x, packed))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_last_resort_do_not_depend_on_their_number(
    threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its calls of torch have the same shape, so the kernel that torch or MKL chooses does not matter."""
    calls = set()
    multiply = torch.nn.functional.linear

    def note(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.add((tuple(x.shape), torch.get_num_threads()))
        return multiply(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", note)
    packed = pack(*make(100, 1000, dtype), path=PLAIN)
    x = rows(131, 100, dtype)
    all_rows = linear(x, packed)
    for n in (1, 2, 3, 4, 5, 7, 15, 16, 17, 33, 64, 129):
        for part in (slice(0, n), slice(-n, None)):
            assert torch.equal(linear(x[part], packed), all_rows[part]), n
    assert calls == {((16, 100), 1)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    assert linear(rows(0, 64, dtype), pack(*make(64, 16, dtype))).shape == (0, 16)


def test_the_pack_is_a_copy() -> None:
    weight, bias = make(64, 16, torch.bfloat16)
    packed, x = pack(weight, bias), rows(5, 64, torch.bfloat16)
    before = linear(x, packed)
    weight.zero_()
    assert torch.equal(linear(x, packed), before)


@pytest.mark.parametrize("ours, theirs", [(silu, "silu"), (gelu, "gelu")])
def test_activations(ours: object, theirs: str) -> None:
    x = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor([-1e30, 0.0, 1e30])))
    wide = x.double()
    want = torch.nn.functional.silu(wide) if theirs == "silu" else torch.nn.functional.gelu(wide, approximate="tanh")
    assert callable(ours)
    torch.testing.assert_close(ours(x).double(), want, rtol=2e-5, atol=1e-6)
    for n in range(1, 70):
        assert torch.equal(ours(x[2000 : 2000 + n].clone()), ours(x)[2000 : 2000 + n])
