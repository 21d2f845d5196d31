"""Linear layers on quantized weights: `pack_quantized` once at load, `quantized_linear` every step.

Weights are integers of 8 or 4 bits, e2m1, or float8_e4m3fn, with a scale for each output or for each group of inputs;
they stay so in memory. Rows in bfloat16 are multiplied with all but the last as integers of 16 bits, which have one
scale a row and exact sums; other rows, and rows with float8, are multiplied in fp32 (see quantized_product.py).

A row's result is bitwise the same whatever the other rows, the number of rows and the number of threads. For integers
times bfloat16 it is also the same on all instruction sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import uint64
from torch import Tensor

from moray.kernels.cpu import pair_product, tiles
from moray.kernels.cpu import quantized_product as product
from moray.kernels.cpu.epilogue import encode
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.linear import BLOCK_ROWS, PLAIN, activate, linear_ref
from moray.kernels.cpu.numba_intrinsics import array, compiled
from moray.kernels.cpu.pair_product import longest_codes, multiply_pairs
from moray.kernels.cpu.panels import split_work
from moray.kernels.cpu.quantized_panels import INPUTS, STEP_INPUTS, ZERO, pack_by_group, pack_codes, unpack_codes
from moray.kernels.cpu.quantized_product import PLANES, multiply_quantized
from moray.kernels.cpu.quantized_rows import quantize_pairs, quantize_rows, widen_rows
from moray.kernels.cpu.quantized_tiles import multiply_quantized_tiles
from moray.kernels.cpu.thread_pool import MIN_PARALLEL_ELEMENTS, parallel_for, parallel_rows
from moray.kernels.cpu.vector_product import PANEL
from moray.kernels.e2m1 import exponents_of, numbers_of, scales_of

NO_BIAS = np.empty(0, np.float32)
NO_ZEROS = np.empty((0, 0, 0), np.uint8)
NO_LENGTHS = np.empty((0, 0), np.float64)
MIN_TILE_ROWS = 16  # fewer rows are multiplied faster on vectors, with the same bits
MAX_SUM = 2**31 - 1  # of a group's products with a plane, whose numbers are up to MAX_PLANE
MAX_PLANE = 128


@dataclass(frozen=True)
class PackedQuantized:
    """A quantized weight in panels of 64 outputs; element [n, k] is scales[n, g] * (codes[n, k] - zeros[n, g]).

    codes:      [panels, steps, 64, 4] uint8, see quantized_panels.pack_codes
    scales:     [panels, groups, 64] fp32; of fp4, uint8 exponents, see e2m1.py
    zeros:      [panels, groups, 64] uint8, what is subtracted from the codes in memory; None = the same for all
    bias:       [out_features] fp32, or None
    group_size: inputs that share a scale; a multiple of the inputs of a step
    kind:       "int8" | "int4" | "fp8" | "fp4"
    path:       the name of the path; None = the first of paths(kind, dtype of the rows)
    lengths:    [panels, groups] fp64, see pair_product.longest_codes; None where nothing reads them
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    kind: str
    path: str | None = None
    lengths: Tensor | None = None

    @property
    def padded_inputs(self) -> int:
        """Return how many inputs a prepared row has."""
        return self.codes.shape[1] * STEP_INPUTS[self.kind]

    @cached_property
    def arrays(self) -> tuple[Any, Any, Any, int, Any]:
        """Return the weight as QuantizedKernel.run takes it."""
        zeros = NO_ZEROS if self.zeros is None else array(self.zeros)
        lengths = NO_LENGTHS if self.lengths is None else array(self.lengths)
        return array(self.codes), array(self.scales), zeros, self.group_size // STEP_INPUTS[self.kind], lengths


@dataclass(frozen=True)
class QuantizedKernel:
    """The compiled functions of a path.

    prepare: (x, group_inputs, xq, xs, plane_sums, start, stop); quantize_rows or widen_rows
    run:     (weight, rows, result, start, stop); see multiply_quantized
    planes:  rows of xq for each row of x
    reads:   NumPy dtype of xq
    """

    prepare: Callable[..., None]
    run: Callable[..., None]
    planes: int
    reads: Any


@compiled
def _int8_tiles(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    scales = weight[1]
    if len(result[3]) >= MIN_TILE_ROWS and scales.shape[1] == 1:
        multiply_quantized_tiles(
            tiles.configure,
            tiles.zero,
            tiles.read,
            tiles.dot_bytes,
            tiles.write,
            tiles.release,
            uint64(0),
            128,
            weight,
            rows,
            result,
            start,
            stop,
        )
    else:
        multiply_quantized(product.multiply_bytes_512, 3, PLANES, 128, weight, rows, result, start, stop)


@compiled
def _int8_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_bytes_512, 3, PLANES, 128, weight, rows, result, start, stop)


@compiled
def _int4_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_halves_512, 3, PLANES, 8, weight, rows, result, start, stop)


@compiled
def _fp4_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_e2m1_512, 3, PLANES, 12, weight, rows, result, start, stop)


@compiled
def _int8_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_bytes_256, 3, PLANES, 128, weight, rows, result, start, stop)


@compiled
def _int4_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_halves_256, 2, PLANES, 8, weight, rows, result, start, stop)


@compiled
def _fp4_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_e2m1_256, 2, PLANES, 12, weight, rows, result, start, stop)


@compiled
def _int8_avx2(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_pairs(pair_product.multiply_byte_pairs_256, 128, weight, rows, result, start, stop)


@compiled
def _int4_avx2(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_pairs(pair_product.multiply_half_pairs_256, 8, weight, rows, result, start, stop)


@compiled
def _int8_pairs_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_pairs(pair_product.multiply_byte_pairs_512, 128, weight, rows, result, start, stop)


@compiled
def _int4_pairs_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_pairs(pair_product.multiply_half_pairs_512, 8, weight, rows, result, start, stop)


@compiled
def _fp4_avx2(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_e2m1_avx2, 2, PLANES, 12, weight, rows, result, start, stop)


@compiled
def _int8_floats_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_byte_floats_512, 4, 1, 128, weight, rows, result, start, stop)


@compiled
def _int4_floats_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_half_floats_512, 4, 1, 8, weight, rows, result, start, stop)


@compiled
def _fp8_floats_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_fp8_floats_512, 4, 1, 0, weight, rows, result, start, stop)


@compiled
def _fp4_floats_512(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_e2m1_floats_512, 4, 1, 12, weight, rows, result, start, stop)


@compiled
def _int8_floats_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_byte_floats_256, 4, 1, 128, weight, rows, result, start, stop)


@compiled
def _int4_floats_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_half_floats_256, 4, 1, 8, weight, rows, result, start, stop)


@compiled
def _fp8_floats_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_fp8_floats_256, 4, 1, 0, weight, rows, result, start, stop)


@compiled
def _fp4_floats_256(weight: Any, rows: Any, result: Any, start: int, stop: int) -> None:
    multiply_quantized(product.multiply_e2m1_floats_256, 4, 1, 12, weight, rows, result, start, stop)


def _as_integers(run: Callable[..., None]) -> QuantizedKernel:
    return QuantizedKernel(quantize_rows, run, PLANES, np.int8)


def _as_pairs(run: Callable[..., None]) -> QuantizedKernel:
    return QuantizedKernel(quantize_pairs, run, PLANES, np.int8)


def _as_floats(run: Callable[..., None]) -> QuantizedKernel:
    return QuantizedKernel(widen_rows, run, 1, np.float32)


