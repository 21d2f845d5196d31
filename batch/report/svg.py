"""Build SVG from elements, which are escaped when they are written."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable

from markupsafe import Markup

Element = ET.Element


def make(
    tag: str, *children: Element, text: str | None = None, tip: str | None = None, **attributes: object
) -> Element:
    """Make an element.

    tip:         text that is shown when the pointer rests on it
    attributes:  `_` in a name stands for `-`
    """
    named = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
    element = Element(tag, named)
    element.text = text
    if tip is not None:
        element.append(make("title", text=tip))
    element.extend(children)
    return element


def rect(x: float, y: float, width: float, height: float, class_: str, tip: str | None = None) -> Element:
    return make("rect", tip=tip, x=x, y=y, width=max(0.0, width), height=max(0.0, height), class_=class_)


def label(x: float, y: float, text: str, anchor: str = "start", class_: str = "tick") -> Element:
    return make("text", text=text, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    return make("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str) -> Element:
    """Make straight lines from point to point."""
    return make("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def render(width: float, height: float, title: str, description: str, *children: Element) -> Markup:
    """Render a whole picture for a page. A screen reader reads its title and description."""
    about = make("title", text=title), make("desc", text=description)
    picture = make("svg", *about, *children, viewBox=f"0 0 {width:g} {height:g}", role="img")
    return Markup(ET.tostring(picture, encoding="unicode"))


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
