"""Write the rows of a job into one file of JSON lines, in the order of its input."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.export.json_rows import Row, encode_line, read_rows
from moray.batch.export.openai_rows import to_openai
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.output.job_folder import read_plan
from moray.batch.output.part import find_committed
from moray.batch.shards import Plan
from moray.batch.spec import JobSpec
from moray.engine.errors import OutputError, UserError

_NAME = re.compile(r".*\.(?:jsonl|ndjson)(?:\.(gz|zst))?", re.IGNORECASE | re.DOTALL)
_CODECS = {None: None, "gz": "gzip", "zst": "zstd"}
_BATCH_ROWS = 256  # rows that are in memory at once


@dataclass(frozen=True)
class Exported:
    """Counts what was written.

    lines:    lines of the file
    pending:  rows of the input that are not done, and not in the file
    """

    lines: int
    pending: int


def export(path: str, target: str, *, as_openai: bool = False, partial: bool = False) -> Exported:
    """Write a job's rows, those with errors too. The file appears as a whole; one that exists is replaced.

    path:       the job's output folder
    target:     a local file named *.jsonl or *.ndjson, with .gz or .zst if it is to be compressed
    as_openai:  write the lines of OpenAI's Batch API
    partial:    also export a job of which rows are not done

    Raises UserError where the job or the target cannot be used.
    """
    name = _NAME.fullmatch(target)
    if name is None or "://" in target:
        raise UserError(f"{target}: must be a local file named *.jsonl or *.ndjson, also with .gz or .zst after it")
    folder = OutputFolder(path)
    plan = read_plan(folder)
    committed = find_committed(folder, plan)
    pending = plan.num_rows - sum(counts.rows for counts in committed.values())
    if pending and not partial:
        raise OutputError(
            f"{path}: {pending:,} of {plan.num_rows:,} rows are not done; run the job to its end, or export what "
            "there is with --partial"
        )
    rows = _rows(folder, plan, sorted(committed))
    if as_openai:
        spec = _read_spec(folder)
        rows = to_openai(rows, Path(spec.model.path).name, is_chat=spec.input.kind == "messages")
    return Exported(_write(Path(target), _CODECS[name[1] and name[1].lower()], rows), pending)


def _read_spec(folder: OutputFolder) -> JobSpec:
    text = folder.read(f"{JOB}/spec.yaml")
    if text is None:
        raise OutputError(f"{folder.path} has no {JOB}/spec.yaml; without it nobody knows what the job was.")
    spec = JobSpec.from_yaml(text.decode())
    if spec.task != "generate":
        raise UserError(f"{folder.path}: scores have no form in OpenAI's Batch API; export without --openai")
    return spec


def _rows(folder: OutputFolder, plan: Plan, shards: list[int]) -> Iterator[Row]:
    """Yield the rows of the parts of these shards."""
    for index in shards:
        name = plan.part_name(plan.shards[index])
        try:
            with folder.open(name) as file, pq.ParquetFile(file) as part:
                for batch in part.iter_batches(_BATCH_ROWS, use_threads=False):
                    yield from read_rows(batch)
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise OutputError(f"{folder.path}/{name} cannot be read: {reason}. moray verify tells more.") from None
        except OSError as error:
            raise OutputError(folder.explain(error, name, done="read")) from None


def _write(target: Path, codec: str | None, rows: Iterator[Row]) -> int:
    """Write the lines into a file beside the target and rename it; return how many there are."""
    partial = target.with_name(f".{target.name}~{os.getpid()}")
    lines = 0
    try:
        file = partial.open("wb")
        with file if codec is None else pa.CompressedOutputStream(pa.PythonFile(file, mode="w"), codec) as stream:
            for row in rows:
                stream.write(encode_line(row))
                lines += 1
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return lines
