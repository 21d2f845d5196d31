"""Draw figures against a length as an SVG file, with both axes logarithmic."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from moray.batch.report.svg import Element, label, line, make, path

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 720.0, 250.0, 72.0, 560.0, 34.0, 208.0
LABEL_WIDTH, LABEL_HEIGHT = 36.0, 14.0
COLOURS = ("#0b6e99", "#c4561e", "#5a8f29", "#8a4fa3", "#9a7d0a", "#444444")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #222 } .name { font-weight: 600 }
.grid { stroke: #ccc; stroke-width: 1 } path { fill: none; stroke-width: 2 }
""" + "".join(f".line{i} {{ stroke: {colour} }} .text{i} {{ fill: {colour} }} " for i, colour in enumerate(COLOURS))


@dataclass(frozen=True)
class Panel:
    """Holds one chart.

    lines:         name -> points (length, value)
    format_value:  formats a value as text
    """

    title: str
    lines: Mapping[str, Sequence[tuple[int, float]]]
    format_value: Callable[[float], str]


def draw(file: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the panels, one below the other."""
    drawn = [make("g", *_panel(panel), transform=f"translate(0,{i * PANEL:g})") for i, panel in enumerate(panels)]
    about = make("title", text=title), make("style", text=STYLE)
    view = f"0 0 {WIDTH:g} {len(panels) * PANEL:g}"
    back = make("rect", x=0, y=0, width=WIDTH, height=len(panels) * PANEL, fill="#fff")
    picture = make("svg", *about, back, *drawn, xmlns="http://www.w3.org/2000/svg", viewBox=view)
    file.write_text(ElementTree.tostring(picture, encoding="unicode") + "\n")


def _panel(panel: Panel) -> list[Element]:
    points = [point for line_points in panel.lines.values() for point in line_points]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = (
        10 ** edge(math.log10(value(y for _, y in points))) for edge, value in ((math.floor, min), (math.ceil, max))
    )

    def at(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / first) / math.log(last / first)
        up = math.log(y / low) / math.log(high / low)
        return LEFT + right * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    elements = [label(0, 14, panel.title, class_="name")]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = at(first, 10.0**power)[1]
        elements += [line(LEFT, y, RIGHT, y, "grid"), label(LEFT - 6, y + 4, panel.format_value(10.0**power), "end")]
    free = 0.0  # nothing is written there yet
    for length in sorted({x for x, _ in points}):
        if (x := at(length, low)[0]) >= free:
            elements.append(label(x, BOTTOM + 16, f"{length / 1024:g}K", "middle"))
            free = x + LABEL_WIDTH
    heights, free = dict[int, float](), 0.0
    for y, i in sorted((at(*line_points[-1])[1], i) for i, line_points in enumerate(panel.lines.values())):
        heights[i] = max(y, free)
        free = heights[i] + LABEL_HEIGHT
    for i, (name, line_points) in enumerate(panel.lines.items()):
        elements.append(path([at(*point) for point in line_points], f"line{i}"))
        elements.append(label(RIGHT + 8, heights[i] + 4, name, class_=f"text{i}"))
    return elements
