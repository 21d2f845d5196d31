"""The ledger with a table of events, then with any order of crashes, repeated events and late events."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moray.batch.ledger import (
    MAX_WORKER_LOSSES,
    Command,
    Committed,
    Counts,
    Ended,
    Event,
    Ledger,
    Progress,
    SignalReceived,
    State,
    TimedOut,
    WorkerLost,
)
from moray.engine.errors import JobError


def commit(shard: int, ok: int, failed: int = 0, tokens: int = 0) -> Committed:
    errors = {"too_long": failed} if failed else {}
    return Committed(shard, Counts(ok, failed, prompt_tokens=tokens, generated_tokens=2 * tokens, errors=errors))


def play(ledger: Ledger, events: Sequence[Event]) -> list[list[Command]]:
    return [ledger.handle(event) for event in events]


def test_a_job_that_goes_well() -> None:
    ledger = Ledger([2, 3])
    assert ledger.state is State.PENDING
    play(ledger, [Progress(1, 1, 5, 4), commit(0, 2, tokens=10)])
    assert (ledger.state, ledger.ok, ledger.pending, ledger.rows_done) == (State.RUNNING, 2, 3, 3)
    assert (ledger.prompt_tokens, ledger.generated_tokens) == (15, 24)
    play(ledger, [commit(1, 2, 1), Ended()])
    assert (ledger.state, ledger.reason) == (State.SUCCEEDED, None)
    assert (ledger.ok, ledger.failed, ledger.pending, dict(ledger.errors)) == (4, 1, 0, {"too_long": 1})


def test_cut_rows_of_a_shard_that_ran_twice_are_counted_once() -> None:
    ledger = Ledger([2, 3], {0: Counts(2, cut=1)})
    play(ledger, [Committed(1, Counts(3, cut=3)), Committed(1, Counts(3, cut=2))])
    assert ledger.cut == 3


@pytest.mark.parametrize(
    ("events", "orders", "state", "reason"),
    [
        ([Ended("no room")], [[]], State.FAILED, "no room"),
        ([commit(0, 2), Ended()], [[], []], State.FAILED, "the pipeline ended early"),
        ([SignalReceived("SIGINT"), commit(0, 2), Ended()], [[Command.DRAIN], [], []], State.CANCELLED, "SIGINT"),
        (
            [SignalReceived("SIGINT"), SignalReceived("SIGTERM"), SignalReceived("SIGINT"), Ended("aborted")],
            [[Command.DRAIN], [Command.ABORT], [], []],
            State.CANCELLED,
            "SIGINT",
        ),
        ([TimedOut(5), Ended("aborted")], [[Command.ABORT], []], State.FAILED, "job_timeout_s (5) is over"),
        (
            [SignalReceived("SIGTERM"), TimedOut(5), Ended()],
            [[Command.DRAIN], [Command.ABORT], []],
            State.CANCELLED,
            "SIGTERM",
        ),
        # A signal that comes too late to stop anything has not cancelled the job.
        ([SignalReceived("SIGINT"), commit(0, 2), commit(1, 3), Ended()], None, State.SUCCEEDED, None),
        ([commit(0, 0, 2), commit(1, 0, 3), Ended()], None, State.FAILED, "all 5 rows failed"),
    ],
)
def test_how_a_job_ends(
    events: list[Event], orders: list[list[Command]] | None, state: State, reason: str | None
) -> None:
    ledger = Ledger([2, 3])
    given = play(ledger, events)
    assert orders is None or given == orders
    assert (ledger.state, ledger.reason) == (state, reason)


def test_too_many_failures_end_the_job_but_what_is_in_flight_commits() -> None:
    ledger = Ledger([2, 2, 2], max_failed_rows=1)
    assert play(ledger, [commit(0, 1, 1), commit(1, 1, 1), commit(2, 1, 1)]) == [[], [Command.DRAIN], []]
    ledger.handle(Ended())
    assert (ledger.state, ledger.reason) == (State.FAILED, "3 rows failed; limits.max_failed_rows is 1")


def test_a_job_with_too_many_failures_already_is_over_before_it_starts() -> None:
    there = {0: Counts(ok=1, failed=1), 1: Counts(failed=2)}
    ledger = Ledger([2, 2, 2], there, max_failed_rows=2)
    assert (ledger.state, ledger.reason) == (State.FAILED, "3 rows failed; limits.max_failed_rows is 2")
    assert (ledger.pending, ledger.handle(SignalReceived("SIGINT")), ledger.pending_shards) == (2, [], [2])
    assert Ledger([2, 2, 2], there, max_failed_rows=3).state is State.PENDING


def test_a_retry_runs_to_its_end_whatever_else_failed() -> None:
    """The rows of a retry have failed before: each row that is ok reduces their number."""
    ledger = Ledger([2, 2, 2], {0: Counts(failed=2)}, max_failed_rows=1, stops_at_limit=False)
    assert ledger.state is State.PENDING
    assert play(ledger, [commit(1, 1, 1), commit(2, 2), Ended()]) == [[], [], []]
    assert (ledger.state, ledger.reason) == (State.FAILED, "3 rows failed; limits.max_failed_rows is 1")
    broken = Ledger([2, 2], {0: Counts(failed=2)}, max_failed_rows=1, stops_at_limit=False)
    broken.handle(Ended("no room"))
    assert (broken.state, broken.reason) == (State.FAILED, "no room")


def test_one_row_is_no_plural() -> None:
    assert Ledger([2], {0: Counts(1, 1)}, max_failed_rows=0).reason == "1 row failed; limits.max_failed_rows is 0"
    assert Ledger([1], {0: Counts(0, 1)}).reason == "the only row failed"


def test_with_a_limit_every_row_may_fail() -> None:
    assert Ledger([2], {0: Counts(failed=2)}, max_failed_rows=2).state is State.SUCCEEDED


def test_a_complete_job_is_over_before_it_starts() -> None:
    ledger = Ledger([2, 3], {0: Counts(ok=2), 1: Counts(ok=2, failed=1)})
    assert (ledger.state, ledger.pending, ledger.pending_shards) == (State.SUCCEEDED, 0, [])
    assert Ledger([]).state is State.SUCCEEDED


def test_a_resumed_job_counts_what_is_there() -> None:
    ledger = Ledger([2, 3], {1: Counts(ok=3, generated_tokens=7)})
    assert (ledger.state, ledger.ok, ledger.pending_shards) == (State.PENDING, 3, [0])
    assert ledger.generated_tokens == 7


def test_a_shard_that_ran_twice_counts_as_its_last_file_says() -> None:
    ledger = Ledger([3])
    play(ledger, [commit(0, 3, tokens=4), commit(0, 2, 1, tokens=3)])
    assert (ledger.ok, ledger.failed, ledger.pending, ledger.prompt_tokens) == (2, 1, 0, 3)


def test_late_progress_of_a_committed_shard_is_ignored() -> None:
    ledger = Ledger([3, 3])
    play(ledger, [commit(0, 3), Progress(0, 2, 9, 9)])
    assert (ledger.rows_done, ledger.prompt_tokens) == (3, 0)


def test_the_progress_of_a_lost_worker_is_dropped() -> None:
    ledger = Ledger([3, 3])
    play(ledger, [Progress(0, 2, 9, 9), Progress(1, 1, 1, 1), WorkerLost("w", [0])])
    assert (ledger.rows_done, ledger.prompt_tokens) == (1, 1)


def test_a_worker_that_dies_again_and_again_ends_the_job() -> None:
    ledger = Ledger([1, 1])
    dies = [WorkerLost("a", [0])] * (MAX_WORKER_LOSSES - 1)
    assert not any(play(ledger, [*dies, WorkerLost("b", [1]), commit(0, 1), *dies]))
    assert ledger.handle(WorkerLost("a", [1])) == [Command.ABORT]
    ledger.handle(Ended("aborted"))
    assert (ledger.state, ledger.reason) == (State.FAILED, "a worker died 5 times and finished no shard in between")


@pytest.mark.parametrize("event", [commit(2, 2), commit(-1, 2), commit(0, 1)])
def test_a_commit_that_does_not_fit_the_plan_is_refused(event: Committed) -> None:
    ledger = Ledger([2, 2])
    with pytest.raises(JobError, match="the plan has"):
        ledger.handle(event)
    assert (ledger.ok, ledger.pending) == (0, 4)


class AnyOrder(RuleBasedStateMachine):
    """Workers run, die and run again; commits arrive once, twice or after the end. `files` is what is on the disk."""

    @initialize(shards=st.lists(st.integers(1, 5), max_size=6), limit=st.none() | st.integers(0, 6), data=st.data())
    def start(self, shards: list[int], limit: int | None, data: st.DataObject) -> None:
        self.shards, self.limit = shards, limit
        self.files: dict[int, Counts] = {}
        for shard in data.draw(st.sets(st.integers(0, len(shards) - 1)) if shards else st.just(set())):
            self.files[shard] = self._counts(shard, data)
        self.ledger = Ledger(shards, dict(self.files), limit)
        self.orders: list[Command] = []
        self.ended = self.ledger.state.is_final

    def _counts(self, shard: int, data: st.DataObject) -> Counts:
        failed = data.draw(st.integers(0, self.shards[shard]))
        return Counts(self.shards[shard] - failed, failed, 3 * failed, 5, errors={"e": failed} if failed else {})

    def _handle(self, event: Event) -> None:
        self.orders += self.ledger.handle(event)

    @precondition(lambda self: self.shards)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        shard = data.draw(st.integers(0, len(self.shards) - 1))
        self.files[shard] = self._counts(shard, data)
        self._handle(Committed(shard, self.files[shard]))

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(self.files)))
        self._handle(Committed(shard, self.files[shard]))

    @precondition(lambda self: self.shards)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        shard = data.draw(st.integers(0, len(self.shards) - 1))
        self._handle(Progress(shard, data.draw(st.integers(0, self.shards[shard])), 1, 1))

    @rule(worker=st.sampled_from("ab"), shards=st.lists(st.integers(0, 5), max_size=3))
    def crash(self, worker: str, shards: list[int]) -> None:
        self._handle(WorkerLost(worker, shards))

    @rule(name=st.sampled_from(["SIGINT", "SIGTERM"]))
    def signal(self, name: str) -> None:
        self._handle(SignalReceived(name))

    @rule()
    def time_out(self) -> None:
        self._handle(TimedOut(1.0))

    @rule(error=st.none() | st.just("broken"))
    def end(self, error: str | None) -> None:
        complete = len(self.files) == len(self.shards)
        self._handle(Ended(error))
        if not self.ended:
            self.ended = True
            assert (self.ledger.state is State.SUCCEEDED) <= complete
        assert self.ledger.state.is_final

    @invariant()
    def accounting_closes(self) -> None:
        ledger = self.ledger
        assert sum(self.shards) == ledger.ok + ledger.failed + ledger.pending
        assert ledger.pending >= 0
        assert ledger.ok + ledger.failed <= ledger.rows_done <= ledger.num_rows

    @invariant()
    def every_shard_counts_once(self) -> None:
        ledger = self.ledger
        assert ledger.committed == self.files
        assert ledger.ok == sum(counts.ok for counts in self.files.values())
        assert ledger.failed == sum(counts.failed for counts in self.files.values()) == ledger.errors.total()
        assert sorted([*ledger.pending_shards, *self.files]) == list(range(len(self.shards)))
        assert ledger.prompt_tokens >= sum(counts.prompt_tokens for counts in self.files.values())

    @invariant()
    def orders_come_once_and_in_turn(self) -> None:
        assert self.orders in ([], [Command.DRAIN], [Command.ABORT], [Command.DRAIN, Command.ABORT])

    @invariant()
    def the_end_is_the_end(self) -> None:
        assert self.ledger.state.is_final == self.ended


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase
