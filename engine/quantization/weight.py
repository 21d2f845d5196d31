"""QuantizedWeight: a matrix as codes of few bits with scales. Checkpoints are read into it and kernels pack it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.quantization.scheme import WeightKind
from moray.kernels.e2m1 import numbers_of

CODE_DTYPES: dict[WeightKind, torch.dtype] = {
    "int8": torch.int8,
    "int4": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp4": torch.uint8,
}


@dataclass(frozen=True)
class QuantizedWeight:
    """Holds a weight [out_features, in_features] as codes with scales.

    Element [n, k] is scales[n, g] * (the number of codes[n, k] - zeros[n, g]) with g = k // group_size.

    kind:        what a code is: "int8" (-128..127), "int4" (-8..7), "fp8" (float8_e4m3fn) or "fp4" (e2m1)
    codes:       [out_features, in_features], one a byte: int8 for the integers, float8_e4m3fn for fp8, uint8 for fp4
    scales:      [out_features, num_groups] fp32
    group_size:  inputs that share a scale; in_features where a row has one scale. The last group may be shorter.
    zeros:       [out_features, num_groups] int8; None if all are zero
    """

    kind: WeightKind
    codes: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight, (out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def split_rows(self, parts: int) -> tuple["QuantizedWeight", ...]:
        """Return weights with equal numbers of the rows, as views."""
        zeros = [None] * parts if self.zeros is None else self.zeros.chunk(parts)
        rows = zip(self.codes.chunk(parts), self.scales.chunk(parts), zeros, strict=True)
        return tuple(QuantizedWeight(self.kind, c, s, self.group_size, z) for c, s, z in rows)

    def take_rows(self, rows: Sequence[slice]) -> "QuantizedWeight":
        """Return a weight with some of the rows, one slice after the other, in memory of its own."""

        def take(numbers: Tensor) -> Tensor:
            parts = (
                [numbers.view(torch.int8)[part] for part in rows]
                if numbers.itemsize == 1
                else [numbers[part] for part in rows]
            )
            return torch.cat(parts).view(numbers.dtype)

        zeros = None if self.zeros is None else take(self.zeros)
        return QuantizedWeight(self.kind, take(self.codes), take(self.scales), self.group_size, zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the codes stand for, computed in fp32 and rounded once to dtype."""
        weight = numbers_of(self.codes)
        for group in range(self.scales.shape[1]):
            part = weight[:, group * self.group_size : (group + 1) * self.group_size]
            if self.zeros is not None:
                part -= self.zeros[:, group, None]
            part *= self.scales[:, group, None]
        return weight.to(dtype)


def stack_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return one weight with the rows of all, which must be of one kind and have the same inputs and groups."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    assert all((w.kind, w.group_size) == (first.kind, first.group_size) for w in weights), "weights of several kinds"
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = torch.cat(
            [torch.zeros_like(w.scales, dtype=torch.int8) if w.zeros is None else w.zeros for w in weights]
        )
    codes = torch.cat([weight.codes.view(torch.int8) for weight in weights]).view(first.codes.dtype)
    return QuantizedWeight(first.kind, codes, torch.cat([weight.scales for weight in weights]), first.group_size, zeros)
