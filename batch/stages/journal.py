"""Journal: which rows are in the engine, in a file that outlives the process."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from batch.faults.quarantine import InFlight, RowId


class Journal:
    """Of one worker. What is written is there when the process is killed the moment after: the system has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.died = _read(path)  # what an earlier process of this worker left
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, rows: Collection[RowId], *, is_alone: bool) -> None:
        line = json.dumps({"rows": list(rows), "is_alone": is_alone}, separators=(",", ":")) + "\n"
        os.pwrite(self._file, line.encode(), 0)  # what may be left of a longer line before stands behind the first


def _read(path: Path) -> InFlight | None:
    """None where nothing was in flight."""
    try:
        line = path.read_bytes().partition(b"\n")[0]
        content = json.loads(line)
        rows = [(shard, row) for shard, row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return InFlight(rows, content["is_alone"]) if rows else None
