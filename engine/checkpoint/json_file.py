"""The JSON files of a checkpoint, read with errors that say what is wrong with which file."""

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises CheckpointError where there is none."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint needs it.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`; `where` names the file in errors."""
    check_no_pointer(data, where)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, holds {type(value).__name__}.")
    return value


def check_no_pointer(head: bytes, where: str) -> None:
    """Raises CheckpointError where a clone without git-lfs left a pointer in the file's place."""
    if head.startswith(LFS_POINTER):
        raise CheckpointError(f"{where} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder.")
