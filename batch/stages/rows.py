"""The blocks between the stages: one shard, one Arrow table. Kept input columns stand in them under a prefix."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batch.output.schema import ERROR, LOGPROBS

KEPT = "input."  # no other column of a block starts with it


@dataclass(frozen=True)
class Failure:
    """Why a row has no answer. stage: read, template, tokenize, too_long, generate or detokenize."""

    stage: str
    code: str
    message: str

    def as_struct(self) -> dict[str, str]:
        return {"stage": self.stage, "code": self.code, "message": self.message}


Columns = list[tuple[str, pa.DataType]]

# The same in each row of a block: number of the shard, its input rows, the name of its part.
SHARD: Columns = [("shard", pa.int32()), ("shard_rows", pa.int32()), ("part", pa.string())]

# What prepare finds out about a row. params: a pickled SamplingParams. continuations: token ids to score after the
# prompt. A row with an error has neither params nor token ids; num_prompt_tokens where it came to tokens.
READY: Columns = [
    ("source_file", pa.string()),
    ("source_row", pa.int64()),
    ("num_prompt_tokens", pa.int32()),
    ("prompt_token_ids", pa.list_(pa.int32())),
    ("continuations", pa.list_(pa.list_(pa.int32()))),
    ("params", pa.binary()),
    ("stream_key", pa.uint64()),
    ("error", ERROR),
]

# What the engine made of it, one row a sample: a text that was generated or a continuation that was scored, with nulls
# for the other. latency_s: from the row's admission to its end; engine_s: the whole shard's, in each row.
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
]
_SOURCE = READY[:3]

PREPARED = pa.schema(SHARD + READY)  # from prepare to Worker
GENERATED = pa.schema(SHARD + _SOURCE + ANSWER)  # from Worker to commit


def values(block: pa.Table, name: str) -> list[Any]:
    """A column as Python values."""
    column: list[Any] = block[name].to_pylist()
    return column


def shard_of(block: pa.Table) -> tuple[int, int, str]:
    """Number, input rows and part of a block that is not empty."""
    number, rows, part = (block[name][0].as_py() for name, _ in SHARD)
    return number, rows, part
