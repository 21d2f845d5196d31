"""The stage between prepare and commit, over an engine thread that only records."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytest

from moray.batch.stages.block_schemas import GENERATED, PREPARED
from moray.batch.stages.generate import Generate
from moray.batch.worker.in_flight_shard import InFlightShard
from moray.batch.worker.quarantine import Suspect
from moray.engine.errors import JobError


class Recorder:
    """Stands for ShardExecutor: ends each shard at once."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.shards: list[InFlightShard] = []
        self._failure = failure

    def wait_for_room(self) -> None:
        self.calls.append("wait_for_room")

    def start(self, shard: InFlightShard) -> None:
        self.calls.append("start")
        self.shards.append(shard)
        shard.failure = self._failure
        shard.done.set()


def make_block() -> pa.Table:
    """Return the block of a shard whose only row cannot run."""
    error = {"stage": "tokenize", "code": "empty_prompt", "message": "the prompt is empty"}
    row: dict[str, Any] = {"shard": 7, "shard_rows": 1, "part": "part-x", "source_file": "a", "source_row": 0}
    return pa.Table.from_pylist([row | {"error": error}], schema=PREPARED)


def make(recorder: Recorder, suspects: Mapping[int, Suspect] | None) -> Generate:
    def admit(shard: int) -> Mapping[int, Suspect] | None:
        recorder.calls.append(f"admit {shard}")
        return suspects

    return Generate(recorder, admit)  # type: ignore[arg-type]


def test_a_shard_is_admitted_once_there_is_room_and_run_with_its_suspects() -> None:
    recorder, suspects = Recorder(), {0: Suspect(1)}
    generated = make(recorder, suspects)(make_block())
    assert recorder.calls == ["wait_for_room", "admit 7", "start"]
    assert recorder.shards[0].suspects == suspects
    assert [row["error"]["code"] for row in generated.to_pylist()] == ["empty_prompt"]


def test_a_shard_that_may_not_start_gives_an_empty_block() -> None:
    recorder = Recorder()
    generated = make(recorder, None)(make_block())
    assert recorder.calls == ["wait_for_room", "admit 7"]
    assert generated.num_rows == 0 and generated.schema == GENERATED


def test_an_empty_block_is_passed_on_without_asking() -> None:
    recorder = Recorder()
    assert make(recorder, {})(PREPARED.empty_table()).num_rows == 0
    assert recorder.calls == []


def test_a_failure_of_the_engine_is_raised() -> None:
    with pytest.raises(JobError, match="the engine failed: ValueError: no"):
        make(Recorder(ValueError("no")), {})(make_block())
