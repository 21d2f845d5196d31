"""Amounts as a person reads them."""


def count(number: int, noun: str) -> str:
    """`1 file`, `1,204 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: int) -> str:
    """`8.4 MB`: decimal units, as disks and downloads are counted."""
    return f"{short(num_bytes)}B" if num_bytes >= 1000 else f"{num_bytes} B"


def short(number: int) -> str:
    """`716 M`, three digits at most; numbers below 1,000 as they stand, with a space behind."""
    amount = float(number)
    for unit in ("", "k", "M", "G", "T"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.0f} P"


def duration(seconds: float) -> str:
    """`3.4 s`, `42 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"
