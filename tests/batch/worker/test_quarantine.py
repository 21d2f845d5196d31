"""Which rows are suspects, which are cleared, and how many workers end until a bad row is found."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.batch.worker.quarantine import (
    MAX_CONSECUTIVE_SOLO_CRASHES,
    MAX_SOLO_CRASHES,
    Quarantine,
    RowId,
    RowsInFlight,
    WorkerExit,
)
from moray.engine.errors import JobError


def solo_crashes(quarantine: Quarantine, shard: int) -> dict[int, int]:
    return {row: suspect.solo_crashes for row, suspect in quarantine.suspects(shard).items()}


def test_all_rows_in_flight_are_suspects_and_survivors_are_cleared() -> None:
    quarantine = Quarantine()
    assert quarantine.suspects(3) == {}
    quarantine.record_crash(RowsInFlight([(3, 0), (3, 7), (4, 1)], is_trial=False))
    assert (solo_crashes(quarantine, 3), solo_crashes(quarantine, 4)) == ({0: 0, 7: 0}, {1: 0})
    quarantine.clear((3, 0))
    assert solo_crashes(quarantine, 3) == {7: 0}
    quarantine.record_crash(RowsInFlight([(3, 7)], is_trial=True))
    quarantine.record_crash(RowsInFlight([(4, 1), (5, 2)], is_trial=False))  # among other rows a crash proves nothing
    quarantine.record_crash(RowsInFlight([(3, 7)], is_trial=True))
    assert tuple(solo_crashes(quarantine, shard) for shard in (3, 4, 5)) == ({7: 2}, {1: 0}, {2: 0})


def test_where_everything_dies_it_is_not_the_rows() -> None:
    quarantine = Quarantine()
    for death in range(MAX_CONSECUTIVE_SOLO_CRASHES):
        quarantine.record_crash(RowsInFlight([(0, death // 2)], is_trial=True))
    with pytest.raises(JobError, match="workers died 11 times with one row alone in them, and none survived"):
        quarantine.record_crash(RowsInFlight([(0, 50)], is_trial=True))


def test_a_survivor_shows_that_the_worker_can_work() -> None:
    quarantine = Quarantine()
    for death in range(5 * MAX_CONSECUTIVE_SOLO_CRASHES):
        quarantine.record_crash(RowsInFlight([(0, death // 2)], is_trial=True))
        if death % MAX_CONSECUTIVE_SOLO_CRASHES == 0:
            quarantine.clear((1, death))


def test_a_poison_row_records_how_its_last_worker_ended() -> None:
    quarantine = Quarantine()
    hung, failed = WorkerExit.hung("no step came back in 12 s"), WorkerExit.failed("RuntimeError: out of memory")
    quarantine.record_crash(RowsInFlight([(0, 1), (0, 2), (0, 3)], is_trial=False), failed)
    assert not any(suspect.is_poison for suspect in quarantine.suspects(0).values())
    for row, ending in ((1, hung), (2, failed)):
        for _ in range(2):
            quarantine.record_crash(RowsInFlight([(0, row)], is_trial=True), ending)
    found = {row: (suspect.is_poison, suspect.worker_exit.code) for row, suspect in quarantine.suspects(0).items()}
    assert found == {1: (True, "row_timeout"), 2: (True, "engine_failed"), 3: (False, "killed_worker")}
    assert [suspect.message for suspect in quarantine.suspects(0).values()][:2] == [
        "2 workers hung while it was alone in them: no step came back in 12 s",
        "2 workers failed while it was alone in them: RuntimeError: out of memory",
    ]


def test_an_engine_that_is_broken_for_good_is_not_the_rows_either() -> None:
    quarantine = Quarantine()
    with pytest.raises(JobError) as error:
        for death in range(MAX_CONSECUTIVE_SOLO_CRASHES + 1):
            quarantine.record_crash(
                RowsInFlight([(0, death // 2)], is_trial=True), WorkerExit.failed("RuntimeError: no driver")
            )
    assert str(error.value).startswith("workers failed 11 times with one row alone in them, and none survived")
    assert "it is the worker, not the rows (RuntimeError: no driver)" in str(error.value)


class Worker:
    """Runs the suspects as ShardExecutor does, the smallest group first; a group with a bad row in it ends the worker.

    trials:  the rows of each group that was tried, in order, and whether the worker survived
    """

    def __init__(self, num_rows: int, bad: set[RowId], rows_a_shard: int = 100) -> None:
        self.rows = [divmod(n, rows_a_shard) for n in range(num_rows)]
        self.bad = bad
        self.quarantine = Quarantine()
        self.trials: list[tuple[list[RowId], bool]] = []

    def run(self) -> set[RowId]:
        """Run all rows together, then the suspects until none is left; return the poison rows."""
        if not self.bad & set(self.rows):
            return set()
        self.quarantine.record_crash(RowsInFlight(self.rows, is_trial=False))
        while groups := self._groups():
            rows = min(groups.values(), key=len)
            lived = not self.bad & set(rows)
            self.trials.append((rows, lived))
            if lived:
                for row in rows:
                    self.quarantine.clear(row)
            else:
                self.quarantine.record_crash(RowsInFlight(rows, is_trial=True))
        return {(shard, row) for shard, row, suspect in self._suspects() if suspect.is_poison}

    def _suspects(self) -> list[tuple[int, int, object]]:
        shards = {shard for shard, _ in self.rows}
        return [(shard, row, one) for shard in shards for row, one in self.quarantine.suspects(shard).items()]

    def _groups(self) -> dict[int, list[RowId]]:
        groups: dict[int, list[RowId]] = {}
        for shard, row, suspect in self._suspects():
            if not suspect.is_poison:
                groups.setdefault(suspect.group, []).append((shard, row))
        return groups


@pytest.mark.parametrize("bad", [(0, 0), (1, 27), (2, 55), (1, 56)])
def test_one_bad_row_among_256_is_found_by_halves(bad: RowId) -> None:
    worker = Worker(256, {bad})
    assert worker.run() == {bad}
    ends = [rows for rows, lived in worker.trials if not lived]
    assert len(ends) == 8 - 1 + MAX_SOLO_CRASHES, "halves of 256 down to 1, and once more alone"
    assert len(worker.trials) <= 2 * 8 + MAX_SOLO_CRASHES
    assert sum(len(rows) for rows, lived in worker.trials if lived) == 255, "each neighbour runs once more"


def test_a_failure_that_does_not_come_back_costs_two_trials() -> None:
    quarantine = Quarantine()
    quarantine.record_crash(RowsInFlight([(0, row) for row in range(256)], is_trial=False))
    sizes: dict[int, int] = {}
    for suspect in quarantine.suspects(0).values():
        sizes[suspect.group] = sizes.get(suspect.group, 0) + 1
    assert sorted(sizes.values()) == [128, 128]


@given(num_rows=st.integers(1, 300), bad=st.sets(st.integers(0, 299), max_size=4))
def test_exactly_the_bad_rows_are_given_up_and_only_after_they_were_alone(num_rows: int, bad: set[int]) -> None:
    rows = {divmod(n, 100) for n in bad if n < num_rows}
    worker = Worker(num_rows, rows)
    assert worker.run() == rows
    for row in rows:
        assert worker.trials.count(([row], False)) == MAX_SOLO_CRASHES, "twice alone, no more and no less"
    depth = math.ceil(math.log2(num_rows)) + MAX_SOLO_CRASHES
    assert sum(not lived for _, lived in worker.trials) <= max(1, len(rows)) * depth
