"""Keep the results of the checks of linear layers in a file, for the same machine, libraries and sources."""

import hashlib
import json
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import torch

from moray.kernels.cpu.isa import isas

# Kept results are used only if these source files and these environment variables are unchanged.
FOLDER = Path(__file__).parent
SOURCES = (
    "epilogue.py",
    "kept_checks.py",
    "linear.py",
    "linear_mistakes.py",
    "numba_intrinsics.py",
    "onednn.py",
    "pair_product.py",
    "panels.py",
    "product.py",
    "quantized.py",
    "quantized_calls.py",
    "quantized_panels.py",
    "quantized_product.py",
    "quantized_rows.py",
    "quantized_tiles.py",
    "self_check.py",
    "tile_product.py",
    "tiles.py",
    "vector_product.py",
    "vectors.py",
)
VARIABLES = (
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_OPT",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
)


@dataclass(frozen=True)
class LinearCheck:
    """Holds the result of the check for one shape of a linear layer.

    dtype:        "bfloat16" | "float16" | "float32"
    path:         the path that is used: an instruction set (see isa.py), "onednn" or "plain"
    failed_paths: better paths, which fail on this machine
    weights:      how the weights are quantized, such as "int4 in groups of 128"; "" if they are in dtype
    """

    out_features: int
    in_features: int
    dtype: str
    path: str
    failed_paths: tuple[str, ...] = ()
    weights: str = ""

    def __str__(self) -> str:
        return f"{self.products} [{self.out_features}, {self.in_features}]"

    @property
    def products(self) -> str:
        """Return what is multiplied: the rows' dtype, and how the weights are quantized."""
        return f"{self.dtype} x {self.weights}" if self.weights else self.dtype


def _file(folder: Path) -> Path:
    return folder / f"linear-checks-{_machine()}.json"


@cache
def _cpu() -> str:
    """Return the model and flags of the first CPU, from /proc/cpuinfo."""
    lines = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            if line.split(":")[0].strip() in ("model name", "flags", "CPU part", "Features"):
                lines.add(line)
    return "\n".join(sorted(lines)) or platform.processor() or platform.machine()


@cache
def _hash_sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _machine() -> str:
    """Return a hash of everything that a result depends on."""
    versions = (torch.__version__, numba.__version__, llvmlite.__version__, _hash_sources(FOLDER))
    settings = (isas(), [os.environ.get(name) for name in VARIABLES])
    return hashlib.sha256(repr((_cpu(), settings, versions)).encode()).hexdigest()[:16]


def read(folder: Path | None) -> dict[str, LinearCheck]:
    """Return the results in the folder's file by name, without damaged entries; none if there is no such file."""
    kept: dict[str, LinearCheck] = {}
    if folder is None:
        return kept
    with suppress(OSError, ValueError):
        entries: Any = json.loads(_file(folder).read_text())
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            with suppress(TypeError, ValueError, KeyError):
                entry = dict(entry)
                kept[name] = LinearCheck(**entry | {"failed_paths": tuple(entry["failed_paths"])})
    return kept


def write(folder: Path | None, result: LinearCheck) -> None:
    """Add a result to the folder's file, which is replaced as a whole. If it cannot be, the next start checks again."""
    if folder is None:
        return
    file = _file(folder)
    entries = {name: asdict(kept) for name, kept in (read(folder) | {str(result): result}).items()}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(descriptor, "w") as out:
            json.dump(entries, out)
        os.replace(draft, file)
