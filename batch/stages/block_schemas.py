"""The schemas of the blocks between the stages: one Arrow table per shard. Kept input columns have a prefix."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moray.batch.output_columns import ERROR, LOGPROBS
from moray.batch.stages.row_params import COLUMNS as PARAMS

KEPT = "input."  # prefix of the kept input columns; no other column of a block starts with it


@dataclass(frozen=True)
class Failure:
    """States why a row has no answer.

    stage:    read, template, tokenize, too_long, generate or detokenize
    code:     the error's code
    message:  the error's text
    """

    stage: str
    code: str
    message: str

    def as_struct(self) -> dict[str, str]:
        """Return the value of the column `error`."""
        return {"stage": self.stage, "code": self.code, "message": self.message}


Columns = list[tuple[str, pa.DataType]]

# Columns that are the same in every row of a block: number of the shard, its input rows, the name of its part.
SHARD: Columns = [("shard", pa.int32()), ("shard_rows", pa.int32()), ("part", pa.string())]

# What prepare adds to a row. PARAMS: its sampling parameters. continuations: token ids to score after the prompt. A row
# with an error has neither parameters nor token ids; it has num_prompt_tokens if its prompt was encoded.
# begins_open: whether the text begins inside the reasoning (engine.text.reasoning.is_open); null where none is split.
READY: Columns = [
    ("source_file", pa.string()),
    ("source_row", pa.int64()),
    ("num_prompt_tokens", pa.int32()),
    ("begins_open", pa.bool_()),
    ("prompt_token_ids", pa.list_(pa.int32())),
    ("continuations", pa.list_(pa.list_(pa.int32()))),
    *PARAMS,
    ("stream_key", pa.uint64()),
    ("error", ERROR),
]

# What the engine adds, in one row per sample: the generated text or the scored continuation, with nulls for the other.
# latency_s: seconds from the row's admission to its end. In each row that of the whole shard: engine_s, and copied, the
# number of rows that have the answer of an equal row.
ANSWER: Columns = [
    ("sample", pa.int32()),
    ("finish_reason", pa.string()),
    ("num_generated_tokens", pa.int32()),
    ("generated_token_ids", pa.list_(pa.int32())),
    ("text_length", pa.int32()),
    ("logprobs", LOGPROBS),
    ("logprob", pa.float64()),
    ("num_continuation_tokens", pa.int32()),
    ("is_greedy", pa.bool_()),
    ("token_logprobs", LOGPROBS),
    ("error", ERROR),
    ("latency_s", pa.float64()),
    ("engine_s", pa.float64()),
    ("copied", pa.int32()),
]
_SOURCE = READY[:4]

PREPARED = pa.schema(SHARD + READY)  # from prepare to the worker
GENERATED = pa.schema(SHARD + _SOURCE + ANSWER)  # from the worker to commit


def values(block: pa.Table, name: str) -> list[Any]:
    """Return a column as Python values."""
    column: list[Any] = block[name].to_pylist()
    return column


def read_shard(block: pa.Table) -> tuple[int, int, str]:
    """Return the shard's number, its input rows and the name of its part from a block that is not empty."""
    number, rows, part = (block[name][0].as_py() for name, _ in SHARD)
    return number, rows, part
