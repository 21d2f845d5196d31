"""A Parquet file's footer: what is in the file, and what identifies it."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

_TRAILER = 8  # length of the footer, then the magic
_MAGIC = b"PAR1"
_FIRST_READ = 64 * 1024


@dataclass(frozen=True)
class InputFile:
    """
    path:            relative to the input root
    size:            bytes
    row_group_rows:  of each row group
    footer_sha256:   of the footer with its trailer
    """

    path: str
    size: int
    num_rows: int
    row_group_rows: tuple[int, ...]
    footer_sha256: str
    schema: pa.Schema

    @property
    def identity(self) -> str:
        return _identity(self.size, self.footer_sha256)


def read_footer(filesystem: fs.FileSystem, full_path: str, path: str, size: int) -> InputFile:
    """Read what stands at the end of a file, in one request for most files.

    Raises ValueError where the file is not Parquet or cut short, OSError where it cannot be read.
    """
    footer = read_footer_bytes(filesystem, full_path, size)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(footer))
        schema = parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"has a footer that cannot be read: {str(error).splitlines()[0]}") from None
    metadata = parquet.metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return InputFile(
        path=path,
        size=size,
        num_rows=metadata.num_rows,
        row_group_rows=tuple(group.num_rows for group in groups),
        footer_sha256=hashlib.sha256(footer).hexdigest(),
        schema=schema,
    )


def read_footer_bytes(filesystem: fs.FileSystem, full_path: str, size: int) -> bytes:
    """The footer with its trailer. Raises as read_footer does."""
    with filesystem.open_input_file(full_path) as file:
        tail = _read_end(file, min(size, _FIRST_READ), size)
        if len(tail) < _TRAILER or tail[-4:] != _MAGIC:
            end = "is empty" if not tail else f"ends in {tail[-4:]!r}, not in {_MAGIC!r}"
            raise ValueError(f"is not a Parquet file, or cut short: {end}")
        length = int.from_bytes(tail[-_TRAILER:-4], "little") + _TRAILER
        if length > size:
            raise ValueError(f"is cut short: its footer takes {length:,} bytes, the file has {size:,}")
        return tail[-length:] if length <= len(tail) else _read_end(file, length, size)


def identify(size: int, footer: bytes) -> str:
    """InputFile.identity of a file of which nothing else is wanted."""
    return _identity(size, hashlib.sha256(footer).hexdigest())


def _identity(size: int, footer_sha256: str) -> str:
    return f"{size} bytes, footer {footer_sha256}"


def _read_end(file: pa.NativeFile, num_bytes: int, size: int) -> bytes:
    file.seek(size - num_bytes)
    return bytes(file.read(num_bytes))
