"""Ids of files and batches. They begin with the time, so the sorted names of a folder are in the order of creation."""

import re
import secrets
from hashlib import sha256

FILE, BATCH = "file-", "batch_"
_ID = re.compile(r"(?:file-|batch_)[0-9a-f]{24}")
_TIME_DIGITS = 11  # hexadecimal digits of the milliseconds since 1970


def new_id(prefix: str, now_s: float) -> str:
    """Return a new id of something that is made at `now_s` (seconds since 1970)."""
    return prefix + f"{int(now_s * 1000):0{_TIME_DIGITS}x}" + secrets.token_hex(7)[:13]


def derived_id(prefix: str, now_s: float, source: str) -> str:
    """Return the id of something made of `source`: the same whenever it is made again."""
    return prefix + f"{int(now_s * 1000):0{_TIME_DIGITS}x}" + sha256(source.encode()).hexdigest()[:13]


def is_id(text: str, prefix: str) -> bool:
    """Return whether a text that a client sent has the form of such an id, and so can be part of a path."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None


def made_at_s(identifier: str) -> float:
    """Return when an id was made, in seconds since 1970."""
    digits = identifier.removeprefix(FILE).removeprefix(BATCH)[:_TIME_DIGITS]
    return int(digits, 16) / 1000
