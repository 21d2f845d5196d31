"""ReportData: all that a report shows, read from the job's files."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from moray.batch.ledger import Counts
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.output.job_folder import read_plan
from moray.batch.output.part import find_records
from moray.batch.output.part_stats import PartStats
from moray.batch.report.events import RunEvents, read_runs
from moray.batch.report.examples import Example, find_examples


@dataclass(frozen=True)
class ReportData:
    """Holds all that a report shows.

    path:           the job's output folder
    spec, status, forecast:  the job's files as JSON values, empty where there is none
    fingerprint:    the job's, in hexadecimal
    parts, shards:  valid parts in the folder, and how many the finished job has
    parts_without_stats:  parts of an older moray, which have no statistics
    counts, stats:  sums over the parts
    shard_tokens:   prompt and generated tokens of each committed shard
    shard_rows:     rows of each committed shard
    provenance:     how the last part was made
    warnings:       the plan's and the forecast's
    """

    path: str
    spec: Mapping[str, Any]
    status: Mapping[str, Any]
    forecast: Mapping[str, Any]
    fingerprint: str
    input_rows: int
    input_files: int
    shards: int
    parts: int
    parts_without_stats: int
    counts: Counts
    stats: PartStats
    shard_tokens: Mapping[int, tuple[int, int]]
    shard_rows: Mapping[int, int]
    provenance: Mapping[str, Any]
    runs: Sequence[RunEvents]
    examples: Mapping[str, Sequence[Example]]
    warnings: Sequence[str] = ()

    @property
    def pending(self) -> int:
        return self.input_rows - self.counts.rows

    @property
    def expert_tokens(self) -> list[list[int]] | None:
        """Return the tokens by [layers][experts] over all worker processes; None where none reported them."""
        reported = [tokens for run in self.runs for tokens in run.expert_tokens]
        if not reported:
            return None
        shape = [len(row) for row in reported[-1]]
        same = [tokens for tokens in reported if [len(row) for row in tokens] == shape]
        return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*same, strict=True)]


def read_report_data(folder: OutputFolder) -> ReportData:
    """Read a job's files. All but the plan may be missing or damaged.

    Raises OutputError where the folder is no job's output folder.
    """
    plan = read_plan(folder)
    records = find_records(folder, plan)
    spec = _read_yaml(folder)
    source = spec.get("input", {})
    column = next((source[kind] for kind in ("prompt", "messages", "token_ids") if source.get(kind)), None)
    all_stats = [record.stats for record in records.values() if record.stats is not None]
    return ReportData(
        path=folder.path,
        spec=spec,
        status=_read_json(folder, "status.json"),
        forecast=_read_json(folder, "forecast.json"),
        fingerprint=plan.fingerprint.hexdigest,
        input_rows=plan.num_rows,
        input_files=len(plan.fingerprint.files),
        shards=len(plan.shards),
        parts=len(records),
        parts_without_stats=len(records) - len(all_stats),
        counts=_sum(records.values()),
        stats=PartStats.total(all_stats),
        shard_tokens={i: (one.counts.prompt_tokens, one.counts.generated_tokens) for i, one in records.items()},
        shard_rows={i: record.counts.rows for i, record in records.items()},
        provenance=records[max(records)].provenance if records else {},
        runs=read_runs(folder),
        examples=find_examples(folder, plan, records, column),
        warnings=(*plan.warnings, *_read_json(folder, "forecast.json").get("warnings", ())),
    )


def _sum(records: Any) -> Counts:
    names = ("ok", "failed", "prompt_tokens", "generated_tokens", "engine_s", "copied", "cut")
    sums = dict.fromkeys(names, 0)
    errors: Counter[str] = Counter()
    for record in records:
        for name in names:
            sums[name] += getattr(record.counts, name)
        errors.update(record.counts.errors)
    return Counts(**sums, errors=dict(errors.most_common()))


def _read_json(folder: OutputFolder, name: str) -> Mapping[str, Any]:
    try:
        value = json.loads(folder.read(f"{JOB}/{name}") or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(folder: OutputFolder) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(folder.read(f"{JOB}/spec.yaml") or b"{}")
    except (yaml.YAMLError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
