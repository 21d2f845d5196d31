"""Format text and numbers for a page; text from outside is escaped so that it cannot mislead."""

import unicodedata
from datetime import UTC, datetime

from moray.batch.units import duration, short

_JOINERS = "\u200c\u200d"  # needed by Persian and emoji; they do not change the direction of text


def escape_invisible(text: object, limit: int = 300) -> str:
    """Return at most `limit` characters, with those that are invisible or change the direction of text as ⟨U+202E⟩."""
    whole = str(text)
    shown = "".join(_show(character) for character in whole[:limit])
    return shown if len(whole) <= limit else f"{shown}… ({len(whole):,} characters)"


def _show(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if is_hidden else character


def amount(value: float) -> str:
    """Format a value as `12`, `1.5`, `716 M`: three digits at most, for axes and small tables."""
    if value >= 1000:
        return short(round(value)).strip()
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def whole(value: float) -> str:
    """Format a count, also an average of counts: `1,204`, and `1.2 M` from a million on."""
    return f"{value:,.0f}" if value < 1e6 else amount(value)


def milliseconds(value: float) -> str:
    if value < 1000:
        return f"{value:.0f} ms"
    return duration(value / 1000)


def percent(share: float) -> str:
    """Format a share as `42.5%`; a share next to 0 or 1 as `< 0.1%` or `> 99.9%`, not as 0% or 100%."""
    if 0 < share < 0.001:
        return "< 0.1%"
    if 0.999 < share < 1:
        return "> 99.9%"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
