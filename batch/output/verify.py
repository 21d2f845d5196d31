"""verify: proves from a job's files alone that every input row is in its output exactly once.

The plan says which rows there are, the parts which of them were done. Nothing else is trusted: each part is read as a
whole and counted again.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import read_plan
from moray.batch.output.num_samples import planned_samples
from moray.batch.output.part import STATS_KEY, read_part
from moray.batch.output.part_stats import PartStats, count_part
from moray.batch.parsed.column import parse_column
from moray.batch.parsed.json_type import JsonType
from moray.batch.shards import Plan, Shard

THREADS = 8  # that read parts at once
SHOWN = 5  # rows that one problem names, at most


@dataclass
class Verification:
    """Holds what was found in the parts of a job. Input rows = ok + failed + pending.

    pending:   rows of parts that are missing, or cannot be trusted
    errors:    failed rows by error code
    problems:  what is wrong, one line each
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
        """Return whether every input row is in the output and nothing is wrong."""
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
class _VerifiedPart:
    """Holds what was found in a part.

    schema:  None where the part cannot be read
    """

    name: str
    schema: pa.Schema | None
    counts: Counts
    problems: Sequence[str]


def verify(path: str) -> Verification:
    """Check a job's output folder. Raises OutputError where the path is not one."""
    folder = OutputFolder(path)
    plan = read_plan(folder)
    names = {plan.part_name(shard): shard for shard in plan.shards}
    present = folder.names()
    found = Verification(plan.num_rows, len(plan.shards))
    unexpected = [name for name in present if name.endswith(".parquet") and name not in names]
    found.problems += [f"{name}: not a part of this job" for name in unexpected]
    schema: pa.Schema | None = None
    with ThreadPoolExecutor(THREADS) as pool:
        shards = [names[name] for name in present if name in names]
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


def _read_part(folder: OutputFolder, plan: Plan, shard: Shard) -> _VerifiedPart:
    name = plan.part_name(shard)
    try:
        table, record = read_part(folder, name)
        rows = _rows_of(table, plan)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        return _VerifiedPart(name, None, Counts(), [f"cannot be read: {str(error).splitlines()[0]}"])
    problems = list(_find_row_problems(rows, shard))
    counted, stats = count_part(table, 0.0, Counter(), is_structured=plan.fingerprint.is_structured)
    if not problems:
        problems += _find_parsed_problems(table, plan)
        problems += _find_record_problems(record, plan, shard, table.num_rows, counted, stats)
    return _VerifiedPart(name, table.schema.remove_metadata(), counted, problems)


# (source_file, source_row), sample, error code, planned samples
Row = tuple[tuple[str, int], int, str | None, float | None]


def _rows_of(table: pa.Table, plan: Plan) -> list[Row]:
    names = ("source_file", "source_row", "sample", "error")
    columns: list[list[Any]] = [table[name].to_pylist() for name in names]
    planned = planned_samples(plan.fingerprint.others, table)
    return [
        ((file, row), sample, None if error is None else error["code"], num_samples)
        for file, row, sample, error, num_samples in zip(*columns, planned, strict=True)
    ]


def _find_row_problems(rows: Sequence[Row], shard: Shard) -> Iterator[str]:
    """Yield what is wrong with the rows of a part.

    Every row of the shard must occur once, in samples 0, 1, ..., as many as were planned; a failed row in a single one.
    """
    expected = [(piece.file, row) for piece in shard.slices for row in piece.rows]
    samples: dict[tuple[str, int], list[int]] = {}
    planned: dict[tuple[str, int], float | None] = {}
    failed = set()
    for key, sample, code, num_samples in rows:
        samples.setdefault(key, []).append(sample)
        planned[key] = num_samples
        if code is not None:
            failed.add(key)

    def is_wrong(key: tuple[str, int]) -> bool:
        numbers = samples[key]
        return sorted(numbers) != list(range(len(numbers))) or (
            key not in failed and planned[key] not in (None, len(numbers))
        )

    yield from _list_rows("rows of its shard that are missing", [key for key in expected if key not in samples])
    yield from _list_rows("rows that are not of its shard", sorted(samples.keys() - set(expected)))
    yield from _list_rows("rows with samples missing or twice", [key for key in samples if is_wrong(key)])
    yield from _list_rows(
        "failed rows that have other samples too", sorted(key for key in failed if len(samples[key]) > 1)
    )


def _find_record_problems(
    record: dict[str, Any], plan: Plan, shard: Shard, num_rows: int, counted: Counts, stats: PartStats
) -> Iterator[str]:
    """Yield where a part's record differs from what was counted.

    How long the rows took and which are copies cannot be counted again. Parts of older versions of moray have no
    statistics.
    """
    recorded_counts = {"cut": 0} | record.get("counts", {})  # which is left out where it is 0
    comparisons = [
        ("fingerprint", record.get("fingerprint"), plan.fingerprint.hexdigest),
        ("shard", record.get("shard"), shard.index),
        ("num_rows", record.get("num_rows"), num_rows),
    ]
    comparisons += [
        (name, recorded_counts.get(name), value)
        for name, value in asdict(counted).items()
        if name not in ("engine_s", "copied")
    ]
    if STATS_KEY in record:
        recorded_stats, expected = record[STATS_KEY], json.loads(json.dumps(stats.to_json()))
        comparisons.append(("finish_reasons", recorded_stats.get("finish_reasons"), expected["finish_reasons"]))
        comparisons += [
            (f"the lengths of {name}", recorded_stats.get("histograms", {}).get(name), histogram)
            for name, histogram in expected["histograms"].items()
            if name != "latency_ms"
        ]
    for what, recorded, actual in comparisons:
        if recorded != actual:
            yield f"its record says {what} {recorded!r}, it is {actual!r}"


def _find_parsed_problems(table: pa.Table, plan: Plan) -> Iterator[str]:
    """Yield where the column parsed differs from what the texts beside it say."""
    components = plan.fingerprint.others
    if not components.get("output.parse"):
        return
    ((kind, text),) = components["sampling.structured"].items()
    texts, reasons = table["generated_text"].to_pylist(), table["finish_reason"].to_pylist()
    expected = pa.chunked_array([parse_column(texts, reasons, JsonType.of_structured(kind, text))])
    if not table["parsed"].equals(expected):
        yield "its column parsed is not what generated_text says"


def _list_rows(what: str, keys: Sequence[tuple[str, int]]) -> Iterator[str]:
    if keys:
        more = ", ..." if len(keys) > SHOWN else ""
        yield f"{what}: {len(keys):,} ({', '.join(f'{file} row {row}' for file, row in keys[:SHOWN])}{more})"
