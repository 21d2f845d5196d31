"""The timeline of workers: when each started, was ready and died."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from batch.quantities import count, duration
from batch.report import svg
from batch.report.events import Life
from batch.report.svg import Element, label, path, rect
from batch.report.time_axis import TimeAxis

MAX_WORKERS = 60
LEFT = 150.0
_WIDTH, _ROW = 900.0, 20.0


def choose(lives: Sequence[Life]) -> list[list[Life]]:
    """Lives by worker, those that died most often first, and no more than can be drawn."""
    by_actor: dict[str, list[Life]] = {}
    for life in lives:
        by_actor.setdefault(life.actor, []).append(life)
    workers = sorted(by_actor.values(), key=lambda lives: (-sum(life.has_died for life in lives), lives[0].started))
    return sorted(workers[:MAX_WORKERS], key=lambda lives: lives[0].started)


def draw(workers: Sequence[Sequence[Life]], axis: TimeAxis) -> Markup:
    bottom = 6 + len(workers) * _ROW
    elements = list(axis.draw(2, bottom))
    for number, lives in enumerate(workers):
        y = 6 + number * _ROW
        elements.append(label(LEFT - 8, y + 12, name(lives[0]), "end"))
        for life in lives:
            elements += _life(life, axis, y)
    deaths = sum(life.has_died for lives in workers for life in lives)
    description = f"{count(len(workers), 'worker')}, {count(deaths, 'death')}."
    return svg.draw(_WIDTH, bottom + 22, "Workers over time", description, *elements)


def _life(life: Life, axis: TimeAxis, y: float) -> Iterator[Element]:
    ready = life.ready or life.ended
    start, up, end = axis.x(life.started), axis.x(ready), axis.x(life.ended)
    yield rect(start, y + 4, up - start, 10, "starting", f"{name(life)} starts: {_seconds(life.started, ready)}")
    if life.ready is not None:
        lived = f"{name(life)}, process {life.pid}: {_seconds(life.ready, life.ended)}"
        yield rect(up, y + 2, end - up, 14, "alive", lived)
    if life.has_died:
        cross = [(end - 5, y + 4), (end + 5, y + 14), (end, y + 9), (end + 5, y + 4), (end - 5, y + 14)]
        yield path(cross, "death")


def name(life: Life) -> str:
    """The machine's name, or the start of the node's, and of the actor's."""
    machine = life.about.get("host") or life.node[:8] or "?"
    return f"{machine[:14]} / {life.actor[:6]}"


def _seconds(start: object, end: object) -> str:
    return duration((end - start).total_seconds())  # type: ignore[operator]
