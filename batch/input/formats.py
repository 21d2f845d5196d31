"""The formats of input files, and which files have them, by their names."""

import posixpath
import re
from collections.abc import Iterable
from typing import Literal

from moray.batch.spec.input_section import FormatChoice
from moray.engine.errors import InputError

Format = Literal["parquet", "jsonl"]
WANTED: dict[FormatChoice, str] = {
    "auto": "*.parquet, *.parq, *.pq, *.jsonl or *.ndjson",
    "parquet": "*.parquet, *.parq or *.pq",
    "jsonl": "*.jsonl, *.ndjson or *.json",
}
_FLAGS = re.IGNORECASE | re.DOTALL
_PARQUET = re.compile(r".*\.(parquet|parq|pq)(\.(snappy|gz|gzip|zstd|zst|lz4|br|brotli))?", _FLAGS)
_LINES = re.compile(r".*\.(jsonl|ndjson)(\.(gz|gzip|zst|zstd))?", _FLAGS)
JSON = re.compile(r".*\.json(\.(gz|gzip|zst|zstd))?", _FLAGS)
CSV = re.compile(r".*\.(csv|tsv)(\.\w+)?", _FLAGS)


def is_wanted(name: str, choice: FormatChoice) -> bool:
    """Return whether a file in a folder is read, by its name."""
    if _PARQUET.fullmatch(name):
        return choice != "jsonl"
    if _LINES.fullmatch(name):
        return choice != "parquet"
    return choice == "jsonl" and JSON.fullmatch(name) is not None


def find_format(paths: Iterable[str], choice: FormatChoice) -> Format:
    """Return the one format of the files, by their names; a name that tells nothing is Parquet's."""
    if choice != "auto":
        return choice
    formats: dict[Format, str] = {}
    for path in sorted(paths):
        name = posixpath.basename(path)
        if CSV.fullmatch(name):
            raise InputError(f"{path}: {convert_csv(name)}")
        if JSON.fullmatch(name):
            raise InputError(f"{path}: set input.format: jsonl if the file has one JSON object a line")
        formats.setdefault("jsonl" if _LINES.fullmatch(name) else "parquet", name)
    if len(formats) > 1:
        both = " and ".join(f"{format} ({name})" for format, name in formats.items())
        raise InputError(f"the files are of two formats, {both}; set input.format to read those of one")
    return next(iter(formats))


def convert_csv(name: str) -> str:
    """Return what to do with a CSV file."""
    target = f"{name.partition('.')[0]}.parquet"
    return f"""CSV is not read; convert it: duckdb -c "COPY (FROM read_csv('{name}')) TO '{target}'\""""
