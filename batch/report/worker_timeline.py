"""The timeline of workers: when each started, was ready and died. What ran on one machine one after the other shares a
lane."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from batch.quantities import count, duration
from batch.report import svg
from batch.report.events import Life
from batch.report.svg import Element, label, path, rect
from batch.report.time_axis import TimeAxis
from batch.report.words import visible

LEFT = 130.0
MAX_LANES = 60
_WIDTH, _HEIGHT = 900.0, 20.0

Lane = list[Life]


def lanes(lives: Sequence[Life]) -> list[Lane]:
    """A lane holds workers of one machine that did not live at the same time; the same worker started again stays in
    its own. Where there are too many to draw: those with most deaths."""
    workers: dict[str, list[Life]] = {}
    for life in sorted(lives, key=lambda life: life.started):
        workers.setdefault(life.actor, []).append(life)
    made: list[Lane] = []
    for worker in workers.values():
        place = machine(worker[0])
        free = (lane for lane in made if machine(lane[0]) == place and lane[-1].ended <= worker[0].started)
        lane = next(free, None)
        if lane is None:
            made.append(worker)
        else:
            lane += worker
    chosen = sorted(made, key=lambda lane: -sum(life.has_died for life in lane))[:MAX_LANES]
    return sorted(chosen, key=lambda lane: (machine(lane[0]), lane[0].started))


def draw(drawn: Sequence[Lane], axis: TimeAxis) -> Markup:
    bottom = 6 + len(drawn) * _HEIGHT
    elements = list(axis.draw(2, bottom))
    for number, lane in enumerate(drawn):
        y = 6 + number * _HEIGHT
        elements.append(label(LEFT - 8, y + 13, machine(lane[0])[:20], "end"))
        for life in lane:
            elements += _bars(life, axis, y)
        for life in lane:
            elements += _death(life, axis, y)
    deaths = sum(life.has_died for lane in drawn for life in lane)
    description = f"{count(len(drawn), 'worker')} at a time, {count(deaths, 'death')}."
    return svg.draw(_WIDTH, bottom + 22, "Workers over time", description, *elements)


def _bars(life: Life, axis: TimeAxis, y: float) -> Iterator[Element]:
    ready = life.ready or life.ended
    start, up, end = axis.x(life.started), axis.x(ready), axis.x(life.ended)
    name = f"{machine(life)}, actor {visible(life.actor[:8])}"
    waited = duration((ready - life.started).total_seconds())
    yield rect(start, y + 5, up - start, 9, "starting", f"{name}: starting for {waited}")
    if life.ready is not None:
        lived = duration((life.ended - ready).total_seconds())
        yield rect(up, y + 3, end - up, 13, "alive", f"{name}, process {life.pid}: at work for {lived}")


def _death(life: Life, axis: TimeAxis, y: float) -> Iterator[Element]:
    if life.has_died:
        x = axis.x(life.ended)
        yield rect(x - 8, y + 1, 16, 17, "halo", f"died after {duration(life.seconds)}")
        yield path([(x - 5, y + 4.5), (x + 5, y + 14.5)], "death")
        yield path([(x + 5, y + 4.5), (x - 5, y + 14.5)], "death")


def machine(life: Life) -> str:
    """Its name, or the start of its node's."""
    return visible(life.about.get("host") or life.node[:8] or "?", 60)