# (instruction set, kind of the weight, whether rows are read as integers) -> kernel
KERNELS = {
    ("amx", "int8", True): _as_integers(_int8_tiles),
    ("avx512_vnni", "int8", True): _as_integers(_int8_512),
    ("avx512_vnni", "int4", True): _as_integers(_int4_512),
    ("avx512_vnni", "fp4", True): _as_integers(_fp4_512),
    ("avx_vnni", "int8", True): _as_integers(_int8_256),
    ("avx_vnni", "int4", True): _as_integers(_int4_256),
    ("avx_vnni", "fp4", True): _as_integers(_fp4_256),
    ("avx512", "int8", True): _as_pairs(_int8_pairs_512),
    ("avx512", "int4", True): _as_pairs(_int4_pairs_512),
    ("avx2", "int8", True): _as_pairs(_int8_avx2),
    ("avx2", "int4", True): _as_pairs(_int4_avx2),
    ("avx2", "fp4", True): _as_integers(_fp4_avx2),
    ("avx512", "int8", False): _as_floats(_int8_floats_512),
    ("avx512", "int4", False): _as_floats(_int4_floats_512),
    ("avx512", "fp8", False): _as_floats(_fp8_floats_512),
    ("avx512", "fp4", False): _as_floats(_fp4_floats_512),
    ("avx2", "int8", False): _as_floats(_int8_floats_256),
    ("avx2", "int4", False): _as_floats(_int4_floats_256),
    ("avx2", "fp8", False): _as_floats(_fp8_floats_256),
    ("avx2", "fp4", False): _as_floats(_fp4_floats_256),
}


def reads_integers(kind: str, dtype: torch.dtype) -> bool:
    """Return whether rows of a dtype are multiplied with codes of a kind as integers."""
    return dtype == torch.bfloat16 and kind != "fp8"


