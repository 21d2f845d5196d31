"""EtaEstimator and ThroughputMeter: how fast a job is, and when it will be over. Pure."""

from collections import deque
from dataclasses import dataclass
from math import sqrt

from moray.batch.student_t import student_t

WINDOW_S = 30.0  # seconds over which the present speed is measured
# blocks that the run so far is divided into; with fewer than MIN_BLOCKS there is no range
MIN_BLOCKS, MAX_BLOCKS = 4, 16
CONFIDENCE = 0.9  # of the range of the time left
TREND_HORIZON = 2.0  # a trend is expected to go on for at most this many times as long as it has been seen


@dataclass(frozen=True)
class TimeLeft:
    """Holds the estimated time to the end of a job, in seconds.

    low_s, high_s:  its range; None = there is too little data for one
    """

    seconds: float
    low_s: float | None = None
    high_s: float | None = None


class ThroughputMeter:
    """Measures prompt and generated tokens per second over the last WINDOW_S."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque()

    def mark(self, time_s: float, prompt_tokens: int, generated_tokens: int) -> None:
        """Record the totals at a time. Totals that fell, because a worker died, start the window anew."""
        if self._marks and (prompt_tokens < self._marks[-1][1] or generated_tokens < self._marks[-1][2]):
            self._marks.clear()
        self._marks.append((time_s, prompt_tokens, generated_tokens))
        while len(self._marks) > 2 and self._marks[1][0] <= time_s - WINDOW_S:
            self._marks.popleft()

    def rates(self) -> tuple[float, float]:
        """Return prompt tokens and generated tokens per second."""
        if not self._marks:
            return 0.0, 0.0
        start, end = self._marks[0], self._marks[-1]
        seconds = end[0] - start[0]
        if seconds <= 0:
            return 0.0, 0.0
        return max(0, end[1] - start[1]) / seconds, max(0, end[2] - start[2]) / seconds


class EtaEstimator:
    """Estimates how long the remaining rows will take, from the rows done per worker second.

    The run so far is divided into blocks. In each, as many rows ended as half of what the engines hold, so that rows
    which start together and end together do not make one block fast and the next one slow. The first block, in which
    the engines were filled, is left out as soon as there are others. The time left follows from the later half of the
    blocks, so that the present cost of a row counts. Its range is where 90% of such runs end when

    - the blocks to come vary as those before (a prediction interval for their mean),
    - the change from the earlier to the later half continues, for at most TREND_HORIZON times as long as it was seen,
    - rows end up to once the time that a row is in an engine earlier, the last ones up to twice that time later.
    """

    def __init__(self) -> None:
        # work in worker seconds, and rows done; a block lies between two marks
        self._marks: list[tuple[float, int]] = []
        self._block_work = 0.0  # minimum work of a block, in worker seconds
        self._longest_block = 0.0
        self._has_filled = False
        self._now = (0.0, 0)  # the present work and rows, as in _marks
        self._time_s, self._workers = 0.0, 0

    def mark(self, time_s: float, rows: int, workers: int, rows_in_engines: int) -> None:
        """Record the rows done at a time, and the number of workers and of rows in their engines from then on."""
        work = self._now[0] + (time_s - self._time_s) * self._workers
        self._now, self._time_s, self._workers = (work, rows), time_s, workers
        if not work:
            self._marks = [self._now]
        elif (
            rows - self._marks[-1][1] >= max(1.0, rows_in_engines / 2) and work - self._marks[-1][0] >= self._block_work
        ):
            self._close_block()

    def _close_block(self) -> None:
        self._longest_block = max(self._longest_block, self._now[0] - self._marks[-1][0])
        self._marks.append(self._now)
        if len(self._marks) == 3 and not self._has_filled:
            self._has_filled = True
            del self._marks[0]
        if len(self._marks) > MAX_BLOCKS:
            self._marks = self._marks[::2]
            self._block_work = (self._marks[-1][0] - self._marks[0][0]) / (len(self._marks) - 1)

    def time_left(self, rows_left: int, rows_in_engines: int) -> TimeLeft | None:
        """Return the estimated time for the rows that are left.

        rows_in_engines:  rows that are in the engines now

        Returns None where nothing is known: there is no complete block yet, or no worker.
        """
        if len(self._marks) < 2 or not self._workers:
            return None
        is_late = self._now[0] - self._marks[-1][0] > self._longest_block
        has_range = len(self._marks) > MIN_BLOCKS
        start = self._marks[len(self._marks) // 2 if has_range else 0]
        rate = _rate(start, self._now if is_late else self._marks[-1])
        if rate <= 0:
            return None
        speed = rate * self._workers
        if not has_range:
            return TimeLeft(rows_left / speed)
        noise = self._noise(rows_left / rate)
        trend = self._trend(rows_left / rate)
        slow, fast = max(rate + min(trend, 0.0) - noise, rate / 10), rate + max(trend, 0.0) + noise
        row_s = min(rows_in_engines, rows_left) / speed
        low_s, high_s = rows_left / (fast * self._workers) - row_s, rows_left / (slow * self._workers) + 2 * row_s
        return TimeLeft(rows_left / speed, max(0.0, low_s), high_s)

    def _noise(self, work_left: float) -> float:
        """Return half the width of the mean rate's range over the remaining work, if it varies as the work done."""
        rates = [_rate(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]
        mean, degrees = sum(rates) / len(rates), len(rates) - 1
        spread = sqrt(sum((rate - mean) ** 2 for rate in rates) / degrees)
        block = (self._marks[-1][0] - self._marks[0][0]) / len(rates)
        num_known, num_to_come = len(rates) / 2, max(1.0, work_left / block)
        return student_t(degrees, CONFIDENCE) * spread * sqrt(1 / num_known + 1 / num_to_come)

    def _trend(self, work_left: float) -> float:
        """Return how much higher the mean rate over the remaining work will be, if it keeps changing."""
        first, middle, last = self._marks[0], self._marks[len(self._marks) // 2], self._marks[-1]
        change, half_span = _rate(middle, last) - _rate(first, middle), (last[0] - first[0]) / 2
        return change * min(TREND_HORIZON, (half_span / 2 + work_left / 2) / half_span)


def _rate(start: tuple[float, int], end: tuple[float, int]) -> float:
    """Return rows per worker second."""
    return (end[1] - start[1]) / (end[0] - start[0]) if end[0] > start[0] else 0.0
