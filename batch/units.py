"""Formats amounts for people."""

from moray.engine.settings.sizes import GIB


def count(number: int, noun: str) -> str:
    """Format a count with its noun: `1 file`, `1,204 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: int) -> str:
    """Format bytes in decimal units, as disks and downloads are counted: `8.4 MB`."""
    return f"{short(num_bytes)}B" if num_bytes >= 1000 else f"{num_bytes} B"


def memory(num_bytes: int) -> str:
    """Format bytes in binary units, as memory is counted: `78.0 GiB`; small amounts as `size` does."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB / 10 else size(num_bytes)


def short(number: int) -> str:
    """Format a number with three digits at most and a unit: `716 M`; below 1,000 without a unit, but with the space."""
    amount = float(number)
    for unit in ("", "k", "M", "G", "T"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.0f} P"


def duration(seconds: float) -> str:
    """Format seconds: `3.4 s`, `42 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02} s"
    return f"{rounded // 3600:,} h {rounded % 3600 // 60:02} min"
