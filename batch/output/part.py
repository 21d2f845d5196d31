"""A part: one shard's Parquet file. It carries the record of what was committed; there is no other."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch.ledger import Counts
from batch.output.folder import OutputFolder
from batch.output.tally import Tally
from batch.planning.plan import Plan, Shard

_KEY = "moray"
_THREADS = 16


@dataclass(frozen=True)
class Record:
    """What a part says of itself. tally: None in parts of an older moray; provenance: whatever else stands there."""

    counts: Counts
    tally: Tally | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def encode_part(
    table: pa.Table, fingerprint: str, shard: int, counts: Counts, tally: Tally, provenance: Mapping[str, object]
) -> bytes:
    """The whole file, with its record in the footer."""
    record = {"fingerprint": fingerprint, "shard": shard, "num_rows": table.num_rows}
    record |= {"counts": asdict(counts), "tally": tally.to_json()}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: json.dumps(record | dict(provenance))})
    file: bytes = sink.getvalue().to_pybytes()
    return file


def read_record(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The record in a part's metadata. Raises KeyError or ValueError where there is none."""
    record: dict[str, Any] = json.loads(metadata[_KEY.encode()])
    return record


def read_part(folder: OutputFolder, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """A part's rows and record. Raises ArrowException, OSError, KeyError or ValueError where it cannot be read."""
    with folder.open(name) as file, pq.ParquetFile(file) as part:
        return part.read(), read_record(part.metadata.metadata or {})


def count_rows(part: pa.Table, engine_s: float) -> Counts:
    """Count the input rows of a part; one that failed has one sample, its error. Tokens are those of the others; tokens
    that were scored count as the prompt's."""
    names = ("sample", "error", "num_prompt_tokens", "num_continuation_tokens", "num_generated_tokens")
    nothing = [None] * part.num_rows
    columns: list[list[Any]] = [part[name].to_pylist() if name in part.column_names else nothing for name in names]
    rows = failed = prompt_tokens = generated_tokens = 0
    errors: Counter[str] = Counter()
    for sample, error, prompt, scored, generated in zip(*columns, strict=True):
        rows += sample == 0
        if error is not None:
            failed += 1
            errors[error["code"]] += 1
            continue
        prompt_tokens += (prompt if sample == 0 else 0) + (scored or 0)
        generated_tokens += generated or 0
    return Counts(rows - failed, failed, prompt_tokens, generated_tokens, engine_s, dict(errors))


def find_committed(folder: OutputFolder, plan: Plan, known: Collection[int] = ()) -> dict[int, Counts]:
    """What the parts in the folder hold, by shard; see find_records."""
    return {shard: record.counts for shard, record in find_records(folder, plan, known).items()}


def find_records(folder: OutputFolder, plan: Plan, known: Collection[int] = ()) -> dict[int, Record]:
    """The records of the parts in the folder, by shard. A part that cannot be read, or whose record does not agree with
    its rows and the plan, counts as absent; the run that does its shard replaces it.

    known: shards that are not looked at
    """
    there = set(folder.names())
    shards = [shard for shard in plan.shards if shard.index not in known and plan.part_name(shard) in there]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda shard: _read_record(folder, plan, shard), shards)
        return {shard.index: record for shard, record in zip(shards, found, strict=True) if record is not None}


def _read_record(folder: OutputFolder, plan: Plan, shard: Shard) -> Record | None:
    try:
        with folder.open(plan.part_name(shard)) as file:
            footer = pq.read_metadata(file)
        record = read_record(footer.metadata or {})
        counts = Counts(**record.pop("counts"))
        tally = Tally.from_json(record.pop("tally")) if "tally" in record else None
        says = tuple(record.pop(name) for name in ("fingerprint", "shard", "num_rows"))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if (*says, counts.rows) != (plan.fingerprint.hexdigest, shard.index, footer.num_rows, shard.num_rows):
        return None
    return Record(counts, tally, record)
