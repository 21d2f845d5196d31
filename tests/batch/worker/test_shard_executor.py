"""ShardExecutor with the real engine: shards in, completions out, with every kind of failure in between."""

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest
from held_steps import HeldSteps, wait_for
from made_jobs import TINY
from patience import PATIENCE_S

from moray.batch.ledger import Progress
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.batch.worker.quarantine import Suspect
from moray.batch.worker.shard_executor import ShardExecutor
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import JobError, UserError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request
from moray.engine.sampling.scoring import scoring_params
from moray.engine.structured.constraint import Structured


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), EngineConfig(max_num_seqs=4, max_model_len=256))


class Recorder:
    """Records what the executor reports: the rows in the engine, and the suspects that it survived."""

    def __init__(self) -> None:
        self.journal: list[tuple[set[tuple[int, int]], bool]] = []
        self.survivors: list[tuple[int, int]] = []

    def __call__(self, rows: Collection[tuple[int, int]], *, is_trial: bool) -> None:
        self.journal.append((set(rows), is_trial))

    def on_cleared(self, shard: int, row: int) -> None:
        self.survivors.append((shard, row))


def start(engine: Engine, recorder: Recorder | None = None) -> ShardExecutor:
    recorder = recorder or Recorder()
    return ShardExecutor(lambda: engine, recorder, recorder.on_cleared)


@pytest.fixture
def executor(engine: Engine) -> Iterator[ShardExecutor]:
    """Yield an executor that ends with the test, so that the engine has one user at a time."""
    made = start(engine)
    yield made
    stop(made)


def stop(executor: ShardExecutor) -> None:
    executor.fail(JobError("the test is over"))
    executor.join(PATIENCE_S)
    engine = executor.engine
    for request_id in list(engine._samples):
        engine.abort(request_id)


def make_row(
    index: int,
    prompt: Sequence[int],
    params: SamplingParams,
    stream_key: int,
    continuations: Sequence[Sequence[int]] = (),
) -> InFlightRow:
    return InFlightRow(index, Request("", prompt, params, stream_key, continuations))


def shard(number: int, rows: int, first_index: int = 0, **params: Any) -> InFlightShard:
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | params)
    indices = range(first_index, first_index + rows)
    return InFlightShard(
        number, [make_row(i, [100 + i, 7, 30 + number], sampling, stream_key=1000 * number + i) for i in indices]
    )


