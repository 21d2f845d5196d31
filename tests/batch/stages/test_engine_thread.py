"""EngineThread around the real engine: shards in, completions out, whatever goes wrong in between."""

import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from made_jobs import TINY

from batch.faults.quarantine import Suspect
from batch.stages.engine_thread import EngineThread
from batch.stages.shard_run import Row, ShardRun
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import JobError, UserError
from engine.params import SamplingParams
from engine.request import Completion
from engine.scoring import scoring_params


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), EngineConfig(max_num_seqs=4, max_model_len=256))


class Told:
    """What the thread tells: rows in the engine, and suspects that survived."""

    def __init__(self) -> None:
        self.journal: list[tuple[set[tuple[int, int]], bool]] = []
        self.survivors: list[tuple[int, int]] = []

    def __call__(self, rows: Collection[tuple[int, int]], *, is_alone: bool) -> None:
        self.journal.append((set(rows), is_alone))

    def survived(self, shard: int, row: int) -> None:
        self.survivors.append((shard, row))


def start(engine: Engine, told: Told | None = None) -> EngineThread:
    told = told or Told()
    return EngineThread(lambda: engine, told, told.survived)


@pytest.fixture
def thread(engine: Engine) -> Iterator[EngineThread]:
    """Ends with the test, so that the engine has one user at a time."""
    made = start(engine)
    yield made
    stop(made)


def stop(thread: EngineThread) -> None:
    thread.fail(JobError("the test is over"))
    thread.join(10)
    engine = thread.engine
    for request_id in list(engine._samples):
        engine.abort(request_id)


def shard(number: int, rows: int, first_index: int = 0, **params: Any) -> ShardRun:
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | params)
    indices = range(first_index, first_index + rows)
    return ShardRun(
        number, [Row(i, [100 + i, 7, 30 + number], sampling, stream_key=1000 * number + i) for i in indices]
    )


def run_alone(thread: EngineThread, run: ShardRun) -> None:
    """As one call of a worker."""
    thread.start(run)
    run.wait()


def run_all(thread: EngineThread, *runs: ShardRun) -> list[Exception | None]:
    """Each in a thread of its own, as Ray calls a worker."""
    failures: list[Exception | None] = [None] * len(runs)

    def call(index: int) -> None:
        try:
            run_alone(thread, runs[index])
        except Exception as failure:
            failures[index] = failure

    calls = [threading.Thread(target=call, args=(index,)) for index in range(len(runs))]
    for each in calls:
        each.start()
    for each in calls:
        each.join(60)
        assert not each.is_alive(), "a call hangs"
    return failures


def tokens(run: ShardRun) -> dict[int, list[tuple[int, ...]]]:
    return {index: [sample.token_ids for sample in samples] for index, samples in run.completions.items()}


def test_continuations_are_scored_beside_answers(engine: Engine, thread: EngineThread) -> None:
    """More rows and samples than seats; a row whose second continuation cannot run is one failed sample."""
    continuations = [[5], [6, 7], [8], [9, 10, 11], [12]]
    rows = [Row(i, [100 + i, 7], scoring_params(None), 0, continuations) for i in range(6)]
    rows.append(Row(6, [100, 7], scoring_params(None), 0, [[5], [6] * 255]))
    scoring, answering = ShardRun(0, rows), shard(1, 5)
    assert run_all(thread, scoring, answering) == [None] * 2
    assert [len(scoring.completions[i]) for i in range(7)] == [5] * 6 + [1]
    assert scoring.completions[6][0].error is not None and scoring.completions[6][0].error[0] == "too_long"
    for samples in list(scoring.completions.values())[:6]:
        assert [len(sample.prompt_logprobs or ()) for sample in samples] == [2 + len(c) for c in continuations]
    assert (scoring.prompt_tokens, scoring.generated_tokens) == (6 * (2 + 8), 0)
    assert len(answering.completions) == 5 and thread._num_seqs == 0 and not engine.has_work


def test_shards_that_run_together_answer_as_alone(engine: Engine, thread: EngineThread) -> None:
    together = [shard(n, 5, temperature=1.0) for n in range(3)]
    assert run_all(thread, *together) == [None] * 3
    for n in range(3):
        alone = shard(n, 5, temperature=1.0)
        run_alone(thread, alone)
        assert tokens(alone) == tokens(together[n])
        assert alone.completions.keys() == set(range(5))
    assert not engine.has_work


