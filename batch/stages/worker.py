"""Worker: the Ray actor that holds the model. Token ids in, token ids out."""

import logging
import os
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from socket import gethostname
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from batch.faults.quarantine import Ending
from batch.ledger import Order
from batch.stages.engine_thread import EngineThread
from batch.stages.journal import Journal
from batch.stages.rows import ANSWER, GENERATED, KEPT, Failure, shard_of, values
from batch.stages.shard_run import Row, ShardRun
from batch.stages.stage import Stage, journal_path
from engine.config import EngineConfig
from engine.cores import available_cores
from engine.errors import JobError
from engine.params import SamplingParams
from engine.request import Completion, TokenLogprobs
from engine.scoring import score

if TYPE_CHECKING:
    from engine.engine import Engine

REPORT_EVERY_S = 1.0


class Worker:
    """Runs shards through one engine; several calls at once, each in a thread of its own, each with its shard.

    monitor:  name of the job's Monitor actor
    """

    def __init__(self, model_path: str, config: EngineConfig, row_timeout_s: float | None, monitor: str) -> None:
        journal = Journal(journal_path())
        self._stage = Stage(monitor, "worker", journal.died)
        self._log = _Log()
        logging.getLogger("engine").addHandler(self._log)
        logging.getLogger("engine").setLevel(logging.INFO)
        # Ray gives the actor a fraction of a CPU, and so one thread; the machine is there for it.
        config = replace(config, num_threads=config.num_threads or available_cores())
        with self._stage.telling():
            self._engine = EngineThread(
                lambda: self._load(model_path, config), journal.write, self._stage.clear, row_timeout_s, self._end
            )
        self._entrance = Lock()
        self._telling = Lock()  # what was taken first is told first
        engine = self._engine.engine
        dtype = str(engine.dtype).removeprefix("torch.")
        self._stage.ready(reports=True, host=gethostname(), device=engine.device_name, dtype=dtype)
        Thread(target=self._report, name="report", daemon=True).start()

    def _load(self, model_path: str, config: EngineConfig) -> "Engine":
        from engine.engine import Engine  # and torch, which the driver has no use for

        return Engine(model_path, config)

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._stage.telling():
            run = self._start(block) if block.num_rows else None
            if run is None:
                return GENERATED.empty_table()
            run.wait()
            if not self._engine.progress():  # with this shard the job may end
                self._tell()
            return answers(block, run)

    def _start(self, block: pa.Table) -> ShardRun | None:
        """Admit a shard when there is room for it; None where it may not start any more."""
        with self._entrance:  # what one brings the next one sees
            self._engine.wait_for_room()
            shard, *_ = shard_of(block)
            suspects = self._stage.admit(shard)
            if suspects is None:
                return None
            run = ShardRun(shard, list(read_rows(block)), suspects=suspects)
            self._engine.start(run)
            return run

    def _report(self) -> None:
        """Tell the monitor how far the shards are, and do what it says."""
        try:
            while self._tell()() is not Order.ABORT:
                time.sleep(REPORT_EVERY_S)
            self._engine.fail(JobError("the job was aborted"))
        except Exception as failure:  # without a monitor nobody could stop the job
            self._engine.fail(failure)
        self._stage.end_with_job()

    def _end(self, failure: BaseException) -> None:
        """End the process: nobody knows what state an engine is in that has raised, nor which row is at fault. What the
        journal says was in it is tried again alone, in a new process. Returns where there is nobody to tell."""
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        logging.getLogger("engine").error("%s", "".join(traceback.format_exception(failure)))
        try:
            self._tell()
            self._stage.expect_end(Ending.failed(reason))
        except Exception:  # the job is over
            return
        os._exit(1)

    def _tell(self) -> Callable[[], Order | None]:
        """See Stage.report."""
        engine = self._engine
        with self._telling:
            figures, experts = engine.figures(), engine.take_expert_tokens()
            return self._stage.report(engine.progress(), self._log.take(), figures, engine.stalled_s, experts)


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
    there = block.select([name for name in GENERATED.names if name not in columns] + kept).take(
        pa.array(rows, pa.int32())
    )
    new = {name: pa.array(columns[name], kind) for name, kind in ANSWER}
    return pa.table({name: new[name] if name in new else there[name] for name in [*GENERATED.names, *kept]})


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


class _Log(logging.Handler):
    """Keeps what was logged until the monitor is told."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[str] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def take(self) -> list[str]:
        return [self._lines.popleft() for _ in range(len(self._lines))]
