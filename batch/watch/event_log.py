"""EventLog: what happened in a run, a line each in _job/events/<run>.jsonl."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch.output.folder import JOB, OutputFolder

REMOTE_BYTES_PER_S = 100_000  # that are spent on writing all events again and again


class EventLog:
    """On a disk an event is written when it is added. An object store cannot append: there `flush` writes all of them
    again, the more there are the less often. What cannot be written now is tried again with the next: a job does not
    end for want of its events.

    clock:  seconds, monotonic
    """

    def __init__(self, run: str, folder: OutputFolder, clock: Callable[[], float]) -> None:
        self._name = f"{JOB}/events/{run}.jsonl"
        self._folder = folder
        self._clock = clock
        self._lines: list[str] = []  # on a disk none, once they are written
        self._num_written = 0
        self._due_s = clock()

    def add(self, event: str, fields: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps({"at": now(), "event": event} | dict(fields)) + "\n")
        if self._folder.is_local:
            self._append()

    def flush(self, *, at_once: bool = False) -> None:
        if len(self._lines) == self._num_written or (self._clock() < self._due_s and not at_once):
            return
        if self._folder.is_local:
            self._append()
            return
        content = "".join(self._lines).encode()
        with suppress(OSError):
            self._folder.write(self._name, content)
            self._num_written = len(self._lines)
        self._due_s = self._clock() + len(content) / REMOTE_BYTES_PER_S

    def _append(self) -> None:
        """All of the lines or none: on a full disk no half of one stays."""
        path, content = Path(self._folder.root, self._name), "".join(self._lines).encode()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(content) == len(content):
                    self._lines.clear()
                else:
                    file.truncate(size)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
