"""What a stage is told, and where it leaves what it found."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """out: folder of the results; deadline: of time.time(), by which the stage should be done; is_dry: tiny shapes on
    the CPU, kernels under Triton's interpreter; *_site: folders of packages that this Python lacks, or None"""

    out: Path
    deadline: float
    is_dry: bool = False
    vllm_site: Path | None = None
    ray_site: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_dry else "cuda")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()


class Results:
    """The rows of one stage, on disk after each: a stage that is stopped loses nothing that it had measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append({name: _rounded(value) for name, value in row.items()})
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1) + "\n")
        partial.replace(self.path)
        print("  ".join(f"{name}={value}" for name, value in self.rows[-1].items()), flush=True)


def _rounded(value: object) -> object:
    """Four figures, which is more than a timing is good for; no NaN, which JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    return value
