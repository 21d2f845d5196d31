"""One operation at one number of rows: what is called, what it is compared with, and the work it cannot do without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gpu.measure import Call
from gpu.roofline import Work

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DRY_ROWS = (3,)


@dataclass(frozen=True)
class Case:
    """ours, peers: a call for each turn, over copies of what is read; facts: what else belongs into the row"""

    op: str
    rows: int
    work: Work
    ours: Sequence[Call]
    peers: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """build: from a number of rows; most_rows: beyond it the operation does not occur in a step"""

    name: str
    build: Callable[[int], Case]
    most_rows: int = max(ROWS)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)


def in_turn(call: Callable[..., object], *turns: Sequence[object]) -> list[Call]:
    """A call for each turn; turns: for each argument what it is in each turn."""
    return [partial(call, *arguments) for arguments in zip(*turns, strict=True)]
