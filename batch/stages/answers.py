"""From a prepared block to rows for the engine, and from what came of them to the block of their samples."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from batch.stages.rows import ANSWER, GENERATED, KEPT, Failure, values
from batch.stages.shard_run import Row, ShardRun
from engine.params import SamplingParams
from engine.request import Completion, TokenLogprobs
from engine.scoring import score


def read_rows(block: pa.Table) -> Iterator[Row]:
    """The rows of a prepared block that can run."""
    names = ("prompt_token_ids", "params", "stream_key", "continuations")
    columns = zip(*(values(block, name) for name in names), strict=True)
    known: dict[bytes, SamplingParams] = {}
    for index, (token_ids, params, stream_key, continuations) in enumerate(columns):
        if token_ids is not None:
            if params not in known:
                known[params] = pickle.loads(params)
            yield Row(index, token_ids, known[params], stream_key, continuations or ())


class _Sample(NamedTuple):
    """A sample's columns of ANSWER, without those that are its row's or its shard's."""

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


def answers(block: pa.Table, run: ShardRun) -> pa.Table:
    """The samples of a shard, in the order of its rows; one with an error for a row that could not run."""
    asked = {row.index: row for row in run.rows}
    rows: list[int] = []
    samples: list[_Sample] = []
    for index, error in enumerate(values(block, "error")):
        completions = run.completions.get(index)
        assert (completions is None) == (error is not None), f"shard {run.shard}, row {index}: {completions=}, {error=}"
        if completions is None:
            made = [_Sample(0, "error", 0, error=error)]
        else:
            made = [_sample(asked[index], number, done) for number, done in enumerate(completions)]
        rows += [index] * len(made)
        samples += made
    columns: dict[str, Sequence[Any]] = dict(zip(_Sample._fields, zip(*samples, strict=True), strict=True))
    columns["latency_s"] = [run.latencies_s.get(index) for index in rows]
    columns["engine_s"] = [run.engine_s] * len(rows)
    kept = [name for name in block.column_names if name.startswith(KEPT)]
    names = [*GENERATED.names, *kept]
    there = block.select([name for name in names if name not in columns]).take(pa.array(rows, pa.int32()))
    new = {name: pa.array(columns[name], kind) for name, kind in ANSWER}
    return pa.table({name: new[name] if name in new else there[name] for name in names})


def _sample(row: Row, number: int, completion: Completion) -> _Sample:
    """Of one with an error only the error, and how many tokens it cost."""
    reason, num_tokens = completion.finish_reason, len(completion.token_ids)
    if completion.error is not None:
        code, message = completion.error
        stage = "too_long" if code == "too_long" else "generate"
        return _Sample(number, reason, num_tokens, error=Failure(stage, code, message).as_struct())
    if row.continuations:
        return _score(row, number, completion)
    logprobs = None if completion.logprobs is None else [_logprob(token) for token in completion.logprobs]
    return _Sample(number, reason, num_tokens, completion.token_ids, completion.text_length, logprobs)


def _score(row: Row, number: int, completion: Completion) -> _Sample:
    of_prompt = completion.prompt_logprobs or ()
    tokens = [token for token in of_prompt[len(row.prompt_token_ids) :] if token is not None]
    scored, k = score(tokens), row.params.logprobs
    return _Sample(
        number,
        completion.finish_reason,
        len(completion.token_ids),
        logprob=scored.logprob,
        num_continuation_tokens=len(tokens),
        is_greedy=scored.is_greedy,
        token_logprobs=None if k is None else [_logprob(token, k) for token in tokens],
    )


def _logprob(token: TokenLogprobs, k: int | None = None) -> dict[str, Any]:
    """k: best ones to write; None = all there are."""
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top[:k]]
    return {"token_id": token.token_id, "logprob": token.logprob, "top": top}
