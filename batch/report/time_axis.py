"""TimeAxis: the time of several runs from left to right, with the pauses between them shortened."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from moray.batch.report.svg import Element, label, line, rect
from moray.batch.units import duration

_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800)
_TICK_WIDTH = 88.0  # pixels between two ticks, about
_GAP_WIDTH = 68.0  # pixels of a pause, at most
_MARGIN = 26.0  # pixels between a tick and the end of its segment, at least


@dataclass(frozen=True)
class _Segment:
    start: datetime
    end: datetime
    left: float
    right: float


class TimeAxis:
    """Maps times of several runs to positions in pixels.

    spans:        start and end of each run, in order
    left, right:  where the axis starts and ends
    """

    def __init__(self, spans: Sequence[tuple[datetime, datetime]], left: float, right: float) -> None:
        spans = [(start, max(end, start + timedelta(seconds=1))) for start, end in spans]
        self.left, self.right = left, right
        num_gaps = len(spans) - 1
        self._gap = min(_GAP_WIDTH, (right - left) / 3 / num_gaps) if num_gaps else 0.0
        seconds = sum((end - start).total_seconds() for start, end in spans)
        self._scale = (right - left - num_gaps * self._gap) / seconds
        self._segments: list[_Segment] = []
        for start, end in spans:
            width = (end - start).total_seconds() * self._scale
            self._segments.append(_Segment(start, end, left, left + width))
            left += width + self._gap

    def x(self, at: datetime) -> float:
        """Return the position of a time; of a time between two runs, the end of the first."""
        segment = next((s for s in reversed(self._segments) if s.start <= at), self._segments[0])
        seconds = (min(at, segment.end) - segment.start).total_seconds()
        return segment.left + max(0.0, seconds) * self._scale

    def render(self, top: float, bottom: float, *, has_labels: bool = True) -> Iterator[Element]:
        """Yield ticks with the time of day (UTC) below them, and the pauses as bands."""
        step_s = next((step for step in _STEPS_S if step * self._scale >= _TICK_WIDTH), _STEPS_S[-1])
        for at, x in self._ticks(step_s):
            yield line(x, top, x, bottom, "grid")
            if has_labels:
                yield label(x, bottom + 14, _clock(at, step_s), "middle")
        for before, after in zip(self._segments, self._segments[1:], strict=False):
            pause = duration((after.start - before.end).total_seconds())
            yield rect(before.right, top, self._gap, bottom - top, "gap", f"no run for {pause}")
            if has_labels and self._gap >= 60:
                yield label(before.right + self._gap / 2, bottom + 14, pause, "middle", "tick pause")

    def _ticks(self, step_s: int) -> Iterator[tuple[datetime, float]]:
        """Yield times at whole steps and their positions, where there is room for the label."""
        for segment in self._segments:
            last = float("-inf")
            at = datetime.fromtimestamp(-(-segment.start.timestamp() // step_s) * step_s, segment.start.tzinfo)
            while at <= segment.end:
                x = self.x(at)
                if x - last >= _TICK_WIDTH * 0.8 and segment.left + _MARGIN <= x <= segment.right - _MARGIN:
                    yield at, x
                    last = x
                at += timedelta(seconds=step_s)


def _clock(at: datetime, step_s: int) -> str:
    if step_s >= 86400 or (step_s >= 21600 and at.hour == 0):
        return f"{at:%b} {at.day}"
    return f"{at:%H:%M:%S}" if step_s < 60 else f"{at:%H:%M}"
