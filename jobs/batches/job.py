"""BatchJob: the job folder of a batch, whose rows are the requests in input.jsonl and whose parts hold their answers.

It is a folder as a job writes it: `moray verify`, `status` and `report` read it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import pyarrow as pa

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Counts
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.output.job_folder import PLAN, read_plan
from moray.batch.output.part import encode_part, find_committed, read_part
from moray.batch.output.part_stats import count_latencies, count_part
from moray.batch.output_columns import ERROR
from moray.batch.shards import Plan, Shard, Slice
from moray.engine.errors import JobError
from moray.jobs.batches.lines import read_lines
from moray.jobs.batches.validate import Checked
from moray.serve.batches import LineAnswer

STARTS = f"{JOB}/starts.json"
# A shard is answered as a whole before its part is written, so it is small: its requests are what a crash costs, and
# counts move with each.
WANTED_SHARDS, MIN_ROWS, MAX_ROWS = 256, 8, 256
MAX_SHARD_BYTES = 8 << 20

PART = pa.schema(
    [
        ("line", pa.int64()),
        ("custom_id", pa.string()),
        ("sample", pa.int32()),
        ("status_code", pa.int32()),
        ("request_id", pa.string()),
        ("body", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_generated_tokens", pa.int32()),
        ("error", ERROR),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
    ]
)


class RequestLine(NamedTuple):
    """Holds one request of a batch.

    row:        its number among the requests, from 0
    number:     of its line, from 1; blank lines count
    body:       its JSON value
    """

    row: int
    number: int
    custom_id: str
    url: str
    body: Any


class Start(NamedTuple):
    """States where the first line of a shard begins in the file."""

    offset: int
    number: int


@dataclass(frozen=True)
class BatchJob:
    """Holds the plan of a batch and where its shards begin.

    input:           folder and name of the file of requests
    max_line_bytes:  longest line that was accepted
    origin:          metadata that is written into every part
    """

    folder: OutputFolder
    input: tuple[OutputFolder, str]
    plan: Plan
    starts: Sequence[Start]
    max_line_bytes: int
    origin: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        folder: OutputFolder,
        input_: tuple[OutputFolder, str],
        checked: Checked,
        fingerprint: Fingerprint,
        max_line_bytes: int,
        origin: Mapping[str, Any],
    ) -> "BatchJob":
        """Plan a file that was checked. It writes nothing."""
        shards, starts = _cut(checked, input_[1])
        return cls(folder, input_, Plan(fingerprint, shards), starts, max_line_bytes, origin)

    def write(self) -> None:
        """Write the plan. Raises JobError where that is not possible."""
        self.folder.publish(STARTS, json.dumps([list(start) for start in self.starts]).encode())
        self.folder.publish(PLAN, self.plan.to_json().encode())

    @classmethod
    def read(
        cls,
        folder: OutputFolder,
        input_: tuple[OutputFolder, str],
        max_line_bytes: int,
        origin: Mapping[str, Any],
    ) -> "BatchJob | None":
        """Return the job that the folder holds; None where its plan was not written yet."""
        starts = folder.read(STARTS)
        if starts is None or folder.read(PLAN) is None:
            return None
        places = [Start(*start) for start in json.loads(starts)]
        return cls(folder, input_, read_plan(folder), places, max_line_bytes, origin)

    def committed(self) -> dict[int, Counts]:
        """Return, by shard, what the parts hold that are there."""
        return find_committed(self.folder, self.plan)

    def requests(self, shard: Shard) -> list[RequestLine]:
        """Read the requests of a shard. Raises JobError where the file is not the one that was planned."""
        start, first = self.starts[shard.index], shard.slices[0].first_row if shard.slices else 0
        found = []
        folder, name = self.input
        try:
            with closing(folder.open(name)) as file:
                file.seek(start.offset)
                lines = read_lines(file, self.max_line_bytes, start.offset, start.number)
                for row, line in zip(range(first, first + shard.num_rows), lines, strict=False):
                    value = json.loads(line.text or b"")
                    found.append(RequestLine(row, line.number, value["custom_id"], value["url"], value["body"]))
        except OSError as error:
            raise JobError(folder.explain(error, name, done="read")) from error
        except (ValueError, KeyError, TypeError):
            found = []
        if len(found) != shard.num_rows:
            raise JobError(f"{folder.path}/{name} has changed since it was checked")
        return found

    def commit(self, shard: Shard, requests: Sequence[RequestLine], answers: Sequence[LineAnswer]) -> Counts:
        """Write the part of a shard, and return what it holds. Raises JobError where it cannot be written."""
        table = _table(requests, answers, self.input[1])
        seconds = [answer.seconds for answer in answers if answer.status == 200]
        counts, stats = count_part(table, sum(seconds), count_latencies(seconds))
        origin = {"moray": version("moray"), **self.origin}
        part = encode_part(table, self.plan.fingerprint.hexdigest, shard.index, counts, stats, origin)
        self.folder.publish(self.plan.part_name(shard), part)
        return counts

    def answers(self, shard: Shard) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part that is there. Raises JobError where it cannot be read."""
        name = self.plan.part_name(shard)
        try:
            table, _ = read_part(self.folder, name)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise JobError(f"{self.folder.path}/{name} cannot be read: {error}") from error
        for batch in table.to_batches(max_chunksize=16):
            yield from batch.to_pylist()


def _cut(checked: Checked, name: str) -> tuple[tuple[Shard, ...], list[Start]]:
    """Cut the requests of a file into shards of about equal numbers, none with more than MAX_SHARD_BYTES."""
    offsets, num_rows = checked.offsets, len(checked.offsets)
    size = min(MAX_ROWS, max(MIN_ROWS, -(-num_rows // WANTED_SHARDS)))
    shards: list[Shard] = []
    starts: list[Start] = []
    first = 0
    for row in range(1, num_rows + 1):
        if row < num_rows and row - first < size and offsets[row] - offsets[first] < MAX_SHARD_BYTES:
            continue
        shards.append(Shard(len(shards), (Slice(name, first, row - first),)))
        starts.append(Start(offsets[first], checked.numbers[first]))
        first = row
    return tuple(shards), starts


def _table(requests: Sequence[RequestLine], answers: Sequence[LineAnswer], name: str) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "line": [request.number for request in requests],
        "custom_id": [request.custom_id for request in requests],
        "sample": [0] * len(requests),
        "status_code": [answer.status for answer in answers],
        "request_id": [answer.request_id for answer in answers],
        "body": [answer.body for answer in answers],
        "num_prompt_tokens": [answer.num_prompt_tokens for answer in answers],
        "num_generated_tokens": [answer.num_generated_tokens for answer in answers],
        "error": [_error(answer) for answer in answers],
        "source_file": [name] * len(requests),
        "source_row": [request.row for request in requests],
    }
    return pa.table(columns, schema=PART)


def _error(answer: LineAnswer) -> dict[str, str] | None:
    """Return the error of a row as jobs write it; None where the request was answered."""
    if answer.status == 200:
        return None
    error = json.loads(answer.body)["error"]
    # A message may quote a lone surrogate, which JSON can express and UTF-8 cannot.
    message = str(error["message"]).encode(errors="replace").decode()
    return {"stage": "answer", "code": str(error["code"]), "message": message}
