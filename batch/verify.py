"""verify: prove from a job's files alone that every input row is there exactly once.

The plan says which rows there are, the parts which of them were done. Nothing else is believed: each part is read whole
and counted again.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from batch.ledger import Counts
from batch.output.folder import OutputFolder
from batch.output.job_folder import read_plan
from batch.output.num_samples import planned_samples
from batch.output.part import count_rows, read_part
from batch.output.tally import Tally, tally_rows
from batch.planning.plan import Plan, Shard

THREADS = 8
SHOWN = 5  # rows named in one problem


@dataclass
class Verification:
    """What the parts hold. Input rows = ok + failed + pending; `problems` are what should not be, a line each.

    pending:  rows of parts that are not there, or cannot be trusted
    errors:   failed rows by code
    """

    input_rows: int
    shards: int
    parts: int = 0
    ok: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return self.input_rows - self.ok - self.failed

    @property
    def closes(self) -> bool:
        return self.pending == 0 and not self.problems

    def to_json(self) -> dict[str, Any]:
        return {
            "closes": self.closes,
            "input_rows": self.input_rows,
            "ok_rows": self.ok,
            "failed_rows": self.failed,
            "pending_rows": self.pending,
            "shards": self.shards,
            "parts": self.parts,
            "errors": dict(self.errors),
            "problems": self.problems,
        }


@dataclass(frozen=True)
class _Part:
    """A part as it was found. schema: None where it cannot be read."""

    name: str
    schema: pa.Schema | None
    counts: Counts
    problems: Sequence[str]


def verify(path: str) -> Verification:
    """Check a job's output folder. Raises OutputError where it is none."""
    folder = OutputFolder(path)
    plan = read_plan(folder)
    names = {plan.part_name(shard): shard for shard in plan.shards}
    there = folder.names()
    found = Verification(plan.num_rows, len(plan.shards))
    strays = [name for name in there if name.endswith(".parquet") and name not in names]
    found.problems += [f"{name}: not a part of this job" for name in strays]
    schema: pa.Schema | None = None
    with ThreadPoolExecutor(THREADS) as pool:
        shards = [names[name] for name in there if name in names]
        for part in pool.map(lambda shard: _read_part(folder, plan, shard), shards):
            problems = list(part.problems)
            if schema is None:
                schema = part.schema
            elif part.schema is not None and not part.schema.equals(schema):
                problems.append("its schema is not that of the parts before it")
            found.problems += [f"{part.name}: {problem}" for problem in problems]
            if not problems:
                found.parts += 1
                found.ok += part.counts.ok
                found.failed += part.counts.failed
                found.errors.update(part.counts.errors)
    return found


def _read_part(folder: OutputFolder, plan: Plan, shard: Shard) -> _Part:
    name = plan.part_name(shard)
    try:
        table, record = read_part(folder, name)
        rows = _rows_of(table, plan)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        return _Part(name, None, Counts(), [f"cannot be read: {str(error).splitlines()[0]}"])
    problems = list(_find_row_problems(rows, shard))
    counted = count_rows(table, 0.0)
    if not problems:
        tallied = tally_rows(table, Counter())
        problems += _find_record_problems(record, plan, shard, table.num_rows, counted, tallied)
    return _Part(name, table.schema.remove_metadata(), counted, problems)


Row = tuple[tuple[str, int], int, str | None, float | None]  # (source_file, source_row), sample, error code, samples


def _rows_of(table: pa.Table, plan: Plan) -> list[Row]:
    names = ("source_file", "source_row", "sample", "error")
    columns: list[list[Any]] = [table[name].to_pylist() for name in names]
    planned = planned_samples(plan.fingerprint.others, table)
    return [
        ((file, row), sample, None if error is None else error["code"], num_samples)
        for file, row, sample, error, num_samples in zip(*columns, planned, strict=True)
    ]


def _find_row_problems(rows: Sequence[Row], shard: Shard) -> Iterator[str]:
    """Every row of the shard once, in samples 0, 1, ..., as many as were planned; one that failed in a single one."""
    wanted = [
        (piece.file, row) for piece in shard.slices for row in range(piece.first_row, piece.first_row + piece.num_rows)
    ]
    samples: dict[tuple[str, int], list[int]] = {}
    planned: dict[tuple[str, int], float | None] = {}
    failed = set()
    for key, sample, code, num_samples in rows:
        samples.setdefault(key, []).append(sample)
        planned[key] = num_samples
        if code is not None:
            failed.add(key)

    def is_wrong(key: tuple[str, int]) -> bool:
        of = samples[key]
        return sorted(of) != list(range(len(of))) or (key not in failed and planned[key] not in (None, len(of)))

    yield from _name("rows of its shard that are missing", [key for key in wanted if key not in samples])
    yield from _name("rows that are not of its shard", sorted(samples.keys() - set(wanted)))
    yield from _name("rows with samples missing or twice", [key for key in samples if is_wrong(key)])
    yield from _name("failed rows that have other samples too", sorted(key for key in failed if len(samples[key]) > 1))


def _find_record_problems(
    record: dict[str, Any], plan: Plan, shard: Shard, num_rows: int, counted: Counts, tallied: Tally
) -> Iterator[str]:
    """What is written in the part must be what was counted; how long it took cannot be. Parts of an older moray have no
    tally."""
    says_counts = record.get("counts", {})
    comparisons = [
        ("fingerprint", record.get("fingerprint"), plan.fingerprint.hexdigest),
        ("shard", record.get("shard"), shard.index),
        ("num_rows", record.get("num_rows"), num_rows),
    ]
    comparisons += [
        (name, says_counts.get(name), value) for name, value in asdict(counted).items() if name != "engine_s"
    ]
    if "tally" in record:
        says_tally, wanted = record["tally"], json.loads(json.dumps(tallied.to_json()))
        comparisons.append(("finish_reasons", says_tally.get("finish_reasons"), wanted["finish_reasons"]))
        comparisons += [
            (f"the lengths of {name}", says_tally.get("histograms", {}).get(name), histogram)
            for name, histogram in wanted["histograms"].items()
            if name != "latency_ms"
        ]
    for what, says, want in comparisons:
        if says != want:
            yield f"its record says {what} {says!r}, it is {want!r}"


def _name(what: str, keys: Sequence[tuple[str, int]]) -> Iterator[str]:
    if keys:
        more = ", ..." if len(keys) > SHOWN else ""
        yield f"{what}: {len(keys):,} ({', '.join(f'{file} row {row}' for file, row in keys[:SHOWN])}{more})"
