"""Render a histogram as bars. Each bucket's edge is about a quarter above the one before."""

from collections.abc import Callable
from math import ceil

from markupsafe import Markup

from moray.batch.output.part_stats import EDGES, Histogram, quantile, upper_edge
from moray.batch.report import svg
from moray.batch.report.svg import Element, label, line, rect

WIDTH, _TOP, _PLOT = 290.0, 14.0, 96.0
_SHARES = (0.5, 0.9, 0.99)


def render(title: str, histogram: Histogram, format_value: Callable[[float], str]) -> Markup:
    """Render the chart.

    format_value: formats an edge as text
    """
    first, last = min(histogram), max(histogram)
    edges = EDGES[EDGES.index(first) : EDGES.index(last) + 1]
    total, max_count = histogram.total(), max(histogram.values())
    width = min(36.0, WIDTH / len(edges))
    bottom = _TOP + _PLOT
    elements: list[Element] = [line(0, bottom, WIDTH, bottom, "axis"), label(0, 9, f"{max_count:,}", class_="tick")]
    elements.append(line(0, _TOP, WIDTH, _TOP, "grid"))
    for i, edge in enumerate(edges):
        count = histogram[edge]
        height = count / max_count * _PLOT
        tip = f"{format_value(edge)} to {format_value(upper_edge(edge))}: {count:,} ({count / total:.1%})"
        elements.append(rect(i * width + 0.5, bottom - height, width - 1, height, "column", tip))
    widest = max(6.2 * len(format_value(edge)) + 10 for edge in edges)
    for i in range(0, len(edges), ceil(widest / width)):
        if i * width + widest <= WIDTH:
            elements.append(label(i * width, bottom + 13, format_value(edges[i])))
    return svg.render(WIDTH, bottom + 18, title, f"{describe(histogram, format_value)}.", *elements)


def describe(histogram: Histogram, format_value: Callable[[float], str]) -> str:
    """Return `half below 12, 90% below 30, 99% below 61`, to the precision of the buckets."""
    below = [format_value(quantile(histogram, share)) for share in _SHARES]
    return f"half below {below[0]}, 90% below {below[1]}, 99% below {below[2]}"
