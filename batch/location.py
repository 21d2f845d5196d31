"""Where a path of the spec points: a filesystem and a path in it."""

import os

from pyarrow import ArrowInvalid, fs

from engine.errors import UserError

SCHEMES = ("s3", "gs", "file")


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path (relative to the current directory), s3:// or gs:// address, and the path in it.

    Raises UserError where there is no such filesystem.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    if path.split("://")[0] not in SCHEMES:
        raise UserError(f"{path}: must be a local path or start with {', '.join(s + '://' for s in SCHEMES)}")
    try:
        filesystem, inner = fs.FileSystem.from_uri(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be opened: {error}") from None
    return filesystem, inner.rstrip("/")
