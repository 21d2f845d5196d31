"""Tests of every kernel of our own that this machine can run, and of the AMX kernel on tiles in plain memory."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from emulated_tiles import multiply_emulated
from patience import PATIENCE_S
from torch import Tensor

from moray.kernels.cpu import panels, product
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.linear import linear_ref
from moray.kernels.cpu.panels import KERNELS, Kernel

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
EMULATED = "emulated amx", torch.bfloat16
# in, out: less than a tile and a panel, odd, whole ones, several spans of sums with a rest
SHAPES = ((16, 4), (31, 96), (64, 64), (96, 130), (1100, 70))
MOST_ROWS = 256
EVERY_NUMBER = (*range(1, 71), 130)
SOME_NUMBERS = (1, 2, 6, 7, 16, 17, 33, 64, 73, 130)
# Those of the benchmark's model (experts, qkv_proj), and one of Phi-3.5-MoE's experts
LARGE_SHAPES = ((1024, 3200), (3200, 1024), (1024, 1536), (4096, 6400))
VERY_LARGE_SHAPES = ((6400, 4096), (4096, 6144), (1024, 32064), (2560, 10240), (10240, 2560))

Id = tuple[str, torch.dtype]
AVAILABLE: list[Id] = [key for key in KERNELS if key[0] in isas()] + [EMULATED]
every_kernel = pytest.mark.parametrize("key", AVAILABLE, ids=lambda key: f"{key[0]} {key[1]}".replace("torch.", ""))


def kernel_of(key: Id) -> Kernel:
    return Kernel(multiply_emulated, torch.bfloat16) if key == EMULATED else KERNELS[key]


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Make two threads share even the smallest products."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(product, "MIN_SHARED_PRODUCTS", 0)
    yield request.param
    torch.set_num_threads(before)


def make(shape: tuple[int, int], dtype: torch.dtype, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(in_features + out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    bias = torch.randn(out_features, generator=generator)
    return weight.to(dtype), bias, torch.randn(num_rows, in_features, generator=generator).to(dtype)


def differing(key: Id, shape: tuple[int, int], numbers: tuple[int, ...]) -> list[int]:
    """Return the numbers of rows for which a first or last row differs from the same row among the most rows."""
    weight, bias, x = make(shape, key[1], MOST_ROWS)
    kernel, packed = kernel_of(key), panels.pack_panels(weight)

    def multiply(rows: Tensor) -> Tensor:
        return panels.multiply(kernel, rows, packed, bias, shape[1], "silu", None)

    whole = multiply(x)
    return [
        n
        for n in numbers
        if not torch.equal(multiply(x[:n]), whole[:n]) or not torch.equal(multiply(x[-n:]), whole[-n:])
    ]


@every_kernel
def test_rows_do_not_depend_on_their_number(threads: int, key: Id) -> None:
    for shape in SHAPES:
        numbers = SOME_NUMBERS if key == EMULATED and shape[0] > 1000 else EVERY_NUMBER
        assert differing(key, shape, numbers) == [], shape


@pytest.mark.parametrize("key", [key for key in AVAILABLE if key != EMULATED], ids=str)
def test_rows_of_large_layers_do_not_depend_on_their_number(threads: int, key: Id) -> None:
    for shape in LARGE_SHAPES if key[1] == torch.bfloat16 else LARGE_SHAPES[:1]:
        assert differing(key, shape, SOME_NUMBERS) == [], shape


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in AVAILABLE if key != EMULATED], ids=str)
def test_rows_of_very_large_layers_do_not_depend_on_their_number(threads: int, key: Id) -> None:
    for shape in VERY_LARGE_SHAPES:
        assert differing(key, shape, SOME_NUMBERS) == [], shape


@every_kernel
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "times", "clamped_silu", "clamped_plus_one"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_agrees_with_the_reference(key: Id, activation: str, has_bias: bool) -> None:
    for shape in SHAPES:
        for n in (1, 2, 7, 16, 17, 48, 75):
            weight, bias, x = make(shape, key[1], n)
            times = torch.randn(n, shape[1]).to(key[1]) if activation in ("times", "clamped_plus_one") else None
            how = "none" if activation == "times" else activation
            given = bias if has_bias else None
            got = panels.multiply(kernel_of(key), x, panels.pack_panels(weight), given, shape[1], how, times, 2.0)
            want = linear_ref(x, weight, given, how, times, 2.0)
            assert got.dtype == key[1] and got.shape == want.shape
            error = (got.double() - want.double()).abs().max() / want.double().abs().max()
            assert error < TOLERANCE[key[1]], (shape, n)


@every_kernel
def test_a_row_that_is_not_finite_spoils_no_other(key: Id) -> None:
    for shape in SHAPES:
        weight, bias, x = make(shape, key[1], 40)
        kernel, packed = kernel_of(key), panels.pack_panels(weight)
        clean = panels.multiply(kernel, x, packed, bias, shape[1], "none", None)
        x[5], x[20, 3] = torch.inf, torch.nan
        got = panels.multiply(kernel, x, packed, bias, shape[1], "none", None)
        others = [i for i in range(40) if i not in (5, 20)]
        assert torch.equal(got[others], clean[others]), shape
        assert not got[[5, 20]].isfinite().any()


COMPILE_TILES = """
import numba
from numba import types
from moray.kernels.cpu import product
from moray.kernels.cpu import panels

def array(dtype, dims):
    return types.Array(dtype, dims, "C")

words, number = types.uint16, types.int64
signature = types.void(
    array(words, 4), array(words, 2), array(types.float32, 1), number, array(words, 2), array(words, 2), number, number
)
kernel = numba.njit(nogil=True, error_model="numpy")(panels._bf16_tiles.py_func)
kernel.compile(signature)
print("\\n".join(kernel.inspect_asm().values()))
"""


def test_the_tiles_compile_for_a_cpu_that_has_them_and_none_is_spilled() -> None:
    """A CPU without AMX cannot run the code, but can compile and inspect it."""
    features = "+64bit,+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512bf16,+amx-tile,+amx-bf16"
    env = os.environ | {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features, "MORAY_CPU_ISA": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_TILES], env=env, text=True, capture_output=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip().replace("\t", " ") for line in done.stdout.splitlines()]
    used = {
        name: [line for line in lines if line.startswith(f"{name} ")]
        for name in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored")
    }
    assert all(used.values()) and "tilerelease" in lines, {name: len(found) for name, found in used.items()}
    # Sums are written once and nothing reads them back: a spilled tile would be loaded into one that holds sums.
    sums = tuple(f"%tmm{tile}" for tile in range(4))
    assert not [line for line in used["tileloadd"] if line.endswith(sums)]
    assert not [line for line in used["tilestored"] if not line.split()[1].startswith(sums)]
