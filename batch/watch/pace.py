"""Pace: how fast a job goes, and when it will be over. Pure."""

from collections import deque
from dataclasses import dataclass
from math import sqrt

WINDOW_S = 30.0  # speed is over this long
MIN_BLOCKS, MAX_BLOCKS = 4, 16  # that the run so far is cut into; with fewer there is no range
TRUST = 2.0  # a trend is taken to go on for as many times as long as it has been seen


@dataclass(frozen=True)
class TimeLeft:
    """Seconds. low_s, high_s: the range; None = there is too little to go by."""

    seconds: float
    low_s: float | None = None
    high_s: float | None = None


class Meter:
    """Speed over the last WINDOW_S, of prompt tokens and generated tokens."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque()

    def mark(self, time_s: float, prompt_tokens: int, generated_tokens: int) -> None:
        """Note the totals at a time. Totals that fell (a worker died) start the window anew."""
        if self._marks and (prompt_tokens < self._marks[-1][1] or generated_tokens < self._marks[-1][2]):
            self._marks.clear()
        self._marks.append((time_s, prompt_tokens, generated_tokens))
        while len(self._marks) > 2 and self._marks[1][0] <= time_s - WINDOW_S:
            self._marks.popleft()

    def rates(self) -> tuple[float, float]:
        """Prompt and generated tokens a second."""
        if not self._marks:
            return 0.0, 0.0
        start, end = self._marks[0], self._marks[-1]
        seconds = end[0] - start[0]
        if seconds <= 0:
            return 0.0, 0.0
        return max(0, end[1] - start[1]) / seconds, max(0, end[2] - start[2]) / seconds


class Pace:
    """How long the rows that are left will take, from how many were done in a second of a worker.

    The run so far is cut into blocks. In each as many rows ended as half of what the engines hold, so that rows which
    started together and end together do not make one block quick and the next one slow. The first one, in which the
    engines were filled, is left out as soon as there are others. The time left follows from the later half of the
    blocks, so that what rows cost now counts; its range is where 90% of such runs end when
    - the blocks to come spread as those that were (a prediction interval for their mean),
    - the change from the earlier to the later half goes on, for at most TRUST times as long as it has been seen,
    - rows end up to once the time that a row is in an engine earlier, the last ones up to twice that time later.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []  # work in worker seconds, rows done; a block between two
        self._block_work = 0.0  # of a block, at least
        self._longest_block = 0.0
        self._has_filled = False
        self._now = (0.0, 0)  # as the marks
        self._time_s, self._workers = 0.0, 0

    def mark(self, time_s: float, rows: int, workers: int, rows_inside: int) -> None:
        """Note the rows done at a time, how many workers there are from then on, and the rows in their engines."""
        work = self._now[0] + (time_s - self._time_s) * self._workers
        self._now, self._time_s, self._workers = (work, rows), time_s, workers
        if not work:
            self._marks = [self._now]
        elif rows - self._marks[-1][1] >= max(1.0, rows_inside / 2) and work - self._marks[-1][0] >= self._block_work:
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

    def time_left(self, rows_left: int, rows_inside: int) -> TimeLeft | None:
        """
        rows_inside:  rows that are in the engines now

        None where nothing is known: there is no block yet, or no worker.
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
        row_s = min(rows_inside, rows_left) / speed
        low_s, high_s = rows_left / (fast * self._workers) - row_s, rows_left / (slow * self._workers) + 2 * row_s
        return TimeLeft(rows_left / speed, max(0.0, low_s), high_s)

    def _noise(self, work_left: float) -> float:
        """Half of the range of the mean rate over the work that is left, when that is as the work done."""
        rates = [_rate(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]
        mean, freedom = sum(rates) / len(rates), len(rates) - 1
        spread = sqrt(sum((rate - mean) ** 2 for rate in rates) / freedom)
        block = (self._marks[-1][0] - self._marks[0][0]) / len(rates)
        known, to_come = len(rates) / 2, max(1.0, work_left / block)
        student = 1.645 + 2.1 / freedom  # 90% of Student's t lie within, to 0.05
        return student * spread * sqrt(1 / known + 1 / to_come)

    def _trend(self, work_left: float) -> float:
        """How much more the rate will be, in the mean over the work that is left, if it goes on changing."""
        first, middle, last = self._marks[0], self._marks[len(self._marks) // 2], self._marks[-1]
        change, over = _rate(middle, last) - _rate(first, middle), (last[0] - first[0]) / 2
        return change * min(TRUST, (over / 2 + work_left / 2) / over)


def _rate(start: tuple[float, int], end: tuple[float, int]) -> float:
    """Rows a worker second."""
    return (end[1] - start[1]) / (end[0] - start[0]) if end[0] > start[0] else 0.0
