"""Text and numbers for a page: amounts as people read them, other people's text so that it cannot mislead."""

import unicodedata
from datetime import UTC, datetime

from batch.quantities import duration, short

_JOINERS = "\u200c\u200d"  # Persian and emoji need them, and they turn nothing around


def visible(text: object, limit: int = 300) -> str:
    """At most `limit` characters, with those that show nothing or turn the text around by their names."""
    whole = str(text)
    shown = "".join(_show(character) for character in whole[:limit])
    return shown if len(whole) <= limit else f"{shown}… ({len(whole):,} characters)"


def _show(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if is_hidden else character


def amount(value: float) -> str:
    """`12`, `1.5`, `716 M`: three digits at most, for axes and small tables."""
    if value >= 1000:
        return short(round(value)).strip()
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def whole(value: float) -> str:
    """Of things that are counted, also where only about: `1,204`, `1.2 M` from a million on."""
    return f"{value:,.0f}" if value < 1e6 else amount(value)


def milliseconds(value: float) -> str:
    if value < 1000:
        return f"{value:.0f} ms"
    return duration(value / 1000)


def percent(share: float) -> str:
    """`0.1%` and `99.9%` rather than 0 and 100 where it is not quite that."""
    if 0 < share < 0.001:
        return "< 0.1%"
    if 0.999 < share < 1:
        return "> 99.9%"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
