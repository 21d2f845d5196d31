"""Tests of every quantized kernel that this machine can run, and of the AMX kernel on tiles in plain memory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from emulated_tiles import multiply_quantized_emulated
from emulated_vnni import fp4_emulated, int4_emulated, int8_emulated
from patience import PATIENCE_S
from torch import Tensor

from moray.kernels.cpu import pair_product, quantized, quantized_product, vector_product
from moray.kernels.cpu import thread_pool as cores
from moray.kernels.cpu.quantized import (
    PackedQuantized,
    dequantize_ref,
    kernel_of,
    pack_quantized,
    paths,
    prepare_rows,
    quantized_linear,
    quantized_linear_ref,
)
from moray.kernels.cpu.quantized_rows import LARGEST
from moray.kernels.e2m1 import numbers_of

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-6}
EMULATED, EMULATED_VNNI = "emulated amx", "emulated vnni"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUM_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 35, 36, 37, 73, 80)


@dataclass(frozen=True)
class Weight:
    """A made-up quantized weight."""

    codes: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None
    kind: str

    def pack(self, bias: Tensor | None = None, path: str | None = None) -> PackedQuantized:
        return pack_quantized(self.codes, self.scales, self.group_size, self.zeros, self.kind, bias, path)

    def reference(self, x: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
        of_weight = self.codes, self.scales, self.group_size, self.zeros
        return quantized_linear_ref(x, *of_weight, bias, **how)


def powers_of_two(scales: Tensor) -> Tensor:
    return torch.exp2(scales.log2().round())


def make(kind: str, out_features: int, in_features: int, group_size: int | None, has_zeros: bool = False) -> Weight:
    g = torch.Generator().manual_seed(out_features + in_features)
    group_size = group_size or in_features
    groups = -(-in_features // group_size)
    if kind == "fp8":
        codes = torch.randn(out_features, in_features, generator=g).to(torch.float8_e4m3fn)
    elif kind == "fp4":
        codes = torch.randint(0, 16, (out_features, in_features), generator=g, dtype=torch.uint8)
    else:
        limit = 128 if kind == "int8" else 8
        codes = torch.randint(-limit, limit, (out_features, in_features), generator=g, dtype=torch.int8)
    scales = (torch.rand(out_features, groups, generator=g) + 0.1) * in_features**-0.5
    scales = powers_of_two(scales) if kind == "fp4" else scales
    zeros = torch.randint(-8, 8, (out_features, groups), generator=g, dtype=torch.int8) if has_zeros else None
    return Weight(codes, scales, group_size, zeros, kind)


# out, in, group: less than a step and a panel, odd, groups with a shorter last one, more than a pass and than a span
SHAPES = ((4, 3, None), (70, 100, 32), (96, 200, 64), (130, 1100, 128), (64, 2500, None))
WEIGHTS = [
    make(kind, *shape, has_zeros)
    for kind, shape, has_zeros in product(("int8", "int4", "fp8", "fp4"), SHAPES, (False, True))
    if not (kind in ("fp8", "fp4") and has_zeros)
]


def rows(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows in which some inputs are larger by far than the others."""
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(n))
    x[:, ::50] *= 60
    return x.to(dtype)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = quantized.QuantizedKernel(quantized.quantize_rows, multiply_quantized_emulated, 2, np.int8)
    monkeypatch.setitem(quantized.KERNELS, (EMULATED, "int8", True), kernel)
    for kind, run in (("int8", int8_emulated), ("int4", int4_emulated), ("fp4", fp4_emulated)):
        kernel = quantized.QuantizedKernel(quantized.quantize_rows, run, 2, np.int8)
        monkeypatch.setitem(quantized.KERNELS, (EMULATED_VNNI, kind, True), kernel)


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Make two threads share even the smallest products."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(cores, "MIN_PARALLEL_PRODUCTS", 0)
    yield request.param
    torch.set_num_threads(before)


def is_used(kind: str, dtype: torch.dtype) -> bool:
    """Return whether to test a kind with a dtype; the others differ from these in what they read and write only."""
    return dtype != FP16 or kind == "int8"


def some_paths(kind: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the paths to test; each takes seconds to compile, and fp32 and bf16 have tested all ways to multiply."""
    all_paths = paths(kind, dtype)
    return (all_paths[0], all_paths[-1]) if dtype == FP16 or (kind == "fp8" and dtype == BF16) else all_paths


every_dtype = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


@every_dtype
def test_every_path_agrees_with_the_reference(dtype: torch.dtype) -> None:
    for weight in WEIGHTS:
        if not is_used(weight.kind, dtype):
            continue
        out_features, in_features = weight.codes.shape
        for n, path in product((1, 5, 37), some_paths(weight.kind, dtype)):
            x = rows(n, in_features, dtype)
            got = quantized_linear(x, weight.pack(path=path))
            want = x.double() @ dequantize_ref(weight.codes, weight.scales, weight.group_size, weight.zeros).T
            assert got.dtype == dtype and got.shape == (n, out_features)
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < TOLERANCE[dtype], (weight.kind, weight.codes.shape, path, n)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_epilogue(dtype: torch.dtype, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = make(kind, 70, 96, 32), rows(5, 96, dtype) * 0.1, torch.randn(70, generator=generator)
    times = torch.randn(5, 70, generator=generator).to(dtype)
    largest = weight.reference(x.float(), bias).abs().max()  # before it is clamped
    for path in paths(kind, dtype):
        packed = weight.pack(bias, path)
        clamped = {"activation": "clamped_silu", "limit": 0.7}, {"activation": "clamped_plus_one", "limit": 0.7}
        for how in ({}, {"activation": "silu"}, {"activation": "gelu"}, {"times": times}, *clamped):
            got, want = quantized_linear(x, packed, **how).float(), weight.reference(x.float(), bias, **how)
            assert (got - want).abs().max() < 2 * TOLERANCE[dtype] * max(largest, want.abs().max()), (path, how)


def test_integers_have_the_same_bits_on_all_instruction_sets(emulated: None) -> None:
    for weight in WEIGHTS:
        if weight.kind == "fp8":
            continue
        own = [*paths(weight.kind, BF16)[:-1], EMULATED_VNNI]
        if weight.kind == "int8" and weight.scales.shape[1] == 1:
            own.append(EMULATED)
        for n in (1, 16, 37):
            x = rows(n, weight.codes.shape[1], BF16)
            first, *others = (quantized_linear(x, weight.pack(path=path)) for path in own)
            assert first.isfinite().all()
            for path, other in zip(own[1:], others, strict=True):
                assert torch.equal(first, other), (weight.kind, weight.codes.shape, path, n)


def test_a_sum_of_a_plane_is_rounded_to_fp32_on_every_path(emulated: None) -> None:
    """The lower plane's sum, 1041 * 127 * 127, is odd and above 2**24; 256 times the upper plane's is 17 less."""
    codes = torch.tensor([[127] * 1041 + [-127] * 4 + [-8, -55]], dtype=torch.int8)
    x = torch.tensor([[127.0] * 1041 + [LARGEST] * 5 + [256.0]]).repeat(16, 1)
    x[1] *= -1
    want = torch.full((16, 1), 16.0)
    want[1] = -16
    for path in (*paths("int8", BF16)[:-1], EMULATED, EMULATED_VNNI):
        packed = pack_quantized(codes, torch.ones(1, 1), codes.shape[1], None, "int8", path=path)
        for n in (1, 2, 16):
            assert torch.equal(quantized_linear(x[:n].to(BF16), packed).float(), want[:n]), (path, n)


@pytest.mark.parametrize(("kind", "has_zeros"), [("int8", False), ("int8", True), ("int4", True), ("fp4", False)])
def test_sums_of_integers_are_exact(emulated: None, kind: str, has_zeros: bool) -> None:
    """The result is rounded four times only: a row's two sums together, times a scale, times the other, to bf16."""
    weight, x = make(kind, 130, 3000, None, has_zeros), rows(20, 3000, BF16)
    codes = numbers_of(weight.codes).double() - (0 if weight.zeros is None else weight.zeros.double())
    largest = x.float().abs().amax(1, keepdim=True)
    integers = (x.float() * (torch.tensor(float(LARGEST)) / largest)).round().double()
    upper = ((integers + 128) / 256).floor()
    sums = [(plane @ codes.T).float().double() for plane in (upper, integers - 256 * upper)]
    scaled = ((256 * sums[0] + sums[1]).float() * weight.scales.T) * (largest / LARGEST)
    for path in (*paths(kind, BF16)[:-1], *([EMULATED] if kind == "int8" else [])):
        assert torch.equal(quantized_linear(x, weight.pack(path=path)), scaled.to(BF16)), path


def test_rows_as_integers() -> None:
    """A row's integers are those next to its numbers; rows of zeros and rows of very small numbers are zeros."""
    x = rows(6, 200, BF16)
    x[1], x[2], x[3] = 0, x[2] * 1e30, 1e-36
    weight = make("int8", 64, 200, 64)
    xq, xs, plane_sums = prepare_rows(kernel_of("avx_vnni", "int8", BF16), x, weight.pack())
    planes, scales = torch.from_numpy(xq).double().view(6, 2, 256), torch.from_numpy(xs).double()
    integers = 256 * planes[:, 0] + planes[:, 1]
    assert not integers[[1, 3]].any() and not integers[:, 200:].any()
    for row in (0, 2, 4, 5):
        assert integers[row].abs().max() == LARGEST
        assert ((integers[row, :200] * scales[row] - x[row].double()).abs() <= 0.5001 * scales[row]).all()
    by_group = planes.view(12, 4, 64).sum(2)
    assert torch.equal(torch.from_numpy(plane_sums).double(), -by_group)
    pairs, *others = prepare_rows(kernel_of("avx2", "int8", BF16), x, weight.pack())
    in_pairs = torch.from_numpy(pairs.reshape(-1).view(np.int16)).double().view(6, 64, 4)
    assert torch.equal(in_pairs, integers.view(6, 64, 4)[..., [0, 2, 1, 3]])
    assert np.array_equal(others[0], xs) and np.array_equal(others[1], plane_sums)


@every_dtype
def test_rows_do_not_depend_on_the_others(emulated: None, threads: int, dtype: torch.dtype) -> None:
    for weight in WEIGHTS:
        if weight.zeros is not None or not is_used(weight.kind, dtype):
            continue
        is_emulated = weight.kind == "int8" and dtype == BF16 and weight.scales.shape[1] == 1
        x = rows(90, weight.codes.shape[1], dtype)
        order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
        for path in (*some_paths(weight.kind, dtype), *([EMULATED] if is_emulated else [])):
            packed = weight.pack(path=path)
            whole = quantized_linear(x, packed)
            assert torch.equal(quantized_linear(x[order], packed), whole[order]), path
            for n in NUM_ROWS if threads == 1 else NUM_ROWS[::4]:
                assert torch.equal(quantized_linear(x[:n], packed), whole[:n]), (path, n)
                assert torch.equal(quantized_linear(x[-n:], packed), whole[-n:]), (path, n)


@every_dtype
def test_a_row_that_is_not_finite_spoils_no_other(emulated: None, dtype: torch.dtype) -> None:
    weight = make("int8", 70, 300, None)
    for path in (*some_paths("int8", dtype), *([EMULATED] if dtype == BF16 else [])):
        packed, x = weight.pack(path=path), rows(40, 300, dtype)
        clean = quantized_linear(x, packed)
        x[5], x[20, 3], x[21, 299] = torch.inf, torch.nan, -torch.inf
        got = quantized_linear(x, packed)
        bad = [5, 20, 21]
        others = [i for i in range(40) if i not in bad]
        assert torch.equal(got[others], clean[others]), path
        assert not got[bad].isfinite().any(), path


@pytest.mark.parametrize(("in_features", "zero"), [(131071, None), (65793, 127)])
def test_the_largest_sums_fit(emulated: None, in_features: int, zero: int | None) -> None:
    codes = torch.full((64, in_features), -128, dtype=torch.int8)
    zeros = None if zero is None else torch.full((64, 1), zero, dtype=torch.int8)
    x = torch.cat((torch.ones(1, in_features), -torch.ones(1, in_features))).to(BF16).repeat(8, 1)
    want = torch.tensor([1.0, -1.0]).repeat(8)[:, None] * (-128.0 - (zero or 0)) * in_features
    for path in (*paths("int8", BF16)[:-1], EMULATED):
        packed = pack_quantized(codes, torch.ones(64, 1), in_features, zeros, "int8", path=path)
        assert torch.equal(quantized_linear(x, packed), want.to(BF16).expand(16, 64)), path
    with pytest.raises(ValueError, match=f"at most {in_features}, or the sums might not fit 32 bits"):
        longer = torch.full((64, in_features + 1), -128, dtype=torch.int8)
        pack_quantized(longer, torch.ones(64, 1), in_features + 1, zeros, "int8")


def test_every_finite_fp8_code_is_exact() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    for path in paths("fp8", FP32):
        packed = pack_quantized(codes[:, None], torch.ones(254, 1), 1, None, "fp8", path=path)
        assert torch.equal(quantized_linear(torch.ones(1, 1), packed)[0], codes.float()), path


def test_every_fp4_code_is_exact_with_the_scales_of_mxfp4() -> None:
    """Include codes with a scale that is no normal number."""
    codes, exponents = torch.arange(16, dtype=torch.uint8), torch.tensor([0, 1, 2, 60, 127, 200, 230])
    of_row = torch.tensor([[1.0, 0.0]]).repeat_interleave(32, 1)
    for exponent in exponents.tolist():
        scale = torch.tensor([2.0 ** (exponent - 127)])
        weight = torch.zeros(16, 64, dtype=torch.uint8)
        weight[:, 0], weight[:, 40] = codes, codes  # in groups of other scales
        scales = torch.stack([scale.expand(16), torch.ones(16)], 1)
        for dtype in (BF16, FP32):
            for path in paths("fp4", dtype):
                packed = pack_quantized(weight, scales, 32, None, "fp4", path=path)
                got = quantized_linear(of_row.to(dtype), packed)[0]
                assert torch.equal(got.float(), numbers_of(codes) * scale), (exponent, dtype, path)


def test_weights_are_not_padded_in_the_result() -> None:
    """Whatever lies in the padding of inputs and outputs does not count."""
    weight = make("int4", 3, 5, None, has_zeros=True)
    packed = weight.pack()
    packed.codes[:, :, 3:] = 255
    packed.codes[:, 1:] = 255
    x = rows(2, 5, BF16)
    torch.testing.assert_close(quantized_linear(x, packed).float(), weight.reference(x.float()), rtol=1e-2, atol=1e-3)


@every_dtype
def test_no_rows(dtype: torch.dtype) -> None:
    assert quantized_linear(rows(1, 64, dtype)[:0], make("int8", 16, 64, None).pack()).shape == (0, 16)


def test_the_pack_is_a_copy_and_x_need_not_be_contiguous() -> None:
    weight = make("int8", 64, 64, None)
    packed, x = weight.pack(), rows(64, 64, BF16)
    before = quantized_linear(x.T, packed)
    weight.codes.zero_()
    assert torch.equal(quantized_linear(x.T.contiguous(), packed), before)


def test_the_dequantized_weight_of_the_last_path() -> None:
    for weight in WEIGHTS:
        packed = weight.pack()
        got = quantized.dequantize_panels(packed, 0, packed.codes.shape[0])[: packed.out_features]
        want = dequantize_ref(weight.codes, weight.scales, weight.group_size, weight.zeros)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(8, 2)}, r"scales are \[8, 2\]; \[8, 64\] codes in groups of 64 need \[8, 1\]"),
        ({"group_size": 20, "scales": torch.ones(8, 4)}, "groups of 20 inputs: the size must be a multiple of 8"),
        ({"codes": torch.full((8, 64), 8, dtype=torch.int8)}, "int4 codes from 8 to 8; they must be from -8 to 7"),
        ({"codes": torch.ones(8, 64)}, "int4 codes are torch.float32; they must be torch.int8"),
        ({"zeros": torch.full((8, 1), -9, dtype=torch.int8)}, "a zero of -9 for int4 codes; it must be at least -8"),
        ({"kind": "fp8"}, "fp8 codes are torch.int8; they must be torch.float8_e4m3fn"),
        ({"kind": "fp4"}, "fp4 codes are torch.int8 up to .; they must be torch.uint8 up to 15"),
        (
            {"kind": "fp4", "codes": torch.full((8, 64), 16, dtype=torch.uint8)},
            "fp4 codes are torch.uint8 up to 16; they must be torch.uint8 up to 15",
        ),
        (
            {"kind": "fp4", "codes": torch.ones(8, 64, dtype=torch.uint8), "scales": torch.full((8, 1), 0.3)},
            r"a scale of fp4 codes is no power of two from 2\^-127 to 2\^127",
        ),
    ],
)
def test_what_cannot_be_packed_is_named(change: dict[str, object], message: str) -> None:
    weight = replace(make("int4", 8, 64, None), **change)
    with pytest.raises(ValueError, match=message):
        weight.pack()