def test_shards_come_in_while_the_last_rows_of_others_run(engine: Engine) -> None:
    """Three with a long row each, and a fourth: none waits for the end of another, each until few rows wait."""
    thread, entered = start(engine), []
    long = [Row(7, [90, 7], SamplingParams(max_tokens=200, ignore_eos=True), 7)]
    runs = [ShardRun(n, [*shard(n, 7).rows, *long]) for n in range(3)] + [shard(3, 8)]
    try:
        for run in runs:
            thread.wait_for_room()
            entered.append((thread.figures().waiting_seqs, [run.done.is_set() for run in runs]))
            thread.start(run)
        runs[3].wait()
        assert [run.done.is_set() for run in runs] == [False] * 3 + [True]
        for run in runs:
            run.wait()
    finally:
        stop(thread)
    assert max(waiting for waiting, _ in entered) < 2 * engine.limits.max_num_seqs
    assert not any(done for _, dones in entered for done in dones)


def test_who_waits_for_room_is_let_go_when_the_engine_fails(engine: Engine) -> None:
    thread = start(engine)
    run = shard(0, 30, max_tokens=200)
    thread.start(run)
    calls = [threading.Thread(target=thread.wait_for_room) for _ in range(3)]
    for call in calls:
        call.start()
    time.sleep(0.05)
    assert all(call.is_alive() for call in calls), "more than eight wait, and four run at once"
    stop(thread)
    for call in calls:
        call.join(10)
        assert not call.is_alive()
    with pytest.raises(JobError, match="the test is over"):
        run.wait()


def test_rows_whose_beginning_is_cached_go_first(engine: Engine) -> None:
    """Two long beginnings by turns, and one seat: they would put each other out of a cache that holds one of them."""
    told, blocks = Told(), engine.scheduler.block_manager
    thread = EngineThread(lambda: engine, told, told.survived)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, n=4)
    rows = [Row(i, [*range(100 * (1 + i % 2), 100 * (1 + i % 2) + 48), i + 5], sampling, i) for i in range(8)]
    try:
        blocks.reset()
        run_alone(thread, ShardRun(0, rows))
    finally:
        stop(thread)
    order = [index for rows, _ in told.journal for _, index in sorted(rows)]
    assert sorted(order) == list(range(8))
    assert order[:4] == [0, 2, 4, 6], "those of the first beginning, before any of the other"


def test_a_shard_counts_its_tokens_and_time(thread: EngineThread) -> None:
    started = time.monotonic()
    run = shard(0, 5)
    run_alone(thread, run)
    assert (run.prompt_tokens, run.generated_tokens, len(run.completions)) == (15, 30, 5)
    assert 0 < run.engine_s < time.monotonic() - started
    assert run.latencies_s.keys() == set(range(5))
    assert all(0 < latency_s <= run.engine_s for latency_s in run.latencies_s.values())
    assert thread.progress() == []


def test_expert_loads_are_there_when_the_last_shard_is_done(engine: Engine, thread: EngineThread) -> None:
    before = engine.expert_tokens().sum()
    assert run_all(thread, shard(0, 5), shard(1, 9)) == [None] * 2
    tokens = thread.take_expert_tokens()
    assert tokens == engine.expert_tokens().tolist()
    assert sum(map(sum, tokens)) - before == 14 * (3 + 6 - 1) * 2 * len(tokens)
    assert thread.take_expert_tokens() is None, "each is told once"


def test_all_samples_of_a_row_come_in_order(thread: EngineThread) -> None:
    run = shard(0, 3, n=3, temperature=1.0)
    run_alone(thread, run)
    assert all(len(samples) == 3 for samples in run.completions.values())
    assert len({sample.token_ids for sample in run.completions[0]}) > 1


