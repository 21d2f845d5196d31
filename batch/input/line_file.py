"""Read a file of JSON lines once for the plan: its digest, rows, their places, and the kinds of values in columns."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow import fs

from moray.batch.input.input_file import InputFile
from moray.batch.input.lines import CHUNK_BYTES, decompress, find_codec, read_lines
from moray.batch.json_values import Kinds, decode_object, field_of, kind_of

GROUP_ROWS = 64  # rows between two offsets that the plan keeps
MAX_COLUMNS = 2_000  # keys of all rows of a file
_SAMPLES = 16  # of a file, by which a reader checks that it is still the one that was planned
_SAMPLE_BYTES = 4096
_CONVERT = "one JSON object a line is needed: jq -c '.[]' FILE > FILE.jsonl"


@dataclass
class LineFile:
    """Holds what a file of lines has told.

    kinds:    column -> the kinds of its values, in the order in which columns appear; without columns that no one asked
              for
    offsets:  empty for a compressed file, which is read from its start
    """

    path: str
    size: int
    identity: str = ""
    num_rows: int = 0
    kinds: dict[str, Kinds] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    is_compressed: bool = False

    def describe(self, kinds: Mapping[str, Kinds]) -> InputFile:
        """Return the file with the types that its columns have in the whole job.

        kinds:  the kinds of values of all files of the job
        """
        rest = [] if self.num_rows % GROUP_ROWS == 0 else [self.num_rows % GROUP_ROWS]
        groups = [self.num_rows] if self.is_compressed else [GROUP_ROWS] * (self.num_rows // GROUP_ROWS) + rest
        return InputFile(
            path=self.path,
            size=self.size,
            num_rows=self.num_rows,
            row_group_rows=tuple(groups),
            identity=self.identity,
            schema=pa.schema([field_of(name, kinds[name]) for name in self.kinds]),
            offsets=tuple(self.offsets),
        )


def read_line_file(
    filesystem: fs.FileSystem, full_path: str, path: str, size: int, columns: Collection[str] | None
) -> LineFile:
    """Read a whole file, in memory that does not grow with it.

    columns:  the columns that the job needs; None = all

    Raises ValueError where the file has no lines of JSON, OSError where it cannot be read.
    """
    found = LineFile(path, size)
    with filesystem.open_input_stream(full_path, compression=None) as stream:
        digest = _Digest(stream, size)
        codec = find_codec(digest.peek())
        found.is_compressed = codec is not None
        source = decompress(digest if codec is None else pa.PythonFile(digest, mode="r"), codec)
        _read_rows(found, read_lines(source), columns)
        found.identity = digest.finish()
    if found.is_compressed:
        found.offsets = []
    return found


def _read_rows(found: LineFile, lines: Iterable[tuple[int, bytes]], columns: Collection[str] | None) -> None:
    seen: dict[tuple[str, str], None] = {}
    for offset, line in lines:
        if found.num_rows == 0:
            _check_first(line)
        if found.num_rows % GROUP_ROWS == 0:
            found.offsets.append(offset)
            if len(seen) > MAX_COLUMNS * 3:
                _check_columns(seen)
        found.num_rows += 1
        try:
            row = decode_object(line)
        except ValueError:  # an error row; the reader says why
            continue
        for name, value in row.items():
            if columns is None or name in columns:
                seen[name, kind_of(value)] = None
    _check_columns(seen)
    for name, kind in seen:
        found.kinds[name] = found.kinds.get(name, frozenset()) | {kind}


def _check_first(line: bytes) -> None:
    """Refuse JSON that is not written a row a line: every row would be an error row."""
    if line.startswith(b"["):
        raise ValueError(f"begins with a list; {_CONVERT}")
    if line == b"{":
        raise ValueError(f"has rows of several lines each; {_CONVERT.replace('.[]', '.')}")


def _check_columns(seen: Iterable[tuple[str, str]]) -> None:
    names = {name for name, _ in seen}
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"has rows with {len(names):,} different keys or more, {MAX_COLUMNS:,} are allowed as columns")


class _Digest:
    """Passes a stream on and computes the digests of what goes through."""

    def __init__(self, stream: Any, size: int) -> None:
        self._stream = stream
        self._size = size
        self._digest = hashlib.sha256()
        self._samples = hashlib.sha256()
        self._windows = list(sample_windows(size))
        self._position = 0
        self._ahead = b""
        self.closed = False

    def peek(self) -> bytes:
        """Return the first bytes, which read() returns again."""
        self._ahead = self._next(CHUNK_BYTES)
        return self._ahead

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        if self._ahead:
            chunk, self._ahead = self._ahead[:size], self._ahead[size:]
            return chunk
        return self._next(size)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def finish(self) -> str:
        """Read what is left, and return the InputFile.identity of the file."""
        while self._next(CHUNK_BYTES):
            pass
        if self._position != self._size:
            raise ValueError(
                f"has {self._position:,} bytes, had {self._size:,} when it was listed; it is being written"
            )
        return f"{self._size} bytes, samples {self._samples.hexdigest()}, content {self._digest.hexdigest()}"

    def _next(self, size: int) -> bytes:
        chunk: bytes = self._stream.read(size)
        self._digest.update(chunk)
        end = self._position + len(chunk)
        while self._windows and self._windows[0][0] < end:
            first, last = self._windows[0]
            self._samples.update(chunk[max(0, first - self._position) : last - self._position])
            if last > end:
                break
            del self._windows[0]
        self._position = end
        return chunk


def sample_windows(size: int) -> Iterator[tuple[int, int]]:
    """Yield the begins and ends of the samples of a file of this size, which do not overlap."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        yield 0, size
        return
    for number in range(_SAMPLES):
        first = number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
        yield first, first + _SAMPLE_BYTES


def is_planned(file: pa.NativeFile, size: int, identity: str) -> bool:
    """Return whether an open file is the one with this identity, by its size and samples."""
    digest = hashlib.sha256()
    for first, last in sample_windows(size):
        file.seek(first)
        digest.update(file.read(last - first))
    return identity.startswith(f"{size} bytes, samples {digest.hexdigest()}, ")
