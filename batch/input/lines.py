"""Read a file of lines: plain, or compressed with gzip or Zstandard, which its first bytes tell."""

from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

CHUNK_BYTES = 1 << 20  # that are read at once
MAX_LINE_BYTES = 256 << 20  # a longer line is no row: more likely the file has no lines
_BOM = b"\xef\xbb\xbf"
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


class Source(Protocol):
    """Is what bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most this many; nothing at the end."""


def find_codec(head: bytes) -> str | None:
    """Return the codec of a file that begins with these bytes, by Arrow's names; None = it is not compressed."""
    return next((codec for magic, codec in _MAGIC.items() if head.startswith(magic)), None)


def decompress(source: Any, codec: str | None) -> Source:
    """Return a stream of the plain bytes of a file object."""
    if codec is None:
        stream: Source = source
        return stream
    plain: Source = pa.CompressedInputStream(source, codec)
    return plain


def read_lines(source: Source, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not blank, without what ends it, and the byte at which it begins.

    offset:  the byte at which the source begins, in the file without compression

    Raises ValueError where a line is too long to be a row, OSError where the source cannot be read.
    """
    pieces: list[bytes] = []  # of a line that has not ended yet
    length = 0
    while True:
        chunk = source.read(CHUNK_BYTES)
        lines = chunk.split(b"\n") if chunk else []
        for line in lines[:-1]:
            if pieces:
                line = b"".join((*pieces, line))
                pieces, length = [], 0
            begin, offset = offset, offset + len(line) + 1
            if line := _strip(line, begin):
                yield begin, line
        if not chunk:
            break
        pieces.append(lines[-1])
        length += len(lines[-1])
        if length > MAX_LINE_BYTES:
            raise ValueError(f"has a line of more than {MAX_LINE_BYTES:,} bytes at byte {offset:,}; is it JSON Lines?")
    if line := _strip(b"".join(pieces), offset):
        yield offset, line


def _strip(line: bytes, begin: int) -> bytes:
    """Return the line without white space around it and, at the start of a file, without a byte order mark."""
    return (line if begin else line.removeprefix(_BOM)).strip()
