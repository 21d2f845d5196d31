"""Scheme: how a model's linear weights are quantized. No torch: a plan computes a model's size from it."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

OnLoadKind = Literal["int8", "int4", "fp8"]  # to which weights are quantized while they are loaded
ON_LOAD_KINDS: tuple[OnLoadKind, ...] = get_args(OnLoadKind)
WeightKind = Literal[OnLoadKind, "fp4"]
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
CODE_BITS: dict[WeightKind, int] = {"int8": 8, "int4": 4, "fp8": 8, "fp4": 4}
ON_LOAD_VERSION = 1  # of the arithmetic in on_load.py, and of the choice of weights
SCALE_BYTES: dict[WeightKind, int] = {"int8": 4, "int4": 4, "fp8": 4, "fp4": 1}
ZERO_POINT_BYTES = 1


@dataclass(frozen=True)
class Scheme:
    """States how a model's linear weights are quantized, in the checkpoint or on load.

    method:      who quantizes: "on_load" (moray, while it loads), or the quant_method of a published checkpoint
    kind:        what a code is
    group_size:  inputs that share a scale; None = one scale a row
    symmetric:   no zero points
    block_rows:  rows that share a scale: 128 for fp8 in blocks, else 1
    ignore:      patterns of the published names of modules whose weights are not quantized; a name matches as a whole
    targets:     patterns of those that are; () = all that `ignore` does not name

    Of published checkpoints only:

    is_per_tensor:  a published weight has one scale, which becomes that of each of its rows
    layout:         how codes are stored: "elements" (one each, as int8 or float8_e4m3fn), "words" (32 bits of them,
                    along the inputs), in the words of "gptq", "gptq_v2" (zero points without its 1) or "awq", or
                    "blocks" (the bytes of each group)
    notes:          what the checkpoint's config says about the model's run that is not followed
    other_names:    part of a published name between dots -> what `ignore` and `targets` may call it
    """

    method: Literal["on_load", "compressed-tensors", "fp8", "gptq", "awq", "mxfp4"]
    kind: WeightKind
    group_size: int | None = None
    symmetric: bool = True
    block_rows: int = 1
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    is_per_tensor: bool = False
    layout: Literal["elements", "words", "gptq", "gptq_v2", "awq", "blocks"] = "elements"
    notes: tuple[str, ...] = ()
    other_names: tuple[tuple[str, str], ...] = ()

    def quantizes(self, module: str) -> bool:
        """Return whether the weight of a linear module with this published name is quantized."""
        other_names = dict(self.other_names)
        names = {module, ".".join(other_names.get(part, part) for part in module.split("."))}
        return (not self.targets or _matches(self.targets, names)) and not _matches(self.ignore, names)

    @property
    def is_published(self) -> bool:
        """Return whether the checkpoint is quantized, and not the model while it is loaded."""
        return self.method != "on_load"

    @property
    def label(self) -> str:
        """Return format and version, which are part of a job's fingerprint: "int8/1", or "compressed-tensors int4"."""
        return f"{self.kind}/{ON_LOAD_VERSION}" if self.method == "on_load" else f"{self.method} {self.kind}"

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of a quantized weight in memory: its codes, and for each group a scale and a zero point."""
        groups = -(-in_features // (self.group_size or in_features))
        codes = -(-out_features * in_features * CODE_BITS[self.kind] // 8)
        per_group = SCALE_BYTES[self.kind] + (0 if self.symmetric else ZERO_POINT_BYTES)
        return codes + out_features * groups * per_group


def _matches(patterns: Collection[str], names: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns for name in names)
