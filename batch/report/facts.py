"""What a report says, before it is drawn: all of it read from the job's files."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from batch.ledger import Counts
from batch.output.folder import JOB, OutputFolder
from batch.output.job_folder import read_plan
from batch.output.part import find_records
from batch.output.tally import Tally
from batch.report.events import Run, read_runs
from batch.report.examples import Example, find_examples


@dataclass(frozen=True)
class Facts:
    """
    spec, status, forecast:  the job's files as JSON values, empty where there is none
    fingerprint:   of the job, and what it is made of
    parts, shards: parts that are there and to be trusted, and how many there are to be
    counts, tally: sums over the parts; untold: how many of them, of an older moray, have no tally
    tokens_of:     prompt and generated tokens of each committed shard
    provenance:    what the last part says of its making
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
    untold: int
    counts: Counts
    tally: Tally
    tokens_of: Mapping[int, tuple[int, int]]
    rows_of: Mapping[int, int]
    provenance: Mapping[str, Any]
    runs: Sequence[Run]
    examples: Mapping[str, Sequence[Example]]

    @property
    def pending(self) -> int:
        return self.input_rows - self.counts.rows

    @property
    def expert_tokens(self) -> list[list[int]] | None:
        """[layers][experts], over all worker processes that told; None where none did."""
        told = [tokens for run in self.runs for tokens in run.expert_tokens]
        if not told:
            return None
        same = [tokens for tokens in told if [len(row) for row in tokens] == [len(row) for row in told[-1]]]
        return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*same, strict=True)]


def read_facts(folder: OutputFolder) -> Facts:
    """Raises OutputError where the folder is none of a job. Any other file may be missing or spoiled."""
    plan = read_plan(folder)
    records = find_records(folder, plan)
    spec = _read_yaml(folder)
    source = spec.get("input", {})
    column = next((source[kind] for kind in ("prompt", "messages", "token_ids") if source.get(kind)), None)
    tallies = [record.tally for record in records.values() if record.tally is not None]
    return Facts(
        path=folder.path,
        spec=spec,
        status=_read_json(folder, "status.json"),
        forecast=_read_json(folder, "forecast.json"),
        fingerprint=plan.fingerprint.hexdigest,
        input_rows=plan.num_rows,
        input_files=len(plan.fingerprint.files),
        shards=len(plan.shards),
        parts=len(records),
        untold=len(records) - len(tallies),
        counts=_sum(records.values()),
        tally=Tally.total(tallies),
        tokens_of={i: (record.counts.prompt_tokens, record.counts.generated_tokens) for i, record in records.items()},
        rows_of={i: record.counts.rows for i, record in records.items()},
        provenance=records[max(records)].provenance if records else {},
        runs=read_runs(folder),
        examples=find_examples(folder, plan, records, column),
    )


def _sum(records: Any) -> Counts:
    names = ("ok", "failed", "prompt_tokens", "generated_tokens", "engine_s")
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
