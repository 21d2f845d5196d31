"""Find what ended Ray sessions have left in the folder for temporary files."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moray.batch.runtime.ray_choice import choose_ray
from moray.batch.units import count, size
from moray.jobs.doctor.finding import Finding, Subject, ok, warning
from moray.jobs.doctor.processes import commands

WARN_BYTES = 10**9  # size of all leftovers from which they are a warning
NEW_S = 120.0  # age below which a folder is left alone: it exists before the processes of its session
SHOWN = 5  # folders that the fix names


def leftovers(_: Subject) -> Iterator[Finding]:
    """Count the folders of ended Ray sessions: of clusters, and of jobs' local Rays that failed or were killed."""
    parent = choose_ray("local").parent
    found = dead_folders(parent)
    num_bytes = sum(_size(folder) for folder in found)
    value = f"{count(len(found), 'folder')} of a Ray that has ended, {size(num_bytes)} in {parent}"
    if not found:
        yield ok(f"none in {parent}")
    elif num_bytes > WARN_BYTES:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield warning(value, f"rm -r {' '.join(map(str, found[:SHOWN]))}{more}")
    else:
        yield ok(value)


def dead_folders(parent: Path) -> list[Path]:
    """Return the folders of sessions that no running process has on its command line.

    The sessions of clusters share one folder; each job's local Ray has a folder of its own.
    """
    running = " ".join(word for _, words in commands() for word in words)
    ours = (folder for folder in sorted(parent.glob("moray-*")) if any(folder.glob("session_*")))
    found = []
    for folder in (*sorted(parent.glob("ray/session_*")), *ours):
        with suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > NEW_S
            if folder.is_dir() and not folder.is_symlink() and is_old and folder.name not in running:
                found.append(folder)
    return found


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total
