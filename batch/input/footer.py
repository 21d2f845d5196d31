"""Read a Parquet file's footer: the file's schema and rows, and a digest that identifies it."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from moray.batch.input.input_file import InputFile

_TRAILER = 8  # bytes after the footer: its length, then the magic
MAGIC = b"PAR1"  # first and last bytes of a Parquet file
_FIRST_READ = 64 * 1024  # bytes from the end of a file that are read first: enough for most footers
_SPARK = b"org.apache.spark.version"  # a key in the metadata of files that Spark wrote
INT96_UNIT = "us"  # as Spark reads them; Arrow's nanoseconds overflow for the year 9999 and give another date


def read_footer(filesystem: fs.FileSystem, full_path: str, path: str, size: int) -> InputFile:
    """Read a file's footer, in one request for most files.

    Raises ValueError where the file is not Parquet or cut short, OSError where it cannot be read.
    """
    footer = read_footer_bytes(filesystem, full_path, size)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(footer), coerce_int96_timestamp_unit=INT96_UNIT)
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
        identity=identify(size, footer),
        schema=schema,
        cut_columns=_find_cut_columns(parquet),
    )


def has_small_values(filesystem: fs.FileSystem, full_path: str, size: int, column: str, limit: int) -> bool:
    """Return whether the footer says that no stored number of a column is larger than a limit, without its sign.

    Raises ValueError where the file is not Parquet, OSError where it cannot be read.
    """
    metadata = pq.read_metadata(pa.BufferReader(read_footer_bytes(filesystem, full_path, size)))
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema != column:
                continue
            found = chunk.statistics
            if found is None or not found.has_min_max:
                if found is None or found.null_count != group.num_rows:
                    return False
            elif max(-found.min_raw, found.max_raw) > limit:
                return False
    return True


def _find_cut_columns(parquet: pq.ParquetFile) -> tuple[str, ...]:
    """Return the columns of INT96 timestamps, at any depth, of a file that was not written by Spark, which has no
    nanoseconds. The footer does not show whether a value has any."""
    if _SPARK in (parquet.metadata.metadata or {}):
        return ()
    columns = (parquet.schema.column(index) for index in range(parquet.metadata.num_columns))
    return tuple(dict.fromkeys(one.path.partition(".")[0] for one in columns if one.physical_type == "INT96"))


def read_footer_bytes(filesystem: fs.FileSystem, full_path: str, size: int) -> bytes:
    """Return the footer with its trailer.

    Raises ValueError where the file is not Parquet or cut short, OSError where it cannot be read.
    """
    with filesystem.open_input_file(full_path) as file:
        tail = _read_end(file, min(size, _FIRST_READ), size)
        if len(tail) < _TRAILER or tail[-4:] != MAGIC:
            end = "is empty" if not tail else f"ends in {tail[-4:]!r}, not in {MAGIC!r}"
            raise ValueError(f"is not a Parquet file, or cut short: {end}")
        length = int.from_bytes(tail[-_TRAILER:-4], "little") + _TRAILER
        if length > size:
            raise ValueError(f"is cut short: its footer takes {length:,} bytes, the file has {size:,}")
        return tail[-length:] if length <= len(tail) else _read_end(file, length, size)


def identify(size: int, footer: bytes) -> str:
    """Return the InputFile.identity of a file from its size and footer."""
    return f"{size} bytes, footer {hashlib.sha256(footer).hexdigest()}"


def _read_end(file: pa.NativeFile, num_bytes: int, size: int) -> bytes:
    file.seek(size - num_bytes)
    return bytes(file.read(num_bytes))
