"""Render the timeline of workers: when each started, was ready and died. Workers that ran one after the other on a
machine share a lane."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from moray.batch.report import svg
from moray.batch.report.events import WorkerLifetime
from moray.batch.report.svg import Element, label, path, rect
from moray.batch.report.time_axis import TimeAxis
from moray.batch.report.words import escape_invisible
from moray.batch.units import count, duration

LEFT = 130.0
MAX_LANES = 60  # lanes that are shown at most: those with most deaths
_WIDTH, _HEIGHT = 900.0, 20.0

Lane = list[WorkerLifetime]


def lanes(processes: Sequence[WorkerLifetime]) -> list[Lane]:
    """Distribute worker processes over lanes.

    A lane holds processes of one machine that did not run at the same time; all processes of a worker are in one lane.
    Of more than MAX_LANES those with most deaths are returned.
    """
    workers: dict[str, list[WorkerLifetime]] = {}
    for process in sorted(processes, key=lambda process: process.started):
        workers.setdefault(process.actor, []).append(process)
    made: list[Lane] = []
    for worker in workers.values():
        host = machine(worker[0])
        free = (lane for lane in made if machine(lane[0]) == host and lane[-1].ended <= worker[0].started)
        lane = next(free, None)
        if lane is None:
            made.append(worker)
        else:
            lane += worker
    chosen = sorted(made, key=lambda lane: -sum(process.has_died for process in lane))[:MAX_LANES]
    return sorted(chosen, key=lambda lane: (machine(lane[0]), lane[0].started))


def render(drawn: Sequence[Lane], axis: TimeAxis) -> Markup:
    bottom = 6 + len(drawn) * _HEIGHT
    elements = list(axis.render(2, bottom))
    for number, lane in enumerate(drawn):
        y = 6 + number * _HEIGHT
        elements.append(label(LEFT - 8, y + 13, machine(lane[0])[:20], "end"))
        for process in lane:
            elements += _bars(process, axis, y)
        for process in lane:
            elements += _death(process, axis, y)
    deaths = sum(process.has_died for lane in drawn for process in lane)
    description = f"{count(len(drawn), 'worker')} at a time, {count(deaths, 'death')}."
    return svg.render(_WIDTH, bottom + 22, "Workers over time", description, *elements)


def _bars(process: WorkerLifetime, axis: TimeAxis, y: float) -> Iterator[Element]:
    ready = process.ready or process.ended
    start, up, end = axis.x(process.started), axis.x(ready), axis.x(process.ended)
    name = f"{machine(process)}, actor {escape_invisible(process.actor[:8])}"
    waited = duration((ready - process.started).total_seconds())
    yield rect(start, y + 5, up - start, 9, "starting", f"{name}: starting for {waited}")
    if process.ready is not None:
        worked = duration((process.ended - ready).total_seconds())
        yield rect(up, y + 3, end - up, 13, "alive", f"{name}, process {process.pid}: at work for {worked}")


def _death(process: WorkerLifetime, axis: TimeAxis, y: float) -> Iterator[Element]:
    if process.has_died:
        x = axis.x(process.ended)
        yield rect(x - 8, y + 1, 16, 17, "halo", f"died after {duration(process.seconds)}")
        yield path([(x - 5, y + 4.5), (x + 5, y + 14.5)], "death")
        yield path([(x + 5, y + 4.5), (x - 5, y + 14.5)], "death")


def machine(process: WorkerLifetime) -> str:
    """Return the name of a process's machine, or the start of its node id where it did not report one."""
    return escape_invisible(process.about.get("host") or process.node[:8] or "?", 60)