def paths(kind: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the paths for codes of a kind and rows of a dtype on this CPU, best first."""
    own = [isa for isa in isas() if (isa, kind, reads_integers(kind, dtype)) in KERNELS]
    return (*own, PLAIN)


def kernel_of(path: str | None, kind: str, dtype: torch.dtype) -> QuantizedKernel | None:
    """Return the compiled functions that multiply codes of a kind with rows of a dtype; None for the plain path.

    path: one of paths(kind, dtype); None = the first of them
    """
    return KERNELS.get((path or paths(kind, dtype)[0], kind, reads_integers(kind, dtype)))


def pack_quantized(
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    path: str | None = None,
) -> PackedQuantized:
    """Pack a quantized weight. Free the original afterwards: the packed weight is a copy.

    Raises ValueError if codes, scales or zeros are not of the kind, if a group's size is no multiple of the inputs that
    are packed together, or if the sums of a group might not fit 32 bits.

    codes:      [out_features, in_features]: int8 for "int8" (-128..127) and "int4" (-8..7), float8_e4m3fn for "fp8",
                uint8 for "fp4" (e2m1, 0..15)
    scales:     [out_features, groups] fp32; powers of two for "fp4"
    group_size: inputs that share a scale; in_features or more for one scale a row. The last group may be shorter.
    zeros:      [out_features, groups] int8, what is subtracted from the codes; None = zero
    bias:       [out_features] or None
    path:       one of paths(kind, dtype of the rows); None = the first of them
    """
    out_features, in_features = codes.shape
    groups = -(-in_features // group_size)
    if scales.shape != (out_features, groups):
        raise ValueError(
            f"scales are {list(scales.shape)}; {list(codes.shape)} codes in groups of {group_size} need "
            f"[{out_features}, {groups}]"
        )
    if groups > 1 and group_size % STEP_INPUTS[kind]:
        raise ValueError(
            f"groups of {group_size} inputs: the size must be a multiple of {STEP_INPUTS[kind]} for {kind}"
        )
    _check_codes(codes, zeros, kind, min(group_size, in_features))
    stored_zeros = None
    if zeros is not None and bool(zeros.any()):
        stored_zeros = pack_by_group((zeros.to(torch.int16) + ZERO[kind]).to(torch.uint8))
    group_size = group_size if groups > 1 else -(-in_features // INPUTS) * INPUTS
    kernel = kernel_of(path, kind, torch.bfloat16)
    reads_pairs = kernel is not None and kernel.prepare is quantize_pairs
    return PackedQuantized(
        pack_codes(codes, kind),
        pack_by_group(exponents_of(scales) if kind == "fp4" else scales.float()),
        stored_zeros,
        None if bias is None else bias.float(),
        out_features,
        in_features,
        group_size,
        kind,
        path,
        longest_codes(codes, zeros, group_size, STEP_INPUTS[kind]) if reads_pairs else None,
    )


def _check_codes(codes: Tensor, zeros: Tensor | None, kind: str, group_inputs: int) -> None:
    if kind == "fp8":
        if codes.dtype != torch.float8_e4m3fn:
            raise ValueError(f"fp8 codes are {codes.dtype}; they must be torch.float8_e4m3fn")
        if zeros is not None and bool(zeros.any()):
            raise ValueError("fp8 codes have zeros; only integers can have zeros other than 0")
        if bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError("fp8 codes contain NaN")
        return
    if kind == "fp4":
        if codes.dtype != torch.uint8 or int(codes.max()) > 15:
            raise ValueError(f"fp4 codes are {codes.dtype} up to {int(codes.max())}; they must be torch.uint8 up to 15")
        if zeros is not None and bool(zeros.any()):
            raise ValueError("fp4 codes have zeros; only integers can have zeros other than 0")
        return
    if codes.dtype != torch.int8:
        raise ValueError(f"{kind} codes are {codes.dtype}; they must be torch.int8")
    least, most = -ZERO[kind], ZERO[kind] - 1
    if kind == "int4":
        found = codes.aminmax()
        if found.min < least or found.max > most:
            raise ValueError(
                f"int4 codes from {int(found.min)} to {int(found.max)}; they must be from {least} to {most}"
            )
    largest = ZERO[kind]
    if zeros is not None:
        lowest, highest = (int(one) for one in zeros.to(torch.int16).aminmax())
        if lowest < least:
            raise ValueError(f"a zero of {lowest} for {kind} codes; it must be at least {least}")
        largest = max(most - lowest, highest - least)
    if group_inputs * largest * MAX_PLANE > MAX_SUM:
        raise ValueError(
            f"{group_inputs} inputs share a scale; with {kind} codes up to {largest} from their zero it can be at most "
            f"{MAX_SUM // (largest * MAX_PLANE)}, or the sums might not fit 32 bits"
        )


def quantized_linear(
    x: Tensor, packed: PackedQuantized, activation: str = "none", times: Tensor | None = None, limit: float = 0.0
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once; each row bitwise independent of the other rows.

    A row of x with an infinity or a NaN gives a row of NaN, or of infinities and NaNs.

    x:          [num_tokens, in_features] bf16, fp16 or fp32
    activation, times, limit: see linear.linear
    returns:    [num_tokens, out_features], dtype of x
    """
    y = x.new_empty(x.shape[0], packed.out_features)
    if x.shape[0] == 0:
        return y
    kernel = kernel_of(packed.path, packed.kind, x.dtype)
    if kernel is None:
        return _plain_linear(x, packed, activation, times, limit)
    out = array(y)
    bias = NO_BIAS if packed.bias is None else packed.bias.numpy()
    factors = out[:, :0] if times is None else array(times.contiguous())
    result = bias, encode(activation, limit), factors, out
    arguments = packed.arrays, prepare_rows(kernel, x, packed), result
    num_panels = packed.codes.shape[0]
    bounds = split_work(x.shape[0], num_panels, num_panels * PANEL * packed.in_features, packed.codes.nbytes)
    if len(bounds) == 2:
        kernel.run(*arguments, *bounds)
    else:
        parallel_for(lambda i: kernel.run(*arguments, bounds[i], bounds[i + 1]), range(len(bounds) - 1))
    return y


def prepare_rows(kernel: QuantizedKernel, x: Tensor, packed: PackedQuantized) -> tuple[Any, Any, Any]:
    """Return xq, xs and plane_sums of x for the kernel; weights with the same inputs and groups can share them."""
    num_tokens, padded, groups = x.shape[0], packed.padded_inputs, packed.scales.shape[1]
    planes = kernel.planes
    xq, xs = np.empty((planes * num_tokens, padded), kernel.reads), np.empty(num_tokens, np.float32)
    plane_sums = np.empty((planes * num_tokens, groups if planes == PLANES else 0), np.int32)
    read, group_size = array(x.contiguous()), packed.group_size
    if xq.size < MIN_PARALLEL_ELEMENTS:  # parallel_rows takes longer to find out the same
        kernel.prepare(read, group_size, xq, xs, plane_sums, 0, num_tokens)
    else:
        parallel_rows(lambda i, j: kernel.prepare(read, group_size, xq, xs, plane_sums, i, j), num_tokens, padded)
    return xq, xs, plane_sums


def _plain_linear(x: Tensor, packed: PackedQuantized, activation: str, times: Tensor | None, limit: float) -> Tensor:
    """Multiply blocks of 16 rows, the last one padded with zeros, in fp32 with dequantized panels, each on one core.

    MKL may choose the order of sums by the number of rows and of threads; here both are the same in every call.
    """
    num_tokens = x.shape[0]
    blocks = F.pad(x.float(), (0, 0, 0, -num_tokens % BLOCK_ROWS)).view(-1, BLOCK_ROWS, x.shape[1])
    sums = blocks.new_empty(len(blocks), BLOCK_ROWS, packed.codes.shape[0] * PANEL)

    def multiply(panel: int) -> None:
        weight = dequantize_panels(packed, panel, panel + 1)
        for block, rows in enumerate(blocks):
            sums[block, :, panel * PANEL : (panel + 1) * PANEL] = F.linear(rows, weight)

    parallel_for(multiply, range(packed.codes.shape[0]))
    y = sums.view(-1, sums.shape[2])[:num_tokens, : packed.out_features]
    if packed.bias is not None:
        y = y + packed.bias
    return activate(y, activation, times, limit).to(x.dtype)


def dequantize_panels(packed: PackedQuantized, start: int, stop: int) -> Tensor:
    """Return the rows of the weight that some panels hold, [(stop - start) * PANEL, in_features] fp32."""

    def by_input(numbers: Tensor) -> Tensor:
        of_groups = numbers[start:stop].transpose(1, 2).flatten(0, 1).float()
        return of_groups.repeat_interleave(packed.group_size, 1)[:, : packed.in_features]

    codes = unpack_codes(packed.codes[start:stop], packed.kind)[:, : packed.in_features]
    zeros = ZERO[packed.kind] if packed.zeros is None else by_input(packed.zeros)
    scales = scales_of(packed.scales) / 2 if packed.kind == "fp4" else packed.scales
    return (codes - zeros) * by_input(scales)


def dequantize_ref(codes: Tensor, scales: Tensor, group_size: int, zeros: Tensor | None) -> Tensor:
    """Return the weight that codes stand for, [out_features, in_features], in fp64."""
    width = codes.shape[1]
    spread = scales.double().repeat_interleave(group_size, 1)[:, :width]
    shift = 0.0 if zeros is None else zeros.double().repeat_interleave(group_size, 1)[:, :width]
    return (numbers_of(codes).double() - shift) * spread


def quantized_linear_ref(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    zeros: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "none",
    times: Tensor | None = None,
    limit: float = 0.0,
) -> Tensor:
    """Compute `quantized_linear` slowly and obviously, in fp32 from the dequantized weight."""
    return linear_ref(x, dequantize_ref(codes, scales, group_size, zeros), bias, activation, times, limit)