def test_what_completions_must_obey_is_compiled_outside_of_the_engine(
    engine: Engine, executor: ShardExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose grammar is refused leaves the others alone."""
    compiled: list[tuple[str, str]] = []
    compile_one = engine._grammars._compile
    monkeypatch.setattr(
        engine._grammars,
        "_compile",
        lambda structured: (
            compiled.append((structured.text, threading.current_thread().name)),
            compile_one(structured),
        )[1],
    )
    choice, bad = Structured.from_value("choice", ["yes", "no"]), Structured.from_value("json_schema", {"not": {}})
    run = shard(1, 4, structured=choice, ignore_eos=False, max_tokens=20)
    refused = SamplingParams(structured=bad)
    run = InFlightShard(1, [*run.rows, make_row(4, [5, 6], refused, stream_key=1)])
    run_alone(executor, run)
    here = threading.current_thread().name
    assert sorted(compiled) == sorted([(choice.text, here), (bad.text, here)])
    assert engine.tokenizer is not None
    texts = {engine.tokenizer.decode(run.completions[i][0].token_ids) for i in range(4)}
    assert texts <= {"yes", "no"}
    (completion,) = run.completions[4]
    assert completion.error is not None and completion.error[0] == "bad_grammar"


def run_alone(executor: ShardExecutor, run: InFlightShard) -> None:
    """Run a shard as one call of a worker does."""
    executor.start(run)
    run.wait()


def run_all(executor: ShardExecutor, *runs: InFlightShard) -> list[Exception | None]:
    """Run each shard in a thread of its own, as Ray calls a worker; return the exception of each."""
    failures: list[Exception | None] = [None] * len(runs)

    def call(index: int) -> None:
        try:
            run_alone(executor, runs[index])
        except Exception as failure:
            failures[index] = failure

    calls = [threading.Thread(target=call, args=(index,)) for index in range(len(runs))]
    for each in calls:
        each.start()
    for each in calls:
        each.join(PATIENCE_S)
        assert not each.is_alive(), "a call hangs"
    return failures


def tokens(run: InFlightShard) -> dict[int, list[tuple[int, ...]]]:
    return {index: [sample.token_ids for sample in samples] for index, samples in run.completions.items()}


def test_continuations_are_scored_along_with_answers(engine: Engine, executor: ShardExecutor) -> None:
    """There are more rows and samples than the engine runs at once; a row that cannot run is one failed sample."""
    continuations = [[5], [6, 7], [8], [9, 10, 11], [12]]
    rows = [make_row(i, [100 + i, 7], scoring_params(None), 0, continuations) for i in range(6)]
    rows.append(make_row(6, [100, 7], scoring_params(None), 0, [[5], [6] * 255]))
    scoring, answering = InFlightShard(0, rows), shard(1, 5)
    assert run_all(executor, scoring, answering) == [None] * 2
    assert [len(scoring.completions[i]) for i in range(7)] == [5] * 6 + [1]
    assert scoring.completions[6][0].error is not None and scoring.completions[6][0].error[0] == "too_long"
    for samples in list(scoring.completions.values())[:6]:
        assert [len(sample.prompt_logprobs or ()) for sample in samples] == [2 + len(c) for c in continuations]
    assert (scoring.prompt_tokens, scoring.generated_tokens) == (6 * (2 + 8), 0)
    assert len(answering.completions) == 5 and executor._num_seqs == 0 and not engine.has_work


def test_shards_that_run_together_answer_as_alone(engine: Engine, executor: ShardExecutor) -> None:
    together = [shard(n, 5, temperature=1.0) for n in range(3)]
    assert run_all(executor, *together) == [None] * 3
    for n in range(3):
        alone = shard(n, 5, temperature=1.0)
        run_alone(executor, alone)
        assert tokens(alone) == tokens(together[n])
        assert alone.completions.keys() == set(range(5))
    assert not engine.has_work


def test_shards_come_in_while_the_last_rows_of_others_run(engine: Engine) -> None:
    """Three shards have a long row each.

    None of four shards waits for the end of another one, and each waits until few rows are queued.
    """
    executor, entered = start(engine), []
    long = [make_row(7, [90, 7], SamplingParams(max_tokens=200, ignore_eos=True), 7)]
    runs = [InFlightShard(n, [*shard(n, 7).rows, *long]) for n in range(3)] + [shard(3, 8)]
    try:
        for run in runs:
            executor.wait_for_room()
            entered.append((executor.stats().waiting_seqs, [run.done.is_set() for run in runs]))
            executor.start(run)
        runs[3].wait()
        assert [run.done.is_set() for run in runs] == [False] * 3 + [True]
        for run in runs:
            run.wait()
    finally:
        stop(executor)
    assert max(waiting for waiting, _ in entered) < 2 * engine.limits.max_num_seqs
    assert not any(done for _, dones in entered for done in dones)


def test_a_wait_for_room_ends_when_the_engine_fails(engine: Engine) -> None:
    executor, run, was_failed = start(engine), shard(0, 30, max_tokens=200), []

    def wait() -> None:
        executor.wait_for_room()
        was_failed.append(executor._failure is not None)

    with HeldSteps(engine) as steps:
        executor.start(run)
        steps.wait_until_held()
        steps.run()
        assert executor.stats().waiting_seqs == 26, "more than eight wait, and four run at once"
        calls = [threading.Thread(target=wait) for _ in range(3)]
        for call in calls:
            call.start()
        executor.fail(JobError("the test is over"))
        for call in calls:
            call.join(PATIENCE_S)
    stop(executor)
    assert was_failed == [True] * 3
    with pytest.raises(JobError, match="the test is over"):
        run.wait()


def test_rows_whose_beginning_is_cached_go_first(engine: Engine) -> None:
    """Two long prefixes alternate, and one row runs at once.

    They would evict each other from a cache that holds one of them.
    """
    recorder = Recorder()
    executor = ShardExecutor(lambda: engine, recorder, recorder.on_cleared)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, n=4)
    rows = [make_row(i, [*range(100 * (1 + i % 2), 100 * (1 + i % 2) + 48), i + 5], sampling, i) for i in range(8)]
    try:
        engine.reset_prefix_cache()
        run_alone(executor, InFlightShard(0, rows))
    finally:
        stop(executor)
    order = [index for rows, _ in recorder.journal for _, index in sorted(rows)]
    assert sorted(order) == list(range(8))
    assert order[:4] == [0, 2, 4, 6], "rows of the first prefix, before any of the other"


def test_a_shard_counts_its_tokens_and_time(executor: ShardExecutor) -> None:
    started = time.monotonic()
    run = shard(0, 5)
    run_alone(executor, run)
    assert (run.prompt_tokens, run.generated_tokens, len(run.completions)) == (15, 30, 5)
    assert 0 < run.engine_s < time.monotonic() - started
    assert run.latencies_s.keys() == set(range(5))
    assert all(0 < latency_s < time.monotonic() - started for latency_s in run.latencies_s.values())
    assert executor.progress() == []


def test_expert_loads_are_there_when_the_last_shard_is_done(engine: Engine, executor: ShardExecutor) -> None:
    before = engine.expert_tokens().sum()
    assert run_all(executor, shard(0, 5), shard(1, 9)) == [None] * 2
    tokens = executor.pop_expert_tokens()
    assert tokens == engine.expert_tokens().tolist()
    assert sum(map(sum, tokens)) - before == 14 * (3 + 6 - 1) * 2 * len(tokens)
    assert executor.pop_expert_tokens() is None, "each is returned once"


def test_all_samples_of_a_row_come_in_order(executor: ShardExecutor) -> None:
    run = shard(0, 3, n=3, temperature=1.0)
    run_alone(executor, run)
    assert all(len(samples) == 3 for samples in run.completions.values())
    assert len({sample.token_ids for sample in run.completions[0]}) > 1


def test_a_row_the_engine_refuses_fails_alone(executor: ShardExecutor) -> None:
    run = InFlightShard(
        0,
        [
            *shard(0, 2).rows,
            make_row(2, [5] * 300, SamplingParams(), 0),
            make_row(3, [10**6], SamplingParams(), 0),
        ],
    )
    run_alone(executor, run)
    assert [samples[0].error and samples[0].error[0] for _, samples in sorted(run.completions.items())] == [
        None, None, "too_long", "bad_token_id",
    ]  # fmt: skip


def test_a_shard_without_rows_is_done(executor: ShardExecutor) -> None:
    run_alone(executor, InFlightShard(0, []))
    run_alone(executor, shard(1, 1))


def test_a_row_over_its_time_fails_and_the_others_go_on(engine: Engine) -> None:
    now_s = 0.0  # by the steps, of 10 ms each, however busy the machine is
    executor = ShardExecutor(lambda: engine, Recorder(), Recorder().on_cleared, row_timeout_s=0.3, clock=lambda: now_s)
    slow = InFlightShard(
        0, [make_row(i, [100 + i], SamplingParams(max_tokens=5 if i else 250, ignore_eos=True), i) for i in range(6)]
    )
    engine_step = engine.step

    def slow_step() -> list[Any]:
        nonlocal now_s
        now_s += 0.01
        return engine_step()

    engine.step = slow_step  # type: ignore[method-assign]
    try:
        run_alone(executor, slow)
    finally:
        engine.step = engine_step  # type: ignore[method-assign]
        stop(executor)
    (late,) = slow.completions[0]
    assert late.error is not None and late.error[0] == "row_timeout"
    assert "row_timeout_s is 0.3" in late.error[1]
    assert [slow.completions[i][0].finish_reason for i in range(1, 6)] == ["length"] * 5
    assert not engine.has_work


def test_an_exception_in_the_engine_fails_every_shard_and_those_to_come(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Any]:
        raise RuntimeError("out of memory")

    reported: list[BaseException] = []
    executor = ShardExecutor(lambda: engine, Recorder(), Recorder().on_cleared, on_failure=reported.append)
    monkeypatch.setattr(engine, "step", broken)
    failures = run_all(executor, shard(0, 3), shard(1, 20), shard(2, 1))
    assert [str(failure) for failure in failures] == ["the engine failed: RuntimeError: out of memory"] * 3
    with pytest.raises(JobError, match="out of memory"):
        run_alone(executor, shard(3, 1))
    assert [str(failure) for failure in reported] == ["out of memory"]
    stop(executor)


def test_a_step_that_does_not_come_back_is_a_stall(engine: Engine) -> None:
    now_s = 0.0
    executor = ShardExecutor(lambda: engine, Recorder(), Recorder().on_cleared, clock=lambda: now_s)
    assert executor.stalled_s == 0.0
    with HeldSteps(engine) as steps:
        executor.start(run := shard(0, 2))
        steps.wait_until_held()
        now_s = 3.0
        assert executor.stalled_s == 3.0
    run.wait()
    stop(executor)


def test_an_aborted_executor_lets_its_calls_go(engine: Engine) -> None:
    executor, run = start(engine), shard(0, 4, max_tokens=200)
    with HeldSteps(engine) as steps:
        executor.start(run)
        steps.wait_until_held()
        executor.fail(JobError("aborted"))
        with pytest.raises(JobError, match="aborted"):
            run.wait()
    stop(executor)


def test_progress_shows_how_far_shards_are(engine: Engine, executor: ShardExecutor) -> None:
    run = shard(7, 8, max_tokens=100)
    with HeldSteps(engine) as steps:
        executor.start(run)
        steps.wait_until_held()
        assert executor.progress() == [Progress(7, rows=0, prompt_tokens=12, generated_tokens=0)]
        steps.run(3)
        assert executor.progress() == [Progress(7, rows=0, prompt_tokens=12, generated_tokens=12)]
        steps.run(100)
        assert executor.progress() == [Progress(7, rows=4, prompt_tokens=24, generated_tokens=412)]
    run.wait()
    assert executor.progress() == [] and run.generated_tokens == 800


def test_completions_are_the_engines(engine: Engine, executor: ShardExecutor) -> None:
    run = shard(0, 1, logprobs=2)
    run_alone(executor, run)
    (completion,) = run.completions[0]
    assert isinstance(completion, Completion)
    assert completion.logprobs is not None and len(completion.logprobs) == 6


def test_an_engine_that_cannot_be_made() -> None:
    def make_engine() -> Engine:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        ShardExecutor(make_engine, Recorder(), Recorder().on_cleared)


def test_the_engine_is_made_in_its_thread(engine: Engine) -> None:
    threads = []

    def make_engine() -> Engine:
        threads.append(threading.current_thread().name)
        return engine

    executor = ShardExecutor(make_engine, Recorder(), Recorder().on_cleared)
    executor.fail(JobError("done"))
    executor.join(PATIENCE_S)
    assert threads == ["engine"]


def test_suspects_run_by_groups_and_those_that_killed_twice_not_at_all(engine: Engine) -> None:
    """Another shard keeps the engine busy; the other rows of the suspects' shard run together."""
    recorder = Recorder()
    executor = start(engine, recorder)
    suspected, other = shard(5, 8), shard(6, 12)
    suspected.suspects = {1: Suspect(8), 2: Suspect(9), 3: Suspect(5, 1), 4: Suspect(8), 7: Suspect(6, 2)}
    assert run_all(executor, other, suspected) == [None, None]
    stop(executor)

    (condemned,) = suspected.completions.pop(7)
    assert condemned.error == ("killed_worker", "2 workers died while it was alone in them")
    rows = [completions[0] for run in (suspected, other) for completions in run.completions.values()]
    assert len(rows) == 19 and all(row.finish_reason == "length" for row in rows)
    assert recorder.survivors == [(5, 2), (5, 3), (5, 1), (5, 4)], "small groups first"
    assert [rows for rows, is_trial in recorder.journal if is_trial] == [{(5, 2)}, {(5, 3)}, {(5, 1), (5, 4)}]
    in_company = [rows for rows, is_trial in recorder.journal if not is_trial]
    assert max(map(len, in_company)) == 4, "as many as the engine runs at once"
    assert not any(rows & {(5, 1), (5, 2), (5, 3), (5, 4), (5, 7)} for rows in in_company)
    assert set().union(*in_company) == {(5, i) for i in (0, 5, 6)} | {(6, i) for i in range(12)}
    after = [recorder.journal[i + 1] for i, (_, is_trial) in enumerate(recorder.journal) if is_trial]
    assert all(rows == set() for rows, _ in after), "survivors are out of the journal at once"


def test_a_row_is_in_the_journal_before_it_is_in_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, add = Recorder(), engine.add

    def checked(request: Any) -> None:
        run_key = divmod(request.stream_key, 1000)
        assert run_key in recorder.journal[-1][0]
        add(request)

    monkeypatch.setattr(engine, "add", checked)
    executor = start(engine, recorder)
    assert run_all(executor, shard(0, 10), shard(1, 10)) == [None, None]
    wait_for(lambda: recorder.journal[-1] == (set(), False))  # an idle worker has none in flight
    stop(executor)


def test_a_suspect_that_the_engine_refuses_is_cleared(engine: Engine) -> None:
    recorder = Recorder()
    executor = start(engine, recorder)
    run = shard(0, 3, max_tokens=500)
    run.suspects = {1: Suspect(1, 1)}
    run_alone(executor, run)
    stop(executor)
    assert run.completions[1][0].error is not None and run.completions[1][0].error[0] == "too_long"
    assert recorder.survivors == [(0, 1)]


def test_stats_while_it_runs(engine: Engine, executor: ShardExecutor) -> None:
    before = executor.stats()
    assert (before.rows, before.seqs, before.waiting_seqs, before.used_blocks) == (0, 0, 0, 0)
    run = shard(0, rows=6, max_tokens=60, n=2)
    with HeldSteps(engine) as steps:
        executor.start(run)
        steps.wait_until_held()
        steps.run()
        full = executor.stats()
    assert (full.rows, full.seqs, full.waiting_seqs) == (2, 12, 8), "the engine runs four samples at once"
    assert full.used_blocks > 0 and full.blocks == engine.limits.num_blocks
    run.wait()
    after = executor.stats()
    assert (after.rows, after.seqs, after.waiting_seqs, after.used_blocks) == (0, 0, 0, 0)
    assert after.totals.generated_tokens - before.totals.generated_tokens == 6 * 2 * 60
    assert before.totals.busy_s < full.totals.busy_s < after.totals.busy_s
    assert before.at_s < full.at_s < after.at_s


def test_rows_that_are_refused_or_fail_at_once_do_not_stay_in_the_stats(engine: Engine) -> None:
    executor = start(engine)
    try:
        run = shard(0, rows=3, max_tokens=300)  # too long for the engine
        run.suspects = {0: Suspect(1, 2), 1: Suspect(2)}
        run_alone(executor, run)
        assert (executor.stats().seqs, executor.stats().waiting_seqs) == (0, 0)
    finally:
        stop(executor)
