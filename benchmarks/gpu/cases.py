"""Case: one operation at one number of rows, with its peers, and the least work that it must do."""

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
    """Describes a measurement.

    work:   the least work of one call
    ours:   our calls, one for each turn, which read copies of the same data
    peers:  the same for each peer
    facts:  further columns of the row
    """

    op: str
    rows: int
    work: Work
    ours: Sequence[Call]
    peers: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """Describes an operation.

    build:     makes the case of a number of rows
    max_rows:  rows of the largest step in which the operation occurs
    """

    name: str
    build: Callable[[int], Case]
    max_rows: int = max(ROWS)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Tensor:
    """Return normally distributed random values."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)


def in_turn(call: Callable[..., object], *turns: Sequence[object]) -> list[Call]:
    """Return a call for each turn.

    turns: for each argument, its value in each turn
    """
    return [partial(call, *arguments) for arguments in zip(*turns, strict=True)]
