"""ShardExecutor with equal rows: they are computed once, and every one gets its answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from made_jobs import TINY
from patience import PATIENCE_S

from moray.batch.ledger import Progress
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.batch.worker.quarantine import Suspect
from moray.batch.worker.shard_executor import ShardExecutor
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import JobError
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.scoring import scoring_params

PROMPTS = [[100, 7], [101, 7], [100, 7], [100, 7], [101, 7], [102, 7]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), EngineConfig(max_num_seqs=4, max_model_len=256))


@pytest.fixture
def executors(engine: Engine) -> Iterator[Any]:
    """Yield a function that makes an executor; those made end with the test."""
    made: list[ShardExecutor] = []

    def make(**options: Any) -> ShardExecutor:
        for earlier in made:
            stop(earlier)
        made.append(ShardExecutor(lambda: engine, ignore_rows, ignore_cleared, **options))
        return made[-1]

    yield make
    for executor in made:
        stop(executor)


def ignore_rows(rows: Any, *, is_trial: bool) -> None:
    """Keep no journal."""


def ignore_cleared(shard: int, row: int) -> None:
    """Report no suspect."""


def stop(executor: ShardExecutor) -> None:
    executor.fail(JobError("the test is over"))
    executor.join(PATIENCE_S)
    for request_id in list(executor.engine._samples):
        executor.engine.abort(request_id)


def make_shard(number: int, prompts: Sequence[Sequence[int]] = PROMPTS, **params: Any) -> InFlightShard:
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | params)
    return InFlightShard(
        number, [InFlightRow(i, Request("", p, sampling, 10 * number + i)) for i, p in enumerate(prompts)]
    )


def run_all(executor: ShardExecutor, *shards: InFlightShard) -> int:
    """Run shards at once, and return how many prompts the engine was given."""
    before = executor.engine.metrics.prompt_tokens
    for shard in shards:
        executor.start(shard)
    for shard in shards:
        assert shard.done.wait(PATIENCE_S)
        shard.wait()
    return (executor.engine.metrics.prompt_tokens - before) // 2


def test_equal_rows_of_all_shards_are_computed_once(executors: Any) -> None:
    apart = make_shard(0), make_shard(1)
    assert run_all(executors(dedup=False), *apart) == 12 and apart[0].num_copied == apart[1].num_copied == 0
    shards, later, executor = (make_shard(0), make_shard(1)), make_shard(2), executors()
    assert run_all(executor, *shards) == 3 and run_all(executor, later) == 0
    assert [shard.completions for shard in (*shards, later)] == [apart[0].completions] * 3
    assert [shard.num_copied for shard in (*shards, later)] == [3, 6, 6]
    assert all(len(shard.latencies_s) == 6 and min(shard.latencies_s.values()) > 0 for shard in (*shards, later))
    assert all(shard.progress == Progress(shard.index, 6, 12, 36) for shard in (*shards, later))
    assert executor.progress() == [] and executor.stats().seqs == 0


def test_scored_rows_are_copied_and_sampled_ones_are_not(executors: Any) -> None:
    executor, params = executors(), scoring_params(None)
    rows = [InFlightRow(i, Request("", [100, 7], params, i, [[5, 6], [8]])) for i in range(3)]
    scored, sampled = InFlightShard(0, rows), make_shard(1, [[100, 7]] * 3, temperature=1.5)
    run_all(executor, scored, sampled)
    assert scored.num_copied == 2 and scored.completions[0] == scored.completions[2]
    assert len(scored.completions[0]) == 2
    assert sampled.num_copied == 0 and len({done[0].token_ids for done in sampled.completions.values()}) > 1


def test_a_row_that_cannot_run_leaves_its_equals_their_own_errors(executors: Any) -> None:
    shard = make_shard(0, [[1] * 300, [1] * 300, [100, 7], [100, 7]])
    run_all(executors(), shard)
    errors = [shard.completions[i][0].error for i in range(4)]
    assert errors[0] == errors[1] and errors[0] is not None and errors[0][0] == "too_long"
    assert errors[2:] == [None, None] and shard.num_copied == 1


def test_rows_that_ran_out_of_time_are_each_tried(executors: Any) -> None:
    seconds = iter(range(10**6))
    executor = executors(row_timeout_s=3.0, clock=lambda: float(next(seconds)))
    shard = make_shard(0, [[100, 7]] * 3, max_tokens=200)
    assert run_all(executor, shard) == 3 and shard.num_copied == 0
    assert {done[0].error[0] for done in shard.completions.values() if done[0].error} == {"row_timeout"}


def test_a_suspect_is_computed_itself(executors: Any) -> None:
    shard = make_shard(0, [[100, 7], [100, 7], [100, 7]])
    shard.suspects = {0: Suspect(1)}
    assert run_all(executors(), shard) == 2 and shard.num_copied == 1
    assert shard.completions[0] == shard.completions[1] == shard.completions[2]
