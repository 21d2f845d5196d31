"""EventLog: the events of a run, one line each, in _job/events/<run>.jsonl."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.run_events import RunEvent, from_json, to_json

FOLDER = f"{JOB}/events"
REMOTE_BYTES_PER_S = 100_000  # bytes per second, at most, that are spent on writing all events again and again


class EventLog:
    """Writes the events of a run.

    On a disk, an event is written when it is added. An object store cannot append: there `flush` writes all events
    again, less often the more there are. What cannot be written now is tried again with the next event: a job does not
    end because its events cannot be written.

    clock:  seconds, monotonic
    """

    def __init__(self, run: str, folder: OutputFolder, clock: Callable[[], float]) -> None:
        self._name = _log_name(run)
        self._folder = folder
        self._clock = clock
        self._lines: list[str] = []  # events that are not written yet; for an object store all events
        self._num_written = 0
        self._due_s = clock()

    def add(self, event: RunEvent) -> None:
        """Add an event, with the present time."""
        self._lines.append(_encode(event))
        if self._folder.is_local:
            self._append()

    def flush(self, *, at_once: bool = False) -> None:
        """Write the events that are not written yet, when that is due or `at_once` is set."""
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
        """Append all lines or none: on a full disk no incomplete line is left."""
        path, content = Path(self._folder.root, self._name), "".join(self._lines).encode()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(content) == len(content):
                    self._lines.clear()
                else:
                    file.truncate(size)


@dataclass(frozen=True)
class LoggedEvent:
    """Holds an event of a run, with the time at which it was written."""

    at: datetime
    event: RunEvent


def logged_runs(folder: OutputFolder) -> list[str]:
    """Return the names of the runs that have events."""
    return [name.removesuffix(".jsonl") for name in folder.names(FOLDER) if name.endswith(".jsonl")]


def read_events(folder: OutputFolder, run: str) -> list[LoggedEvent]:
    """Return the events of a run, in order; none where it has none.

    An incomplete line, which a killed run may leave, is skipped, and so is an event of a newer moray.
    """
    return list(_parse(folder.read(_log_name(run)) or b""))


def append_events(folder: OutputFolder, run: str, *events: RunEvent) -> None:
    """Append events to those of a run whose driver is dead; do nothing where they cannot be written."""
    with suppress(OSError):
        content = folder.read(_log_name(run)) or b""
        complete_lines = content[: content.rfind(b"\n") + 1]  # the last line may be incomplete
        folder.write(_log_name(run), complete_lines + "".join(map(_encode, events)).encode())


def _log_name(run: str) -> str:
    return f"{FOLDER}/{run}.jsonl"


def _encode(event: RunEvent) -> str:
    return json.dumps({"at": now()} | to_json(event)) + "\n"


def _parse(text: bytes) -> Iterator[LoggedEvent]:
    for line in text.splitlines():
        try:
            values = json.loads(line)
            at, event = datetime.fromisoformat(values["at"]), from_json(values)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if event is not None:
            yield LoggedEvent(at, event)


def now() -> str:
    """Return the present time in UTC as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