def test_a_row_the_engine_refuses_fails_alone(thread: EngineThread) -> None:
    run = ShardRun(0, [*shard(0, 2).rows, Row(2, [5] * 300, SamplingParams(), 0), Row(3, [10**6], SamplingParams(), 0)])
    run_alone(thread, run)
    assert [samples[0].error and samples[0].error[0] for _, samples in sorted(run.completions.items())] == [
        None, None, "too_long", "bad_token_id",
    ]  # fmt: skip


def test_a_shard_without_rows_is_done(thread: EngineThread) -> None:
    run_alone(thread, ShardRun(0, []))
    run_alone(thread, shard(1, 1))


def test_a_row_over_its_time_fails_and_the_others_go_on(engine: Engine) -> None:
    now_s = 0.0  # by the steps, of 10 ms each, however busy the machine is
    thread = EngineThread(lambda: engine, Told(), Told().survived, row_timeout_s=0.3, clock=lambda: now_s)
    slow = ShardRun(
        0, [Row(i, [100 + i], SamplingParams(max_tokens=5 if i else 250, ignore_eos=True), i) for i in range(6)]
    )
    engine_step = engine.step

    def slow_step() -> list[Any]:
        nonlocal now_s
        now_s += 0.01
        return engine_step()

    engine.step = slow_step  # type: ignore[method-assign]
    try:
        run_alone(thread, slow)
    finally:
        engine.step = engine_step  # type: ignore[method-assign]
        stop(thread)
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

    told: list[BaseException] = []
    thread = EngineThread(lambda: engine, Told(), Told().survived, broke=told.append)
    monkeypatch.setattr(engine, "step", broken)
    failures = run_all(thread, shard(0, 3), shard(1, 20), shard(2, 1))
    assert [str(failure) for failure in failures] == ["the engine failed: RuntimeError: out of memory"] * 3
    with pytest.raises(JobError, match="out of memory"):
        run_alone(thread, shard(3, 1))
    assert [str(failure) for failure in told] == ["out of memory"]
    stop(thread)


