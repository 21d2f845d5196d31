"""PackedWeight: a weight as the GEMMs read it, dense or as codes with scales, and how codes are packed.

A word of 32 bits holds the codes of inputs that are a fixed distance apart, those of a plane. In a block of 128 inputs
in 8 bits, word j holds the inputs j, j + 32, j + 64 and j + 96, the first in its lowest byte; in 4 bits word j holds j,
j + 16 and so on. So the codes at one place of neighbouring words are those of neighbouring inputs: they are multiplied
by a piece of a row of x as it is in memory, and words are copied and read in as wide pieces as dense weights. Integers
are stored with a bias that makes them positive, 128 or 8.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moray.kernels.e2m1 import exponents_of, numbers_of, scales_of
from moray.kernels.gpu.tuning import Key
from moray.kernels.gpu.weight_formats import CODE_BITS, PACKED_BLOCK_K, Format, PackedFormat

MAX_INT4_ZERO = 100  # a code less such a zero point is a number that bfloat16 holds


class Sizes(NamedTuple):
    """Holds the sizes of a weight: num_experts (1 for a linear layer), n outputs, k inputs."""

    num_experts: int
    n: int
    k: int


@cache
def _key(sizes: Sizes, dtype: torch.dtype, format: Format, group_size: int) -> Key:
    num_experts, n, k = sizes
    return Key(n, k, dtype, num_experts, format, group_size)


@dataclass(frozen=True)
class PackedWeight:
    """Holds the weights of a layer's experts, or of one linear layer, which is one expert.

    weight:      dense: [num_experts, n, k]; fp8_fp8: the same in float8_e4m3fn; else [num_experts, n, words] int32
    scales:      [num_experts, num_groups, n] fp32; of fp4, uint8 exponents, see e2m1.py; None if dense
    zeros:       [num_experts, num_groups, n] int8, subtracted from the codes; None = none
    group_size:  inputs that share a scale; 0 = all
    """

    format: Format
    sizes: Sizes
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group_size: int = 0

    def key(self, dtype: torch.dtype) -> Key:
        """Return what the choice of a tile depends on. dtype: of x"""
        return _key(self.sizes, dtype, self.format, self.group_size)

    def set_expert(self, expert: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Pack one expert's weight.

        codes:  [n, k] int8 (for int4 in -8..7), float8_e4m3fn, or e2m1 in uint8
        scales: [n, num_groups] fp32; powers of two for fp4
        zeros:  [n, num_groups] int8 or None

        Raises ValueError if codes, scales or zeros are no numbers of the format.
        """
        _, n, k = self.sizes
        num_groups = -(-k // self.group_size) if self.group_size else 1
        assert self.scales is not None, "a dense weight is used as it is"
        assert codes.shape == (n, k) and scales.shape == (n, num_groups), f"{codes.shape}, {scales.shape}"
        assert (zeros is None) == (self.zeros is None), "all experts have zero points, or none has"
        self.scales[expert, :num_groups].copy_((exponents_of(scales) if self.format == "fp4" else scales).T)
        if self.zeros is not None and zeros is not None:
            if self.format == "int4" and int(zeros.abs().max()) > MAX_INT4_ZERO:
                raise ValueError(f"a zero point of 4-bit codes is beyond {MAX_INT4_ZERO} on either side")
            self.zeros[expert, :num_groups].copy_(zeros.T)
        if self.format == "fp8_fp8":
            self.weight[expert].copy_(codes)
        else:
            assert self.format != "dense"
            _pack_words(codes, self.format, out=self.weight[expert])

    def dequantize(self) -> Tensor:
        """Return the weights in fp32, [num_experts, n, k]: what the kernels multiply by, but for rounding."""
        if self.format == "dense" or self.format == "fp8_fp8":
            numbers = self.weight.view(self.sizes).float()
        else:
            numbers = _unpack_words(self.weight, self.format, self.sizes.k)
        if self.scales is None:
            return numbers
        groups = torch.arange(self.sizes.k, device=numbers.device) // (self.group_size or self.sizes.k)
        if self.zeros is not None:
            numbers = numbers - self.zeros.float()[:, groups].transpose(1, 2)
        scales = scales_of(self.scales) if self.format == "fp4" else self.scales
        return numbers * scales[:, groups].transpose(1, 2)


def as_packed(weight: Tensor | PackedWeight) -> PackedWeight:
    """Return a weight that is used as it is, [num_experts, n, k] or [n, k], as a PackedWeight."""
    if isinstance(weight, PackedWeight):
        return weight
    num_experts = len(weight) if weight.dim() == 3 else 1
    return PackedWeight("dense", Sizes(num_experts, weight.shape[-2], weight.shape[-1]), weight)


def empty_packed(
    sizes: Sizes,
    format: PackedFormat,
    group_size: int | None = None,
    *,
    has_zeros: bool = False,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """Return a weight whose experts set_expert then packs, one at a time.

    group_size: inputs that share a scale; None, or at least k: all of them

    Raises ValueError if the kernels cannot multiply groups of that size.
    """
    num_experts, n, k = sizes
    block = PACKED_BLOCK_K[format]
    group_size = 0 if group_size is None or group_size >= k else group_size
    if group_size:
        check_group_size(format, group_size)
    padded = -(-k // block) * block
    # The last block may have more groups than the weight: their inputs are not there, and their scales are zero.
    num_groups = -(-padded // group_size) if group_size else 1
    if format == "fp8_fp8":
        weight = torch.empty(sizes, dtype=torch.float8_e4m3fn, device=device)
    else:
        weight = torch.empty(num_experts, n, padded * CODE_BITS[format] // 32, dtype=torch.int32, device=device)
    scaled = torch.uint8 if format == "fp4" else torch.float32
    scales = torch.zeros(num_experts, num_groups, n, dtype=scaled, device=device)
    zeros = torch.zeros(num_experts, num_groups, n, dtype=torch.int8, device=device) if has_zeros else None
    return PackedWeight(format, sizes, weight, scales, zeros, group_size)


def check_group_size(format: PackedFormat, group_size: int) -> None:
    """Raise ValueError unless the groups are whole planes of a block, or whole blocks."""
    block = PACKED_BLOCK_K[format]
    plane = block if format == "fp8_fp8" else block * CODE_BITS[format] // 32
    if group_size % block and (block % group_size or group_size % plane):
        sizes = [plane << i for i in range(block.bit_length()) if plane << i < block]
        allowed = ", ".join(str(size) for size in sizes)
        raise ValueError(
            f"scales of {format} weights are for groups of {group_size} inputs; a GPU's kernels multiply groups of "
            f"{allowed}{' or ' if sizes else ''}multiples of {block}"
        )


def _pack_words(codes: Tensor, format: PackedFormat, out: Tensor) -> None:
    """Write codes, [n, k], into words, [n, words] int32; inputs beyond k get the code of zero."""
    n, k = codes.shape
    bits = codes.view(torch.uint8)
    if format == "fp8":
        if bool(((bits & 0x7F) == 0x7F).any()):
            raise ValueError("a code of an fp8 weight is NaN")
        biased = bits
    elif format == "fp4":
        if k and int(bits.max()) > 15:
            raise ValueError(f"codes of an fp4 weight are up to {int(bits.max())}, beyond 15")
        biased = bits
    elif format == "int4":
        if k and not (int(codes.min()) >= -8 and int(codes.max()) <= 7):
            raise ValueError(f"codes of an int4 weight are {int(codes.min())} to {int(codes.max())}, beyond -8..7")
        biased = (codes + 8).view(torch.uint8)
    else:
        biased = bits ^ 0x80
    missing = out.shape[1] * 32 // CODE_BITS[format] - k
    biased = torch.nn.functional.pad(biased, (0, missing), value={"int8": 128, "int4": 8, "fp8": 0, "fp4": 0}[format])
    planes = biased.unflatten(1, (-1, 32 // CODE_BITS[format], PACKED_BLOCK_K[format] * CODE_BITS[format] // 32))
    if CODE_BITS[format] == 4:
        planes = planes[:, :, 0::2] | (planes[:, :, 1::2] << 4)
    out.view(torch.uint8).view(n, planes.shape[1], planes.shape[3], 4).copy_(planes.transpose(2, 3))


def _unpack_words(words: Tensor, format: PackedFormat, k: int) -> Tensor:
    """Return the codes in words, [num_experts, n, words] int32, as fp32 numbers, [num_experts, n, k]."""
    width = PACKED_BLOCK_K[format] * CODE_BITS[format] // 32
    planes = words.view(torch.uint8).unflatten(2, (-1, width, 4)).transpose(3, 4)
    if CODE_BITS[format] == 4:
        planes = torch.stack([planes & 15, planes >> 4], dim=4).flatten(3, 4)
    codes = planes.flatten(2)[..., :k]
    if format == "fp4":
        return numbers_of(codes)
    if format == "fp8":
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    return codes.float() - (8 if format == "int4" else 128)
