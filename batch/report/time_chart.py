"""Render charts over time: each interval of a series is a step as high as its value. Runs are not joined."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from moray.batch.report import svg
from moray.batch.report.svg import Element, label, line, path
from moray.batch.report.time_axis import TimeAxis

WIDTH, LEFT, RIGHT = 900.0, 58.0, 892.0
_TOP, _PLOT = 26.0, 92.0

Step = tuple[datetime, datetime, float]


@dataclass(frozen=True)
class Series:
    """Holds a line of a chart.

    class_: CSS class
    runs:   steps of each run
    """

    name: str
    class_: str
    runs: Sequence[Sequence[Step]]

    @property
    def max_value(self) -> float:
        return max((value for run in self.runs for *_, value in run), default=0.0)


def render(
    title: str,
    axis: TimeAxis,
    series: Sequence[Series],
    format_value: Callable[[float], str],
    ceiling: float | None = None,
) -> Markup:
    """Render the chart.

    format_value:  formats a value as text
    ceiling:       top of the axis; None = the next round number above the largest value
    """
    top = ceiling or round_up(max(each.max_value for each in series)) or 1.0
    bottom = _TOP + _PLOT

    def y(value: float) -> float:
        return bottom - min(1.0, value / top) * _PLOT

    elements = [label(0, 12, title, class_="name"), *_legend(series)]
    for part in (0.0, 0.5, 1.0):
        elements += [
            line(LEFT, y(part * top), RIGHT, y(part * top), "grid"),
            label(LEFT - 6, y(part * top) + 4, format_value(part * top), "end"),
        ]
    elements += axis.render(_TOP, bottom)
    for each in series:
        for run in each.runs:
            elements += _steps(axis, run, each, y, bottom, is_filled=len(series) == 1)
    largest = ", ".join(f"{each.name} up to {format_value(each.max_value)}" for each in series)
    return svg.render(WIDTH, bottom + 22, title, f"{largest}.", *elements)


def _legend(series: Sequence[Series]) -> Iterator[Element]:
    if len(series) < 2:
        return
    x = RIGHT
    for each in reversed(series):
        x -= 7 * len(each.name)
        yield label(x, 12, each.name)
        yield line(x - 24, 8, x - 6, 8, each.class_)
        x -= 40


def _steps(
    axis: TimeAxis, run: Sequence[Step], series: Series, y: Callable[[float], float], bottom: float, *, is_filled: bool
) -> Iterator[Element]:
    points = [(axis.x(at), y(value)) for start, end, value in run for at in (start, end)]
    if not points:
        return
    if is_filled:
        yield path([(points[0][0], bottom), *points, (points[-1][0], bottom)], f"{series.class_} area")
    yield path(points, series.class_)


def round_up(value: float) -> float:
    """Return the next round number: 1, 1.5, 2, 3, 4, 5, 6, 8 or 10 times a power of ten; 0 stays 0."""
    if value <= 0:
        return 0.0
    power = 1.0
    while power > value:
        power /= 10
    while power * 10 <= value:
        power *= 10
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * 0.9999)