def test_a_step_that_does_not_come_back_is_a_stall_and_an_idle_engine_is_none(
    engine: Engine, thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_step, goes_on = engine.step, threading.Event()

    def stuck() -> list[Any]:
        goes_on.wait(10)
        return engine_step()

    monkeypatch.setattr(engine, "step", stuck)
    call = threading.Thread(target=run_alone, args=(thread, shard(0, 2)))
    call.start()
    time.sleep(0.3)
    assert 0.1 < thread.stalled_s < 5
    goes_on.set()
    call.join(10)
    time.sleep(0.05)
    assert thread.stalled_s == 0.0


def test_an_aborted_thread_lets_its_calls_go(engine: Engine) -> None:
    thread = start(engine)
    run = shard(0, 4, max_tokens=200)
    threading.Timer(0.05, thread.fail, (JobError("aborted"),)).start()
    with pytest.raises(JobError, match="aborted"):
        run_alone(thread, run)
    stop(thread)


def test_progress_tells_how_far_shards_are(engine: Engine) -> None:
    thread = start(engine)
    run = shard(7, 8, max_tokens=100)
    call = threading.Thread(target=run_alone, args=(thread, run))
    call.start()
    seen = []
    while call.is_alive():
        seen += thread.progress()
        time.sleep(0.005)
    stop(thread)
    assert {progress.shard for progress in seen} == {7}
    assert any(0 < progress.generated_tokens < 800 for progress in seen)
    assert [progress.rows for progress in seen] == sorted(progress.rows for progress in seen)


def test_completions_are_the_engines(engine: Engine, thread: EngineThread) -> None:
    run = shard(0, 1, logprobs=2)
    run_alone(thread, run)
    (completion,) = run.completions[0]
    assert isinstance(completion, Completion)
    assert completion.logprobs is not None and len(completion.logprobs) == 6


def test_an_engine_that_cannot_be_made() -> None:
    def make_engine() -> Engine:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        EngineThread(make_engine, Told(), Told().survived)


def test_the_engine_is_made_in_its_thread(engine: Engine) -> None:
    threads = []

    def make_engine() -> Engine:
        threads.append(threading.current_thread().name)
        return engine

    thread = EngineThread(make_engine, Told(), Told().survived)
    thread.fail(JobError("done"))
    thread.join(10)
    assert threads == ["engine"]


def test_suspects_run_alone_and_those_that_killed_twice_not_at_all(engine: Engine) -> None:
    """While another shard keeps the engine busy; the suspects' own neighbours run together."""
    told = Told()
    thread = start(engine, told)
    suspected, other = shard(5, 8), shard(6, 12)
    suspected.suspects = {2: Suspect(0), 3: Suspect(1), 7: Suspect(2)}
    assert run_all(thread, other, suspected) == [None, None]
    stop(thread)

    (condemned,) = suspected.completions.pop(7)
    assert condemned.error == ("killed_worker", "2 workers died while it was alone in them")
    rows = [completions[0] for run in (suspected, other) for completions in run.completions.values()]
    assert len(rows) == 19 and all(row.finish_reason == "length" for row in rows)
    assert told.survivors == [(5, 2), (5, 3)]
    assert [rows for rows, is_alone in told.journal if is_alone] == [{(5, 2)}, {(5, 3)}]
    in_company = [rows for rows, is_alone in told.journal if not is_alone]
    assert max(map(len, in_company)) == 4, "as many as the engine takes"
    assert not any(rows & {(5, 2), (5, 3), (5, 7)} for rows in in_company)
    assert set().union(*in_company) == {(5, i) for i in (0, 1, 4, 5, 6)} | {(6, i) for i in range(12)}
    after = [told.journal[i + 1] for i, (_, is_alone) in enumerate(told.journal) if is_alone]
    assert all(rows == set() for rows, _ in after), "a survivor is out of the journal at once"


def test_a_row_is_in_the_journal_before_it_is_in_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told, add = Told(), engine.add

    def checked(request: Any) -> None:
        run_key = divmod(request.stream_key, 1000)
        assert run_key in told.journal[-1][0]
        add(request)

    monkeypatch.setattr(engine, "add", checked)
    thread = start(engine, told)
    assert run_all(thread, shard(0, 10), shard(1, 10)) == [None, None]
    stop(thread)
    assert told.journal[-1] == (set(), False), "an idle worker has none in flight"


def test_a_suspect_that_the_engine_refuses_is_cleared(engine: Engine) -> None:
    told = Told()
    thread = start(engine, told)
    run = shard(0, 3, max_tokens=500)
    run.suspects = {1: Suspect(1)}
    run_alone(thread, run)
    stop(thread)
    assert run.completions[1][0].error is not None and run.completions[1][0].error[0] == "too_long"
    assert told.survivors == [(0, 1)]


def test_figures_while_it_runs(engine: Engine) -> None:
    thread = start(engine)
    try:
        before = thread.figures()
        assert (before.seqs, before.waiting_seqs, before.used_blocks) == (0, 0, 0)
        run = shard(0, rows=6, max_tokens=60, n=2)
        call = threading.Thread(target=run_alone, args=(thread, run))
        call.start()
        seen = []
        while call.is_alive():
            seen.append(thread.figures())
            time.sleep(0.01)
        call.join()
        full = max(seen, key=lambda one: one.waiting_seqs)
        assert full.seqs == 12 and full.waiting_seqs >= 8, "four seats"
        assert max(one.rows for one in seen) == 2, "of two samples each"
        assert max(one.used_blocks for one in seen) > 0 and seen[0].blocks == engine.limits.num_blocks
        after = thread.figures()
        assert (after.seqs, after.waiting_seqs, after.used_blocks) == (0, 0, 0)
        assert after.totals.generated_tokens - before.totals.generated_tokens == 6 * 2 * 60
        busy_s, seconds = after.totals.busy_s - before.totals.busy_s, after.at_s - before.at_s
        assert 0.3 * seconds < busy_s <= seconds
        assert all(one.totals.busy_s <= after.totals.busy_s for one in seen)
    finally:
        stop(thread)


def test_rows_that_are_refused_or_fail_at_once_do_not_stay_in_the_figures(engine: Engine) -> None:
    thread = start(engine)
    try:
        run = shard(0, rows=3, max_tokens=300)  # too long for the engine
        run.suspects = {0: Suspect(2), 1: Suspect(0)}
        run_alone(thread, run)
        assert (thread.figures().seqs, thread.figures().waiting_seqs) == (0, 0)
    finally:
        stop(thread)
