"""When a worker counts as hung, and how often something is done about it."""

from dataclasses import replace

import pytest

from moray.batch.runtime.hang_detector import MIN_STALL_S, REPORT_AFTER_S, HangDetector, StalledWorker

STALL = StalledWorker("a", "node", 7, "123", 0.0)


def acted(watchdog: HangDetector, *seconds: float) -> list[float]:
    return [stall.seconds for s in seconds for stall in watchdog.check([replace(STALL, seconds=s)])]


@pytest.mark.parametrize(("limit_s", "first_s"), [(60.0, 60.0), (0.2, MIN_STALL_S), (None, REPORT_AFTER_S)])
def test_it_waits_as_long_as_a_row_may_take(limit_s: float | None, first_s: float) -> None:
    watchdog = HangDetector(limit_s)
    assert watchdog.kills_workers is (limit_s is not None)
    assert acted(watchdog, first_s - 0.1, first_s, first_s + 1, 2 * first_s - 0.1, 2 * first_s) == [
        first_s,
        2 * first_s,
    ]


def test_a_process_that_came_after_is_another_one() -> None:
    watchdog = HangDetector(20.0)
    assert acted(watchdog, 21.0, 22.0) == [21.0]
    (stall,) = watchdog.check([replace(STALL, pid=8, seconds=20.5), replace(STALL, seconds=30.0)])
    assert stall.pid == 8


def test_the_reason_names_the_limit() -> None:
    stall = replace(STALL, seconds=31.4)
    assert HangDetector(30.0).reason(stall) == "no step came back in 31 s; limits.row_timeout_s is 30"
    assert HangDetector(None).reason(stall) == "no step came back in 31 s"
