"""Check the disks that every job uses: that of temporary files and that of downloads."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moray.batch.runtime.ray_choice import MAX_PARENT, choose_ray
from moray.batch.units import size
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning
from moray.jobs.doctor.places import file_system, free_bytes, nearest_folder
from moray.kernels.cache_root import cache_root

FULL = 0.95  # used share of a disk from which Ray refuses to spill objects
LOW_BYTES = 10**9  # free space below which a warning is due


def temporary(_: Subject) -> Iterator[Finding]:
    """Check the disk on which a local Ray keeps its files and spilled objects."""
    choice = choose_ray("local")
    free, total = free_bytes(choice.parent)
    value = _describe(choice.parent)
    fix = "make room, or export RAY_TMPDIR=FOLDER, a short path on a larger disk"
    if choice.remark:
        short = f"export RAY_TMPDIR=FOLDER, a path of at most {MAX_PARENT} bytes that can be written"
        yield warning(f"{value}; {choice.remark}", short)
    elif free < (1 - FULL) * total:
        yield warning(f"{value}; Ray spills nothing to a disk that is {FULL:.0%} full", fix)
    elif free < LOW_BYTES:
        yield warning(value, fix)
    else:
        yield ok(value)


def system_temporary(_: Subject) -> Iterator[Finding]:
    """Check that Python finds a folder for temporary files."""
    try:
        yield ok(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield problem(str(error), "make /tmp writable, or export TMPDIR=FOLDER")


def downloads(_: Subject) -> Iterator[Finding]:
    """Check the disk on which downloaded models are kept."""
    folder = cache_root()
    nearest = nearest_folder(folder)
    value = f"{folder}: {_describe(nearest, named=False)}"
    if not os.access(nearest, os.W_OK | os.X_OK):
        fix = "export XDG_CACHE_HOME=FOLDER (for hf:// models: HF_HOME), if models are to be downloaded"
        yield warning(f"{value}; cannot be written", fix)
    else:
        yield ok(value)


def _describe(folder: Path, *, named: bool = True) -> str:
    free, total = free_bytes(folder)
    kind = file_system(folder)
    space = f"{size(free)} of {size(total)} free" + (f" ({kind})" if kind else "")
    return f"{folder}: {space}" if named else space
