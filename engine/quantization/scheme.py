"""Scheme: how a model's linear weights are quantized. No torch: a plan computes a model's size from it."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

WeightKind = Literal["int8", "int4", "fp8"]
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
CODE_BITS: dict[WeightKind, int] = {"int8": 8, "int4": 4, "fp8": 8}


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's or an on-load model's linear weights are quantized.

    method:      who quantizes: "on_load" (moray, while it loads), or the quant_method of a published checkpoint
    kind:        what a code is
    group_size:  inputs that share a scale; None = one scale a row
    symmetric:   no zero points
    block_rows:  rows that share a scale: 128 for fp8 in blocks, else 1
    ignore:      patterns of the published names of modules whose weights are not quantized; a name matches as a whole
    """

    method: Literal["on_load", "compressed-tensors", "fp8", "gptq", "awq"]
    kind: WeightKind
    group_size: int | None = None
    symmetric: bool = True
    block_rows: int = 1
    ignore: tuple[str, ...] = ()

    def quantizes(self, module: str) -> bool:
        """Return whether the weight of a linear module with this published name is quantized."""
        return not any(re.fullmatch(pattern, module) for pattern in self.ignore)
