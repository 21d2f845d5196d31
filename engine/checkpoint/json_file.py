"""Read the JSON files of a checkpoint, with errors that name the file and the mistake."""

import json
from pathlib import Path
from typing import Any

from moray.engine.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in the file. Raises CheckpointError if there is none."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint needs it.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the object in `data`. where: the file, for errors"""
    check_no_pointer(data, where)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, holds {type(value).__name__}.")
    return value


def check_no_pointer(head: bytes, where: str) -> None:
    """Raise CheckpointError if a clone without git-lfs left a pointer instead of the file."""
    if head.startswith(LFS_POINTER):
        raise CheckpointError(f"{where} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder.")
