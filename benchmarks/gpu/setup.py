"""Setup and Results: the settings of a stage, the file of its rows, and which of them an earlier call has measured."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu.progress import NO_TIME, Row

__all__ = ["NO_TIME", "Results", "Row", "Setup"]


@dataclass(frozen=True)
class Setup:
    """Holds the settings of a stage.

    out:                  folder of the results
    deadline:             time.time() at which the stage should end
    is_dry:               tiny shapes on the CPU, with kernels under Triton's interpreter
    vllm_site, ray_site:  folder with these packages where this Python does not have them
    done:                 rows that an earlier call has finished; they are kept, and not measured again
    """

    out: Path
    deadline: float
    is_dry: bool = False
    vllm_site: Path | None = None
    ray_site: Path | None = None
    done: Sequence[Row] = ()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_dry else "cuda")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def find(self, **identity: object) -> Row | None:
        """Return the row of an earlier call with these values; None where there is none."""
        return next((row for row in self.done if identity.items() <= row.items()), None)


class Results:
    """Keeps the rows of a stage in a file, which is written after each row.

    done: rows of an earlier call, which stay in the file
    """

    def __init__(self, path: Path, done: Sequence[Row] = ()) -> None:
        self.path = path
        self.rows: list[Row] = list(done)

    def add(self, row: Row) -> None:
        """Add a row, write the file, and print the row."""
        self.rows.append({name: _rounded(value) for name, value in row.items()})
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1) + "\n")
        partial.replace(self.path)
        print("  ".join(f"{name}={value}" for name, value in self.rows[-1].items()), flush=True)


def _rounded(value: object) -> object:
    """Return a number with four digits, and None for NaN, which JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    return value
