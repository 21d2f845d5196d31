import pytest

from batch.faults.quarantine import MAX_DEATHS, Ending, InFlight, Quarantine
from engine.errors import JobError


def strikes(quarantine: Quarantine, shard: int) -> dict[int, int]:
    return {row: suspect.strikes for row, suspect in quarantine.suspects(shard).items()}


def test_all_that_was_in_flight_is_suspected_and_who_survives_is_cleared() -> None:
    quarantine = Quarantine()
    assert quarantine.suspects(3) == {}
    quarantine.blame(InFlight([(3, 0), (3, 7), (4, 1)], is_alone=False))
    assert (strikes(quarantine, 3), strikes(quarantine, 4)) == ({0: 0, 7: 0}, {1: 0})
    quarantine.clear((3, 0))
    assert strikes(quarantine, 3) == {7: 0}
    quarantine.blame(InFlight([(3, 7)], is_alone=True))
    quarantine.blame(InFlight([(4, 1), (5, 2)], is_alone=False))  # company proves nothing
    quarantine.blame(InFlight([(3, 7)], is_alone=True))
    assert tuple(strikes(quarantine, shard) for shard in (3, 4, 5)) == ({7: 2}, {1: 0}, {2: 0})


def test_where_everything_dies_it_is_not_the_rows() -> None:
    quarantine = Quarantine()
    for death in range(MAX_DEATHS):
        quarantine.blame(InFlight([(0, death // 2)], is_alone=True))
    with pytest.raises(JobError, match="workers died 11 times with one row alone in them, and none survived"):
        quarantine.blame(InFlight([(0, 50)], is_alone=True))


def test_a_survivor_shows_that_the_worker_can_work() -> None:
    quarantine = Quarantine()
    for death in range(5 * MAX_DEATHS):
        quarantine.blame(InFlight([(0, death // 2)], is_alone=True))
        if death % MAX_DEATHS == 0:
            quarantine.clear((1, death))


def test_a_guilty_row_says_how_its_last_worker_ended() -> None:
    quarantine = Quarantine()
    hung, failed = Ending.hung("no step came back in 12 s"), Ending.failed("RuntimeError: out of memory")
    quarantine.blame(InFlight([(0, 1), (0, 2), (0, 3)], is_alone=False), failed)
    assert not any(suspect.is_guilty for suspect in quarantine.suspects(0).values())
    for row, ending in ((1, hung), (2, failed)):
        for _ in range(2):
            quarantine.blame(InFlight([(0, row)], is_alone=True), ending)
    found = {row: (suspect.is_guilty, suspect.ending.code) for row, suspect in quarantine.suspects(0).items()}
    assert found == {1: (True, "row_timeout"), 2: (True, "engine_failed"), 3: (False, "killed_worker")}
    assert [suspect.message for suspect in quarantine.suspects(0).values()][:2] == [
        "2 workers hung while it was alone in them: no step came back in 12 s",
        "2 workers failed while it was alone in them: RuntimeError: out of memory",
    ]


def test_an_engine_that_is_broken_for_good_is_not_the_rows_either() -> None:
    quarantine = Quarantine()
    with pytest.raises(JobError) as error:
        for death in range(MAX_DEATHS + 1):
            quarantine.blame(InFlight([(0, death // 2)], is_alone=True), Ending.failed("RuntimeError: no driver"))
    assert str(error.value).startswith("workers failed 11 times with one row alone in them, and none survived")
    assert "it is the worker, not the rows (RuntimeError: no driver)" in str(error.value)
