"""What a job tells while it runs: status.json, replaced whole, and events/<run>.jsonl, one line each."""

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch.ledger import Ledger, State
from batch.output.folder import JOB, OutputFolder

WINDOW_S = 30.0  # rates are over this long
LOCAL_EVERY_S, REMOTE_EVERY_S = 1.0, 10.0


@dataclass(frozen=True)
class Status:
    """A job at one moment. rows_done counts rows that are finished but not committed too; tokens do as well.

    reason:        why the job did not succeed, or why it is being stopped
    tokens_per_s:  generated tokens (of a job that scores: prompt tokens), of this run: lately while it runs, over all
                   of it at the end
    eta_s:         None = not known yet
    output:        the folder, as the spec has it
    """

    name: str
    run: str
    output: str
    state: State
    reason: str | None
    input_rows: int
    ok_rows: int
    failed_rows: int
    pending_rows: int
    rows_done: int
    shards: int
    committed_shards: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_s: float
    elapsed_s: float
    eta_s: float | None
    errors: Mapping[str, int]

    def to_json(self) -> str:
        values = asdict(self) | {"updated_at": now()}
        return json.dumps(values, indent=2)


class Meter:
    """Speed over the last WINDOW_S, of rows and tokens done."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque()
        self._first: tuple[float, int, int] | None = None

    def mark(self, time_s: float, rows: int, tokens: int) -> None:
        """Note the totals at a time. Totals that fell (a worker died) start the window anew."""
        if self._marks and (rows < self._marks[-1][1] or tokens < self._marks[-1][2]):
            self._marks.clear()
        self._first = self._first or (time_s, rows, tokens)
        self._marks.append((time_s, rows, tokens))
        while len(self._marks) > 2 and self._marks[1][0] <= time_s - WINDOW_S:
            self._marks.popleft()

    def rates(self, *, whole: bool = False) -> tuple[float, float]:
        """Rows and tokens a second: lately, or since the first mark."""
        if not self._marks or self._first is None:
            return 0.0, 0.0
        start, end = self._first if whole else self._marks[0], self._marks[-1]
        seconds = end[0] - start[0]
        if seconds <= 0:
            return 0.0, 0.0
        return max(0, end[1] - start[1]) / seconds, max(0, end[2] - start[2]) / seconds


class Reporter:
    """Turns the ledger into Status, and writes it: every second to a disk, every ten to an object store. What cannot be
    written now is tried again with the next: a job does not end for want of a status.

    clock:       seconds, monotonic
    is_scoring:  the job generates nothing
    """

    def __init__(
        self,
        name: str,
        run: str,
        ledger: Ledger,
        folder: OutputFolder,
        clock: Callable[[], float],
        *,
        is_scoring: bool = False,
    ) -> None:
        self.name = name
        self.run = run
        self._ledger = ledger
        self._folder = folder
        self._clock = clock
        self._is_scoring = is_scoring
        self._started = clock()
        self._meter = Meter()
        self._every_s = LOCAL_EVERY_S if folder.is_local else REMOTE_EVERY_S
        self._written: float | None = None
        self._events: list[str] = []
        self._unwritten = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def status(self) -> Status:
        """How the job is now; to be asked for often, since speed is measured from one time to the next."""
        ledger, now_s = self._ledger, self._clock()
        is_final = ledger.state.is_final
        if ledger.state is not State.PENDING:
            tokens = ledger.prompt_tokens if self._is_scoring else ledger.generated_tokens
            self._meter.mark(now_s, ledger.rows_done, tokens)
        rows_per_s, tokens_per_s = self._meter.rates(whole=is_final)
        left = ledger.num_rows - ledger.rows_done
        return Status(
            name=self.name,
            run=self.run,
            output=self._folder.path,
            state=ledger.state,
            reason=ledger.reason if is_final else ledger.stopping_reason,
            input_rows=ledger.num_rows,
            ok_rows=ledger.ok,
            failed_rows=ledger.failed,
            pending_rows=ledger.pending,
            rows_done=ledger.rows_done,
            shards=len(ledger.rows_of),
            committed_shards=len(ledger.committed),
            prompt_tokens=ledger.prompt_tokens,
            generated_tokens=ledger.generated_tokens,
            tokens_per_s=round(tokens_per_s, 1),
            elapsed_s=round(now_s - self._started, 1),
            eta_s=round(left / rows_per_s, 1) if rows_per_s > 0 and not is_final else None,
            errors={code: count for code, count in ledger.errors.most_common() if count},
        )

    def record(self, event: str, **fields: Any) -> None:
        """Add a line to this run's events."""
        self._events.append(json.dumps({"at": now(), "event": event} | fields))
        if self._folder.is_local:
            self._write_events()

    def write(self, status: Status, *, at_once: bool = False) -> None:
        """Write status.json, and the events, unless they were written a moment ago."""
        now_s = self._clock()
        if not at_once and self._written is not None and now_s - self._written < self._every_s:
            return
        self._written = now_s
        with suppress(OSError):
            self._folder.write(f"{JOB}/status.json", status.to_json().encode(), durable=at_once)
        self._write_events()

    def _write_events(self) -> None:
        """Append what is new; an object store cannot append, so there all of them are written again."""
        count, new = len(self._events), self._events[self._unwritten :]
        if not new:
            return
        name = f"{JOB}/events/{self.run}.jsonl"
        with suppress(OSError):
            if self._folder.is_local:
                _append(Path(self._folder.root, name), new)
            else:
                self._folder.write(name, "".join(f"{line}\n" for line in self._events).encode())
            self._unwritten = count


def _append(path: Path, lines: Sequence[str]) -> None:
    """All of the lines or none: on a full disk no half of one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        text = "".join(f"{line}\n" for line in lines).encode()
        if file.write(text) != len(text):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
