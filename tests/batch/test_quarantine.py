import pytest

from batch.quarantine import MAX_DEATHS, InFlight, Quarantine
from engine.errors import JobError


def test_all_that_was_in_flight_is_suspected_and_who_survives_is_cleared() -> None:
    quarantine = Quarantine()
    assert quarantine.suspects(3) == {}
    quarantine.blame(InFlight([(3, 0), (3, 7), (4, 1)], is_alone=False))
    assert (quarantine.suspects(3), quarantine.suspects(4)) == ({0: 0, 7: 0}, {1: 0})
    quarantine.clear((3, 0))
    assert quarantine.suspects(3) == {7: 0}
    quarantine.blame(InFlight([(3, 7)], is_alone=True))
    quarantine.blame(InFlight([(4, 1), (5, 2)], is_alone=False))  # company proves nothing
    quarantine.blame(InFlight([(3, 7)], is_alone=True))
    assert (quarantine.suspects(3), quarantine.suspects(4), quarantine.suspects(5)) == ({7: 2}, {1: 0}, {2: 0})


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
