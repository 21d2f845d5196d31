"""Refuse symbolic links in a local input that would add rows twice or leave some out silently."""

import os
from collections.abc import Callable, Iterator
from pathlib import PurePath

from moray.engine.errors import InputError


def check_links(folder: str, is_hidden: Callable[[str], bool]) -> None:
    """Check the symbolic links in a folder.

    Raises InputError where one points to a folder that contains it (its files would be found again and again), or to
    nothing.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if entry.is_symlink() and not is_hidden(entry.name)]
    except OSError:  # the code that lists the folder reports it
        return
    for entry in entries:
        if not os.path.exists(entry.path):
            raise InputError(f"{entry.path}: is a link to {os.readlink(entry.path)}, which does not exist; remove it")
        target = os.path.realpath(entry.path)
        if os.path.isdir(target) and any(
            f"{one}/".startswith(f"{target.rstrip('/')}/") for one in _real_parents(folder)
        ):
            raise InputError(f"{entry.path}: is a link to {target}, which holds it; remove it, or name other folders")


def _real_parents(folder: str) -> Iterator[str]:
    """Yield the real paths of the folder and of its parents along the links that led to it: two links may form a
    cycle."""
    for path in (folder, *map(str, PurePath(folder).parents)):
        yield os.path.realpath(path)
