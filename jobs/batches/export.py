"""Writes the output files of a batch from its parts: in the order of the input, part by part, so memory stays flat."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from moray.batch.shards import Shard
from moray.jobs.batches.job import BatchJob


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


class Sink(Protocol):
    """Anything that bytes can be written to."""

    def write(self, data: bytes, /) -> Any: ...


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
