"""Reads the lines of a JSONL file block by block, so that memory does not grow with the file."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


class Readable(Protocol):
    """Anything that bytes can be read from."""

    def read(self, size: int, /) -> bytes: ...


class HashingReader:
    """Reads a file and adds what was read to a digest of hashlib."""

    def __init__(self, file: Readable, digest: Any) -> None:
        self._file = file
        self._digest = digest

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data


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
    rest, skipped = b"", 0  # the beginning of the next line, and how many bytes of it were forgotten
    while block := file.read(BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        for text in whole:
            if (line := _line(number, offset, text, skipped, max_bytes)) is not None:
                yield line
            offset, number, skipped = offset + skipped + len(text) + 1, number + 1, 0
        if skipped + len(rest) > max_bytes:
            skipped, rest = skipped + len(rest), b""
    if (line := _line(number, offset, rest, skipped, max_bytes)) is not None:
        yield line


def _line(number: int, offset: int, text: bytes, skipped: int, max_bytes: int) -> Line | None:
    """Return a line; None where it is blank. skipped: bytes of it that are not in `text`."""
    if skipped + len(text) > max_bytes:
        return Line(number, offset, None)
    text = (text.removeprefix(BOM) if offset == 0 else text).strip()
    return Line(number, offset, text) if text else None
