"""Which parts count as committed: those that can be read and agree with their record and the plan."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import Record, encode_part, find_committed, find_records
from moray.batch.output.part_stats import PartStats
from moray.batch.shards import Plan, Shard, Slice

PLAN = Plan(
    Fingerprint({"a.parquet": "x"}, {"task": "generate"}),
    tuple(Shard(index, (Slice("a.parquet", 3 * index, 3),)) for index in range(3)),
)
COUNTS = Counts(ok=2, failed=1, prompt_tokens=7, generated_tokens=8, engine_s=0.5, errors={"too_long": 1})
TALLY = PartStats(Counter({"stop": 3}), {"latency_ms": Counter({200: 2})})
TABLE = pa.table({"x": range(4)})  # one row has two samples


def part(
    *, fingerprint: str = PLAN.fingerprint.hexdigest, shard: int = 1, counts: Counts = COUNTS, table: pa.Table = TABLE
) -> bytes:
    return encode_part(table, fingerprint, shard, counts, TALLY, {"moray": "1"})


def found(folder: OutputFolder, content: bytes) -> dict[int, Counts]:
    folder.write(PLAN.part_name(PLAN.shards[1]), content)
    return find_committed(folder, PLAN)


def with_record(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a part whose record was tampered with."""
    source = pq.ParquetFile(pa.BufferReader(part()))
    record = json.loads((source.metadata.metadata or {})[b"moray"])
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
        writer.add_key_value_metadata({"moray": json.dumps(change(record))})
    return sink.getvalue().to_pybytes()


def test_a_part_records_what_it_holds(tmp_path: Path) -> None:
    assert found(OutputFolder(str(tmp_path)), part()) == {1: COUNTS}
    assert find_records(OutputFolder(str(tmp_path)), PLAN) == {1: Record(COUNTS, TALLY, {"moray": "1"})}
    table = pq.read_table(tmp_path / PLAN.part_name(PLAN.shards[1]))
    assert table.equals(TABLE)


def test_a_part_of_an_older_moray_has_no_statistics(tmp_path: Path) -> None:
    old = with_record(lambda record: {name: value for name, value in record.items() if name != "tally"})
    assert found(OutputFolder(str(tmp_path)), old) == {1: COUNTS}
    assert find_records(OutputFolder(str(tmp_path)), PLAN)[1].stats is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        part()[:-20],
        part(fingerprint="0" * 64),
        part(shard=2),
        part(counts=Counts(ok=2)),
        with_record(lambda record: record | {"num_rows": 3}),
        with_record(lambda record: record | {"counts": {"good": 3}}),
        with_record(lambda record: record | {"tally": {"finish_reasons": {}}}),
        with_record(lambda record: record | {"tally": {"finish_reasons": {}, "histograms": {"latency_ms": {"x": 1}}}}),
        with_record(lambda record: []),
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_a_part_that_does_not_agree_is_absent(tmp_path: Path, content: bytes) -> None:
    assert found(OutputFolder(str(tmp_path)), content) == {}


def test_a_parquet_file_without_a_record_is_absent(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    assert found(OutputFolder(str(tmp_path)), sink.getvalue().to_pybytes()) == {}


def test_no_folder_has_no_parts(tmp_path: Path) -> None:
    assert find_committed(OutputFolder(str(tmp_path / "not there")), PLAN) == {}


def test_parts_in_an_object_store(bucket: str) -> None:
    assert found(OutputFolder(f"s3://{bucket}/out"), part()) == {1: COUNTS}
    assert found(OutputFolder(f"s3://{bucket}/out"), part()[:-9]) == {}
