"""A histogram as bars, bucket by bucket: their edges grow by a quarter each."""

from collections.abc import Callable
from math import ceil

from markupsafe import Markup

from batch.output.tally import EDGES, Histogram, quantile, upper_edge
from batch.report import svg
from batch.report.svg import Element, label, line, rect

WIDTH, _TOP, _PLOT = 290.0, 14.0, 96.0
_SHARES = (0.5, 0.9, 0.99)


def draw(title: str, histogram: Histogram, say: Callable[[float], str]) -> Markup:
    """say: an edge as text"""
    first, last = min(histogram), max(histogram)
    edges = EDGES[EDGES.index(first) : EDGES.index(last) + 1]
    total, most = histogram.total(), max(histogram.values())
    width = min(36.0, WIDTH / len(edges))
    bottom = _TOP + _PLOT
    elements: list[Element] = [line(0, bottom, WIDTH, bottom, "axis"), label(0, 9, f"{most:,}", class_="tick")]
    elements.append(line(0, _TOP, WIDTH, _TOP, "grid"))
    for i, edge in enumerate(edges):
        count = histogram[edge]
        height = count / most * _PLOT
        tip = f"{say(edge)} to {say(upper_edge(edge))}: {count:,} ({count / total:.1%})"
        elements.append(rect(i * width + 0.5, bottom - height, width - 1, height, "column", tip))
    widest = max(6.2 * len(say(edge)) + 10 for edge in edges)
    for i in range(0, len(edges), ceil(widest / width)):
        if i * width + widest <= WIDTH:
            elements.append(label(i * width, bottom + 13, say(edges[i])))
    return svg.draw(WIDTH, bottom + 18, title, f"{describe(histogram, say)}.", *elements)


def describe(histogram: Histogram, say: Callable[[float], str]) -> str:
    """`half below 12, 90% below 30, 99% below 61`: within their buckets, as near as those tell."""
    below = [say(quantile(histogram, share)) for share in _SHARES]
    return f"half below {below[0]}, 90% below {below[1]}, 99% below {below[2]}"
