import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moray.jobs.batches.record import NEXT, BatchRecord, BatchStatus, LineError, WrongStateError


def made(**fields: object) -> BatchRecord:
    return BatchRecord("batch_1", "me", "/v1/completions", "file-1", "24h", 86400, 100, **fields)  # type: ignore[arg-type]


class BatchStates(RuleBasedStateMachine):
    """Any order of changes: each is made, or refused and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = made()
        self.now = 100
        self.path = [BatchStatus.VALIDATING]
        self.most_done = 0

    def attempt(self, change: str, *arguments: object) -> None:
        self.now += 1
        before = self.batch
        try:
            self.batch = getattr(before, change)(*arguments)
        except WrongStateError:
            assert self.batch == before
            return
        if self.batch.status is not before.status:
            self.path.append(self.batch.status)
        assert self.batch.completed >= before.completed and self.batch.failed >= before.failed
        assert self.batch.input_tokens >= before.input_tokens

    @rule()
    def reject(self) -> None:
        self.attempt("reject", (LineError("empty_file", "x"),), self.now)

    @rule(total=st.integers(1, 20))
    def start(self, total: int) -> None:
        self.attempt("start", total, "tiny", self.now)

    @rule(completed=st.integers(0, 12), failed=st.integers(0, 12))
    def count(self, completed: int, failed: int) -> None:
        if completed >= self.batch.completed and failed >= self.batch.failed:  # as a ledger counts
            self.attempt("count", completed, failed, 2 * completed, completed)

    @rule()
    def finalize(self) -> None:
        self.attempt("finalize", self.now)

    @rule()
    def cancel(self) -> None:
        self.attempt("cancel", self.now)

    @rule()
    def end(self) -> None:
        self.attempt("end", self.now, "file-2", None)

    @invariant()
    def states_follow_each_other(self) -> None:
        for before, after in zip(self.path, self.path[1:], strict=False):
            assert after in NEXT[before]

    @invariant()
    def counts_close(self) -> None:
        batch = self.batch
        done = batch.completed + batch.failed
        assert done == batch.total if batch.status.is_final else done <= batch.total

    @invariant()
    def times_say_what_happened(self) -> None:
        batch = self.batch
        assert (batch.ended_at is not None) == batch.status.is_final
        named = {status for status in BatchStatus if getattr(batch, f"{status}_at", None) is not None}
        assert named == {status for status in self.path if status is not BatchStatus.VALIDATING}
        assert batch.status.is_final or batch.output_file_id is None

    @invariant()
    def it_survives_its_file(self) -> None:
        assert BatchRecord.from_object(json.loads(self.batch.to_json())) == self.batch
        assert self.batch.to_object()["status"] == self.path[-1]


TestBatchStates = BatchStates.TestCase
TestBatchStates.settings = settings(max_examples=50)


@given(st.sampled_from([status for status in BatchStatus if status.is_final]))
def test_nothing_follows_a_final_state(status: BatchStatus) -> None:
    batch = made(status=status)
    changes = (
        lambda: batch.reject((LineError("a", "b"),), 1),
        lambda: batch.start(1, "m", 1),
        lambda: batch.count(0, 0, 0, 0),
        lambda: batch.finalize(1),
        lambda: batch.cancel(1),
        lambda: batch.end(1, None, None),
    )
    for change in changes:
        with pytest.raises(WrongStateError, match=f"batch_1 is {status}"):
            change()


def test_the_object_of_a_rejected_batch() -> None:
    batch = made().reject((LineError("invalid_url", "wrong", "url", 7),), 120)
    value = batch.to_object()
    error = {"code": "invalid_url", "message": "wrong", "param": "url", "line": 7}
    assert value["errors"] == {"object": "list", "data": [error]}
    assert (value["failed_at"], value["expires_at"], value["model"]) == (120, 86500, None)


def test_fields_of_another_version() -> None:
    values = json.loads(made().to_json()) | {"shelf": 5}
    del values["output_file_id"]
    assert BatchRecord.from_object(values) == made()
