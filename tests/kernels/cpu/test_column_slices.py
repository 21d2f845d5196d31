"""The bits of a product's columns do not depend on how many columns the weight has, nor on where in it they lie.

A rank of tensor parallelism holds some rows of a weight, hence computes some columns of the product.
"""

import pytest
import torch

from moray.kernels.cpu.linear import ONEDNN, PLAIN, linear, pack, paths
from moray.kernels.cpu.linear_mistakes import Quantization, make_quantized, make_weight
from moray.kernels.cpu.quantized import pack_quantized, quantized_linear
from moray.kernels.cpu.quantized import paths as quantized_paths

ROWS = (1, 33)
OUT, IN = 200, 1100  # neither whole panels nor, for the integer kernels, whole tiles
SLICES = (slice(0, 100), slice(37, 101), slice(191, 200))
OWN = [
    (path, dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for path in paths(dtype)
    if path not in (ONEDNN, PLAIN)
]


@pytest.mark.parametrize(("path", "dtype"), OWN, ids=lambda x: str(x).removeprefix("torch."))
def test_columns_of_a_float_product(path: str, dtype: torch.dtype) -> None:
    weight, bias = make_weight(OUT, IN, dtype), torch.linspace(-1, 1, OUT).to(dtype)
    whole = pack(weight, bias, path)
    for num_rows in ROWS:
        x = torch.randn(num_rows, IN, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
        times = torch.randn(num_rows, OUT, generator=torch.Generator().manual_seed(3)).to(dtype)
        for activation, factors in (("none", None), ("silu", None), ("gelu", None), ("none", times)):
            expected = linear(x, whole, activation, factors)
            for columns in SLICES:
                part = pack(weight[columns].contiguous(), bias[columns], path)
                given = None if factors is None else factors[:, columns].contiguous()
                assert torch.equal(linear(x, part, activation, given), expected[:, columns]), (columns, activation)


# Each pair compiles a dozen kernels, half a minute where none is kept yet: one of each dtype is fast.
FAST = [("int8", torch.bfloat16), ("int4", torch.float32)]
PAIRS = [(kind, dtype) for kind in ("int8", "int4", "fp8", "fp4") for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in PAIRS],
    ids=[f"{kind}-{str(dtype).removeprefix('torch.')}" for kind, dtype in PAIRS],
)
def test_columns_of_a_quantized_product(kind: str, dtype: torch.dtype) -> None:
    for group_size, has_zeros in ((IN, False), (128, False), (128, kind in ("int8", "int4"))):
        codes, scales, size, zeros, _ = make_quantized(OUT, IN, Quantization(kind, group_size, has_zeros))
        for path in quantized_paths(kind, dtype):
            whole = pack_quantized(codes, scales, size, zeros, kind, path=path)
            for num_rows in ROWS:
                x = torch.randn(num_rows, IN, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
                for activation in ("none", "silu"):
                    expected = quantized_linear(x, whole, activation)
                    for columns in SLICES:
                        of_part = None if zeros is None else zeros[columns]
                        part = pack_quantized(codes[columns], scales[columns], size, of_part, kind, path=path)
                        result = quantized_linear(x, part, activation)
                        assert torch.equal(result, expected[:, columns]), (path, columns, activation)
