"""Where downloads are kept on this machine, for one process at a time."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import CheckpointError

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moray"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, to ourselves. The lock goes with the process that holds it.

    Raises CheckpointError where the folder cannot be written, inside the block too.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Waiting for another process that downloads into %s.", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; XDG_CACHE_HOME chooses another."
        ) from None


def file_size(path: Path) -> int | None:
    """In bytes; None where there is no such file."""
    return path.stat().st_size if path.exists() else None


def check_room(folder: Path, needed: int) -> None:
    """Raises CheckpointError where the disk has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder} needs {needed / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f}; "
            "XDG_CACHE_HOME chooses another."
        )
