"""The columns that a job writes: first the kept input columns, then the job's own."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from moray.batch.parsed.column import arrow_type
from moray.batch.spec import JobSpec

_TOKEN: list[tuple[str, pa.DataType]] = [("token_id", pa.int32()), ("logprob", pa.float32())]
LOGPROBS = pa.list_(pa.struct([*_TOKEN, ("top", pa.list_(pa.struct(_TOKEN)))]))
ERROR = pa.struct([("stage", pa.string()), ("code", pa.string()), ("message", pa.string())])

_ORIGIN = {"error": ERROR, "source_file": pa.string(), "source_row": pa.int64()}

# By task.
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "generate": {
        "sample": pa.int32(),
        "reasoning": pa.string(),
        "generated_text": pa.string(),
        "finish_reason": pa.string(),
        "num_prompt_tokens": pa.int32(),
        "num_generated_tokens": pa.int32(),
        "generated_token_ids": pa.list_(pa.int32()),
        "logprobs": LOGPROBS,
        **_ORIGIN,
    },
    "score": {
        "sample": pa.int32(),
        "logprob": pa.float64(),
        "num_prompt_tokens": pa.int32(),
        "num_continuation_tokens": pa.int32(),
        "is_greedy": pa.bool_(),
        "token_logprobs": LOGPROBS,
        **_ORIGIN,
    },
    "classify": {
        "sample": pa.int32(),
        "choice": pa.string(),
        "num_prompt_tokens": pa.int32(),
        "num_continuation_tokens": pa.int32(),
        **_ORIGIN,
    },
}


def probabilities_type(choices: Iterable[str]) -> pa.DataType:
    """Return the type of the column `probabilities`: a double for each choice."""
    return pa.struct([(choice, pa.float64()) for choice in choices])


def _own_columns(spec: JobSpec) -> dict[str, pa.DataType]:
    """Return all columns that a job of this kind may write, those whose type the spec decides too, in their order."""
    columns: dict[str, pa.DataType] = {}
    for name, kind in COLUMNS[spec.task].items():
        columns[name] = kind
        if name == "generated_text" and spec.parsed_type is not None:
            columns["parsed"] = arrow_type(spec.parsed_type)
        if name == "choice":
            columns["probabilities"] = probabilities_type(spec.choices)
    return columns


def reserved_names(spec: JobSpec) -> set[str]:
    """Return the names that no kept input column may have: those of the job, without a column that is new in moray."""
    return {name for name in _own_columns(spec) if name != "reasoning" or spec.output.reasoning is not None}


def output_schema(spec: JobSpec, kept: "Iterable[pa.Field[Any]]") -> pa.Schema:
    """Return the schema of every part of the job."""
    left_out = set()
    if not spec.output.token_ids:
        left_out.add("generated_token_ids")
    if spec.output.reasoning is None:
        left_out.add("reasoning")
    if spec.output.logprobs is None:
        left_out |= {"logprobs", "token_logprobs"}
    job_columns = [pa.field(name, kind) for name, kind in _own_columns(spec).items() if name not in left_out]
    return pa.schema([*kept, *job_columns])
