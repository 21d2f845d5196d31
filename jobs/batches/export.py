"""Writes the output files of a batch from its parts: in the order of the input, part by part, so memory stays flat."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

from moray.batch.shards import Shard
from moray.engine.errors import JobError
from moray.jobs.batches.ids import FILE, derived_id
from moray.jobs.batches.job import BatchJob
from moray.jobs.batches.record import BatchRecord, BatchStatus
from moray.jobs.batches.store import BatchStore
from moray.jobs.batches.stored_file import ContentWriter, StoredFile


@dataclass(frozen=True)
class NotRun:
    """Says why requests were not run, for their lines in the error file."""

    code: str
    message: str


EXPIRED = NotRun("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = NotRun("batch_cancelled", "This request was not executed because the batch was cancelled.")


class ExportedLine(NamedTuple):
    """Holds a line of an output file, with its line break. is_ok: it is of the output file, not of the error file."""

    is_ok: bool
    text: bytes


def write_output_files(
    store: BatchStore, batch: BatchRecord, job: BatchJob, now: int, expires_at: int
) -> tuple[str | None, str | None]:
    """Write the output file and the error file of a batch, and return their ids; None where one has no lines.

    Doing it again makes the same files. Requests without a part have lines if the batch has expired or was cancelled.

    now, expires_at:  when the files are made and until when they are kept, in seconds since 1970

    Raises JobError where a part that was counted cannot be read: its lines must not be left out.
    """
    committed = job.committed()
    expected = batch.total if batch.status is BatchStatus.FINALIZING else batch.completed + batch.failed
    if (found := sum(counts.rows for counts in committed.values())) < expected:
        raise JobError(f"{job.folder.path}: the parts that can be read have {found:,} of {expected:,} requests")
    not_run = {BatchStatus.IN_PROGRESS: EXPIRED, BatchStatus.CANCELLING: CANCELLED}.get(batch.status)
    files = {is_ok: OutputFile(store, batch, is_ok=is_ok) for is_ok in (True, False)}
    for line in export_lines(job, batch.id, set(committed), not_run):
        files[line.is_ok].write(line.text)
    return files[True].finish(now, expires_at), files[False].finish(now, expires_at)


class OutputFile:
    """Writes an output file of a batch, which exists only if it has lines."""

    def __init__(self, store: BatchStore, batch: BatchRecord, *, is_ok: bool) -> None:
        self._store = store
        self._batch = batch
        self._kind = "output" if is_ok else "error"
        self._id = derived_id(FILE, batch.stopped_at, f"{batch.id} {self._kind}")
        self._writer: ContentWriter | None = None

    def write(self, line: bytes) -> None:
        if self._writer is None:
            self._writer = self._store.create_content(self._batch.owner, self._id)
        self._writer.write(line)

    def finish(self, now: int, expires_at: int) -> str | None:
        """Make a file of what was written, and return its id; None where nothing was."""
        if self._writer is None:
            return None
        digest = self._writer.close()
        name = f"{self._batch.id}_{self._kind}.jsonl"
        file = StoredFile(self._id, self._writer.num_bytes, now, expires_at, name, "batch_output", digest)
        self._store.add_file(self._batch.owner, file)
        return self._id


def export_lines(job: BatchJob, batch_id: str, committed: set[int], not_run: NotRun | None) -> Iterator[ExportedLine]:
    """Yield the line of every request of a batch, in the order of the input.

    committed:  shards that have a part
    not_run:    why others have none; None = they have no lines

    Raises JobError where a part or the input cannot be read.
    """
    for shard in job.plan.shards:
        if shard.index in committed:
            yield from _answered(job, batch_id, shard)
        elif not_run is not None:
            for request in job.requests(shard):
                error = {"code": not_run.code, "message": not_run.message}
                yield _line(batch_id, request.number, request.custom_id, None, error, is_ok=False)


def _answered(job: BatchJob, batch_id: str, shard: Shard) -> Iterator[ExportedLine]:
    for row in job.answers(shard):
        response = {
            "status_code": row["status_code"],
            "request_id": row["request_id"],
            "body": json.loads(row["body"]),
        }
        yield _line(batch_id, row["line"], row["custom_id"], response, None, is_ok=row["status_code"] == 200)


def _line(batch_id: str, number: int, custom_id: str, response: Any, error: Any, *, is_ok: bool) -> ExportedLine:
    made_id = "batch_req_" + sha256(f"{batch_id} {number}".encode()).hexdigest()[:24]
    value = {"id": made_id, "custom_id": custom_id, "response": response, "error": error}
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can express
        text = json.dumps(value, separators=(",", ":")).encode()
    return ExportedLine(is_ok, text + b"\n")
