"""Find the mistakes of a path of `linear`: rows whose bits depend on their batch, and results that are not right."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.cpu import panels
from moray.kernels.cpu.linear import linear, linear_ref, pack
from moray.kernels.cpu.quantized import dequantize_ref, pack_quantized
from moray.kernels.cpu.quantized_calls import QuantizedLinear
from moray.kernels.cpu.quantized_panels import ZERO
from moray.kernels.cpu.thread_pool import num_cores, use_cores
from moray.kernels.e2m1 import EXPONENT_BIAS, scales_of

NUM_ROWS = (1, 2, 7, 16, 33, 64, 130)  # batch sizes that are checked
MANY_ROWS = 513  # a large step, added for libraries that may choose their kernel by the number of rows
CHECKED_ROWS = 8  # rows that are compared with a reference
CHECKED_OUTPUTS = 256  # outputs at each end of a row that are compared, so that the reference stays cheap
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # relative to the largest result
PERIOD = 65521  # made-up weights repeat after this many; a prime, so that they repeat at other positions of a row


@dataclass(frozen=True)
class Quantization:
    """States how the weights of a layer are quantized; see PackedQuantized."""

    kind: str
    group_size: int
    has_zeros: bool

    def describe(self, in_features: int) -> str:
        """Return it in words, such as "int4 in groups of 128"."""
        groups = f" in groups of {self.group_size}" if self.group_size < in_features else ""
        return f"{self.kind}{groups}{' with zeros' if self.has_zeros else ''}"


def make_weight(out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Return a made-up weight, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(PERIOD, generator=generator) * in_features**-0.5).to(dtype)
    return _repeat(numbers, out_features, in_features)


def make_quantized(
    out_features: int, in_features: int, quantization: Quantization
) -> tuple[Tensor, Tensor, int, Tensor | None, str]:
    """Return a made-up quantized weight as the first arguments of pack_quantized, the same at each call."""
    kind, group_size = quantization.kind, quantization.group_size
    generator = torch.Generator().manual_seed(0)
    groups = -(-in_features // group_size)
    if kind == "fp8":
        numbers = torch.randn(PERIOD, generator=generator).to(torch.float8_e4m3fn)
    elif kind == "fp4":
        numbers = torch.randint(0, 16, (PERIOD,), generator=generator, dtype=torch.uint8)
    else:
        limit = ZERO[kind]
        numbers = torch.randint(-limit, limit, (PERIOD,), generator=generator, dtype=torch.int8)
    scales = torch.rand(out_features, groups, generator=generator) + 0.5
    if kind == "fp4":
        scales = scales_of((scales * 4).byte() + EXPONENT_BIAS)
    zeros = torch.randint(-8, 8, (out_features, groups), generator=generator, dtype=torch.int8)
    codes = _repeat(numbers, out_features, in_features)
    return codes, scales, group_size, zeros if quantization.has_zeros else None, kind


def _repeat(numbers: Tensor, rows: int, columns: int) -> Tensor:
    repeated: Tensor = numbers.view(-1).repeat(-(-rows * columns // len(numbers)))[: rows * columns]
    return repeated.view(rows, columns)


def find_mistakes(
    weight: Tensor, path: str, num_rows: Sequence[int] = (), core_counts: Sequence[int] = ()
) -> Iterator[str]:
    """Yield a description of each mistake in the rows that the path computes. Raises what the path raises.

    num_rows:    batch sizes that are compared with the largest of them; by default those of the check at load
    core_counts: numbers of cores that are compared with the caller's
    """
    if not num_rows:
        num_rows = NUM_ROWS if (path, weight.dtype) in panels.KERNELS else (*NUM_ROWS, MANY_ROWS)
    packed = pack(weight, path=path)

    def reference(x: Tensor, part: slice) -> Tensor:
        return linear_ref(x, weight[part].float(), None)

    x = _made_up_rows(max(num_rows), weight.shape[1], weight.dtype)
    yield from _compare(lambda x: linear(x, packed), reference, x, num_rows, core_counts)


def find_quantized_mistakes(
    weight: tuple[Tensor, Tensor, int, Tensor | None, str],
    dtype: torch.dtype,
    path: str,
    num_rows: Sequence[int] = NUM_ROWS,
    core_counts: Sequence[int] = (),
) -> Iterator[str]:
    """Yield a description of each mistake in the rows that the path computes. Raises what the path raises.

    weight: the first arguments of pack_quantized
    dtype:  of the rows
    The rest is as for find_mistakes.
    """
    codes, scales, group_size, zeros, _ = weight
    packed = pack_quantized(*weight, path=path)

    def reference(x: Tensor, part: slice) -> Tensor:
        of_part = codes[part], scales[part], group_size, None if zeros is None else zeros[part]
        return linear_ref(x, dequantize_ref(*of_part), None)

    x = _made_up_rows(max(num_rows), codes.shape[1], dtype)
    yield from _compare(QuantizedLinear(packed, dtype), reference, x, num_rows, core_counts)


def _made_up_rows(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def _compare(
    multiply: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor, slice], Tensor],
    x: Tensor,
    num_rows: Sequence[int],
    core_counts: Sequence[int],
) -> Iterator[str]:
    """Yield a description of each mistake in the rows that `multiply` computes.

    reference: (fp32 rows, part of the outputs) -> what they should be
    """
    full = multiply(x)
    differing = [
        n
        for n in num_rows
        if not torch.equal(multiply(x[:n]), full[:n]) or not torch.equal(multiply(x[-n:]), full[-n:])
    ]
    if differing:
        yield f"other bits for {', '.join(map(str, differing))} rows than for {len(x)}"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    if not torch.equal(multiply(x[order]), full[order]):
        yield "other bits in another order of the rows"
    for count in core_counts:
        with use_cores(count):
            on_some_cores = multiply(x)
        if not torch.equal(on_some_cores, full):
            yield f"other bits on {count} of {num_cores()} cores than on all"
    for part in (slice(0, CHECKED_OUTPUTS), slice(-CHECKED_OUTPUTS, None)):
        expected = reference(x[:CHECKED_ROWS].float(), part)
        error = (full[:CHECKED_ROWS, part].float() - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE[x.dtype]:
            yield f"errors of {error:.2g} of the largest number"
            return