def test_fp8_codes_that_are_not_numbers_are_refused() -> None:
    weight = make("fp8", 8, 64, None)
    with pytest.raises(ValueError, match="only integers can have zeros"):
        replace(weight, zeros=torch.ones(8, 1, dtype=torch.int8)).pack()
    weight.codes[0, 0] = torch.nan
    with pytest.raises(ValueError, match="fp8 codes contain NaN"):
        weight.pack()


COMPILE_TILES = """
import numba
from numba import types
from moray.kernels.cpu import pair_product, quantized, quantized_product, vector_product

def array(dtype, dims):
    return types.Array(dtype, dims, "C")

byte, number, real = types.uint8, types.int64, types.float32
signature = types.void(
    types.Tuple((array(byte, 4), array(real, 3), array(byte, 3), number, array(types.float64, 2))),
    types.Tuple((array(types.int8, 2), array(real, 1), array(types.int32, 2))),
    types.Tuple((array(real, 1), number, array(types.uint16, 2), array(types.uint16, 2))),
    number, number
)
kernel = numba.njit(nogil=True, error_model="numpy")(quantized._int8_tiles.py_func)
kernel.compile(signature)
print("\\n".join(kernel.inspect_asm().values()))
"""


@pytest.mark.slow
def test_the_tiles_compile_for_a_cpu_that_has_them_and_none_is_spilled() -> None:
    """A CPU without AMX cannot run the code, but can compile and inspect it."""
    features = "+64bit,+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni,+amx-tile,+amx-int8"
    env = os.environ | {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features, "MORAY_CPU_ISA": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_TILES], env=env, text=True, capture_output=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip().replace("\t", " ") for line in done.stdout.splitlines()]
    used = {
        name: [line for line in lines if line.startswith(f"{name} ")]
        for name in ("ldtilecfg", "tilezero", "tileloadd", "tdpbsud", "tilestored")
    }
    assert all(used.values()) and "tilerelease" in lines, {name: len(found) for name, found in used.items()}
    # Sums are written once and nothing reads them back: a spilled tile would be loaded into one that holds sums.
    sums = tuple(f"%tmm{tile}" for tile in range(4))
    assert not [line for line in used["tileloadd"] if line.endswith(sums)]
    assert not [line for line in used["tilestored"] if not line.split()[1].startswith(sums)]


def test_kernels_have_names_of_their_own() -> None:
    """Numba's cache mixes up machine code of intrinsics with the same name."""
    for module, drivers in (
        (vector_product, ()),
        (quantized_product, ("multiply_quantized",)),
        (pair_product, ("multiply_pairs",)),
    ):
        names = [name for name in vars(module) if name.startswith("multiply_") and name not in drivers]
        assert len(names) > 1 and [vars(module)[name].__name__ for name in names] == names
