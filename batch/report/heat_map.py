"""The heat map of experts: one row a layer; a cell compares an expert's share of its tokens to an even share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moray.batch.report import svg
from moray.batch.report.svg import Element, label, make, rect

_LEFT, _RIGHT, _WIDTH = 64.0, 84.0, 900.0
_MAX_WIDTH, _HEIGHT, _LOW_HEIGHT = 88.0, 22.0, 9.0  # pixels of a cell; it is low where there are many narrow ones
_TEXT_WIDTH = 30.0  # pixels from which a cell shows its number

# Upper ends of the colours' ranges, in even shares; the middle range is about even.
_ENDS = (0.25, 0.5, 0.75, 0.9, 1.11, 1.33, 2.0, 4.0, float("inf"))
LEGEND = (
    "under 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 0.9", "0.9 to 1.11", "1.11 to 1.33", "1.33 to 2", "2 to 4",
    "4 and more",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Describes an expert of a layer.

    share:     its part of the layer's tokens, from 0 to 1
    relative:  share as a multiple of an even share; 1.0 = as many tokens as with an even router
    """

    layer: int
    expert: int
    tokens: int
    share: float
    relative: float

    @property
    def level(self) -> int:
        """Return the number of its colour."""
        return next(i for i, end in enumerate(_ENDS) if self.relative < end)

    def describe(self) -> str:
        return (
            f"layer {self.layer}, expert {self.expert}: {self.tokens:,} tokens, {self.share:.1%} of its layer's, "
            f"{self.relative:.2f} times an even share"
        )


def cells(tokens: Sequence[Sequence[int]]) -> list[list[Cell]]:
    """Make the cells of the map.

    tokens: [layers][experts]
    """
    return [list(_row(layer, row)) for layer, row in enumerate(tokens)]


def _row(layer: int, row: Sequence[int]) -> Iterator[Cell]:
    total = sum(row)
    for expert, count in enumerate(row):
        share = count / total if total else 0.0
        yield Cell(layer, expert, count, share, share * len(row))


def render(rows: Sequence[Sequence[Cell]]) -> Markup:
    num_experts = len(rows[0])
    width = min(_MAX_WIDTH, (_WIDTH - _LEFT - _RIGHT) / num_experts)
    height = _HEIGHT if width >= _TEXT_WIDTH or len(rows) <= 16 else _LOW_HEIGHT
    elements: list[Element] = [label(_LEFT - 8, 12, "expert", "end")]
    every = max(1, round(_TEXT_WIDTH / width))
    for expert in range(0, num_experts, every):
        elements.append(label(_LEFT + (expert + 0.5) * width, 12, str(expert), "middle"))
    elements.append(label(_LEFT + num_experts * width + 8, 12, "max / even"))
    for number, row in enumerate(rows):
        y = 20 + number * height
        if height >= 14 or number % 2 == 0:
            elements.append(label(_LEFT - 8, y + height / 2 + 4, f"layer {number}", "end"))
        for cell in row:
            elements += _cell(cell, _LEFT + cell.expert * width, y, width, height)
        peak = max(cell.relative for cell in row)
        elements.append(label(_LEFT + num_experts * width + 8, y + height / 2 + 4, f"{peak:.2f}"))
    title = "Tokens by layer and expert"
    return svg.render(_WIDTH, 24 + len(rows) * height, title, " ".join(summarize(rows)), *elements)


def _cell(cell: Cell, x: float, y: float, width: float, height: float) -> Iterator[Element]:
    yield rect(x, y, width - 1, height - 1, f"heat{cell.level}", cell.describe())
    if width >= _TEXT_WIDTH and height >= 14:
        text = f"{cell.relative:.2f}" if cell.relative < 9.995 else f"{cell.relative:.0f}"
        yield make(
            "text", text=text, x=x + width / 2, y=y + height / 2 + 4, text_anchor="middle", class_=f"on{cell.level}"
        )


def summarize(rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return sentences with the most and the least used expert."""
    counted = [cell for row in rows for cell in row if sum(other.tokens for other in row)]
    if not counted:
        return ["No tokens were counted."]
    most, least = max(counted, key=lambda cell: cell.relative), min(counted, key=lambda cell: cell.relative)
    found = [f"Most used: {most.describe()}.", f"Least used: {least.describe()}."]
    if never := sum(cell.tokens == 0 for cell in counted):
        found.append(f"{never:,} of {len(counted):,} experts were never used.")
    return found
