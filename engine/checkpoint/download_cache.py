"""The folder of downloads on this machine, which one process at a time may write."""

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from moray.engine.errors import NodeError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if necessary and lock it for this process; the lock ends with the process at the latest.

    Raises NodeError if the folder cannot be written, also from inside the block.
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
        raise NodeError(f"{folder} cannot be written: {error.strerror}; XDG_CACHE_HOME chooses another.") from None


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if there is no such file."""
    return path.stat().st_size if path.exists() else None


def check_room(folder: Path, needed: int) -> None:
    """Raise NodeError if the disk of the folder has less than `needed` free bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NodeError(
            f"{folder} needs {needed / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f}; "
            "XDG_CACHE_HOME chooses another."
        )
