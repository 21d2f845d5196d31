"""Converts a prepared block into rows for the engine, and the engine's completions into the block of samples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from moray.batch.stages.block_schemas import ANSWER, GENERATED, KEPT, Failure, values
from moray.batch.stages.row_params import unpack_params
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.engine.request import Completion, Request, TokenLogprobs
from moray.engine.sampling.scoring import score


def read_rows(block: pa.Table) -> Iterator[InFlightRow]:
    """Yield the rows of a prepared block that can run."""
    names = ("prompt_token_ids", "stream_key", "continuations")
    columns = zip(*(values(block, name) for name in names), unpack_params(block), strict=True)
    for index, (token_ids, stream_key, continuations, params) in enumerate(columns):
        if params is not None:
            yield InFlightRow(index, Request("", token_ids, params, stream_key, continuations or ()))


class _ResultRow(NamedTuple):
    """Holds a sample's columns of ANSWER, except those that are the same for its whole row or shard."""

    sample: int
    finish_reason: str
    num_generated_tokens: int
    generated_token_ids: Sequence[int] | None = None
    text_length: int | None = None
    logprobs: list[dict[str, Any]] | None = None
    logprob: float | None = None
    num_continuation_tokens: int | None = None
    is_greedy: bool | None = None
    token_logprobs: list[dict[str, Any]] | None = None
    error: Mapping[str, str] | None = None


def build_result_block(block: pa.Table, shard: InFlightShard) -> pa.Table:
    """Return the block with the samples of a shard, in the order of its rows.

    A row that could not run has one sample, with its error.
    """
    requested = {row.index: row for row in shard.rows}
    rows: list[int] = []
    samples: list[_ResultRow] = []
    for index, error in enumerate(values(block, "error")):
        completions = shard.completions.get(index)
        assert (completions is None) == (error is not None), (
            f"shard {shard.index}, row {index}: {completions=}, {error=}"
        )
        if completions is None:
            new_samples = [_ResultRow(0, "error", 0, error=error)]
        else:
            new_samples = [_make_result(requested[index], number, done) for number, done in enumerate(completions)]
        rows += [index] * len(new_samples)
        samples += new_samples
    columns: dict[str, Sequence[Any]] = dict(zip(_ResultRow._fields, zip(*samples, strict=True), strict=True))
    columns["latency_s"] = [shard.latencies_s.get(index) for index in rows]
    columns["engine_s"] = [shard.engine_s] * len(rows)
    columns["copied"] = [shard.num_copied] * len(rows)
    kept = [name for name in block.column_names if name.startswith(KEPT)]
    names = [*GENERATED.names, *kept]
    repeated = block.select([name for name in names if name not in columns]).take(pa.array(rows, pa.int32()))
    new = {name: pa.array(columns[name], kind) for name, kind in ANSWER}
    return pa.table({name: new[name] if name in new else repeated[name] for name in names})


def _make_result(row: InFlightRow, number: int, completion: Completion) -> _ResultRow:
    """Return the result of a sample; for one with an error, only the error and how many tokens were generated."""
    reason, num_tokens = completion.finish_reason, len(completion.token_ids)
    if completion.error is not None:
        code, message = completion.error
        stage = "too_long" if code == "too_long" else "generate"
        return _ResultRow(number, reason, num_tokens, error=Failure(stage, code, message).as_struct())
    if row.request.continuations:
        return _make_score_result(row, number, completion)
    logprobs = None if completion.logprobs is None else [_logprob(token) for token in completion.logprobs]
    return _ResultRow(number, reason, num_tokens, completion.token_ids, completion.text_length, logprobs)


def _make_score_result(row: InFlightRow, number: int, completion: Completion) -> _ResultRow:
    prompt_logprobs = completion.prompt_logprobs or ()
    tokens = [token for token in prompt_logprobs[len(row.request.prompt_token_ids) :] if token is not None]
    scored, k = score(tokens), row.request.params.logprobs
    return _ResultRow(
        number,
        completion.finish_reason,
        len(completion.token_ids),
        logprob=scored.logprob,
        num_continuation_tokens=len(tokens),
        is_greedy=scored.is_greedy,
        token_logprobs=None if k is None else [_logprob(token, k) for token in tokens],
    )


def _logprob(token: TokenLogprobs, k: int | None = None) -> dict[str, Any]:
    """Return a token's log-probabilities as a struct.

    k:  number of the most likely tokens to write; None = all there are
    """
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top[:k]]
    return {"token_id": token.token_id, "logprob": token.logprob, "top": top}
