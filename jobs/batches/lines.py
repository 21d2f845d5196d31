"""Reads the lines of a JSONL file block by block, so that memory does not grow with the file."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


class Readable(Protocol):
    """Anything that bytes can be read from."""

    def read(self, size: int, /) -> bytes: ...


class Line(NamedTuple):
    """Holds one line that is not blank.

    number:  counts from 1; blank lines count too
    offset:  of its first byte in the file
    text:    without the line break; None = it is longer than the limit
    """

    number: int
    offset: int
    text: bytes | None


def read_lines(file: Readable, max_bytes: int, offset: int = 0, number: int = 1) -> Iterator[Line]:
    """Yield the lines of a file that are not blank. A byte order mark at its start is left out.

    file:       at `offset`
    max_bytes:  longest line whose text is kept
    offset, number:  of the first line
    """
    rest, is_skipping = b"", False
    while block := file.read(BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        for text in whole:
            size = len(text) + 1
            if is_skipping:
                yield Line(number, offset, None)
            elif (line := _line(number, offset, text, max_bytes)) is not None:
                yield line
            is_skipping = False
            offset, number = offset + size, number + 1
        if len(rest) > max_bytes:
            offset, rest, is_skipping = offset + len(rest), b"", True
    if is_skipping:
        yield Line(number, offset, None)
    elif (line := _line(number, offset, rest, max_bytes)) is not None:
        yield line


def _line(number: int, offset: int, text: bytes, max_bytes: int) -> Line | None:
    if offset == 0:
        text = text.removeprefix(BOM)
    text = text.strip()
    if not text:
        return None
    return Line(number, offset, text if len(text) <= max_bytes else None)
