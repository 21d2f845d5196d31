"""Reads and writes parts: Parquet files of one shard each.

A part carries the only record of what was committed.
"""

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.output.part_stats import PartStats
from moray.batch.shards import Plan, Shard

_KEY = "moray"
STATS_KEY = "tally"  # of the record: the name that PartStats have in the files
_THREADS = 16  # that read footers at once, since most of the time is spent waiting for the store


@dataclass(frozen=True)
class Record:
    """Holds what a part records about itself.

    stats:       None in parts of older versions of moray
    provenance:  the other metadata in the record
    """

    counts: Counts
    stats: PartStats | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def encode_part(
    table: pa.Table, fingerprint: str, shard: int, counts: Counts, stats: PartStats, provenance: Mapping[str, object]
) -> bytes:
    """Return the bytes of a part's file, with its record in the footer."""
    record = {"fingerprint": fingerprint, "shard": shard, "num_rows": table.num_rows}
    record |= {"counts": counts.to_json(), STATS_KEY: stats.to_json()}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: json.dumps(record | dict(provenance))})
    file: bytes = sink.getvalue().to_pybytes()
    return file


def read_record(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the record in a part's metadata. Raises KeyError or ValueError where there is none."""
    record: dict[str, Any] = json.loads(metadata[_KEY.encode()])
    return record


def read_part(folder: OutputFolder, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """Return a part's rows and record.

    Raises ArrowException, OSError, KeyError or ValueError where it cannot be read.
    """
    with folder.open(name) as file, pq.ParquetFile(file) as part:
        return part.read(), read_record(part.metadata.metadata or {})


def find_committed(folder: OutputFolder, plan: Plan, known: Collection[int] = ()) -> dict[int, Counts]:
    """Return, by shard, what the parts in the folder hold; see find_records."""
    return {shard: record.counts for shard, record in find_records(folder, plan, known).items()}


def find_records(folder: OutputFolder, plan: Plan, known: Collection[int] = ()) -> dict[int, Record]:
    """Return, by shard, the records of the parts in the folder.

    A part that cannot be read, or whose record does not agree with its rows and the plan, counts as missing; the run
    that does its shard replaces it.

    known:  shards to leave out
    """
    present = set(folder.names())
    shards = [shard for shard in plan.shards if shard.index not in known and plan.part_name(shard) in present]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda shard: _read_record(folder, plan, shard), shards)
        return {shard.index: record for shard, record in zip(shards, found, strict=True) if record is not None}


def _read_record(folder: OutputFolder, plan: Plan, shard: Shard) -> Record | None:
    try:
        with folder.open(plan.part_name(shard)) as file:
            footer = pq.read_metadata(file)
        record = read_record(footer.metadata or {})
        counts = Counts(**record.pop("counts"))
        stats = PartStats.from_json(record.pop(STATS_KEY)) if STATS_KEY in record else None
        claimed = tuple(record.pop(name) for name in ("fingerprint", "shard", "num_rows"))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if (*claimed, counts.rows) != (plan.fingerprint.hexdigest, shard.index, footer.num_rows, shard.num_rows):
        return None
    return Record(counts, stats, record)
