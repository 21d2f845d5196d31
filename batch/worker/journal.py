"""Journal: the list of the rows in the engine, in a file that outlives the process."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from moray.batch.worker.quarantine import RowId, RowsInFlight


class Journal:
    """Records which rows are in the engine of one worker.

    What is written survives a kill of the process the moment after, because the operating system has it.

    lost_rows:  what an earlier process of this worker left in flight; None where there was nothing
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lost_rows = _read(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, rows: Collection[RowId], *, is_trial: bool) -> None:
        """Replace the record with these rows."""
        line = json.dumps({"rows": list(rows), "is_trial": is_trial}, separators=(",", ":")) + "\n"
        os.pwrite(self._file, line.encode(), 0)  # _read ignores what is left behind it of a longer, earlier line


def _read(path: Path) -> RowsInFlight | None:
    """Read a journal; return None where nothing was in flight."""
    try:
        line = path.read_bytes().partition(b"\n")[0]
        content = json.loads(line)
        rows = [(shard, row) for shard, row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return RowsInFlight(rows, content["is_trial"]) if rows else None
