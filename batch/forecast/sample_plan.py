"""Choose the rows of a sample: the same ones each time, spread over the whole input."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.input.columns import prompt_columns
from moray.batch.input.files import InputFiles
from moray.batch.input.input_file import InputFile
from moray.batch.shards import Slice
from moray.batch.spec import JobSpec
from moray.engine.errors import InputError

SAMPLE_ROWS = 1000
RUNS = 100  # runs of adjacent rows: runs are sampled, not rows, since each costs a read of a file
READ_BYTES = 64 << 20  # compressed bytes to read at most; of larger inputs only the start of each row group is read
TEXT_BYTES = 32 << 20  # bytes to tokenize at most; of long rows fewer are sampled, but at least one a run
FOOTERS = 8  # files whose footers are read for the size of the prompts' columns


@dataclass(frozen=True)
class ColumnBytes:
    """Holds the size of the prompts' columns over all rows, in bytes: compressed in the files, and uncompressed."""

    compressed: float
    uncompressed: float


@dataclass(frozen=True)
class SamplePlan:
    """Describes which rows make the sample; see PromptSample.

    runs: the slices of each run
    """

    input_rows: int
    runs: tuple[tuple[Slice, ...], ...]
    scanned_fraction: float


def choose_rows(files: InputFiles, spec: JobSpec, seed: int = 0, rows: int = SAMPLE_ROWS) -> SamplePlan:
    """Choose about `rows` rows, or all of an input that has no more. Reads some footers.

    Raises InputError where a file is not there any more.
    """
    sizes = _measure(files, prompt_columns(spec))
    groups = sum(len(file.row_group_rows) for file in files.files)
    scanned_fraction = min(1.0, READ_BYTES / max(1.0, sizes.compressed * min(1.0, RUNS / max(1, groups))))
    rows = max(min(rows, RUNS), min(rows, int(TEXT_BYTES * files.num_rows / max(1.0, sizes.uncompressed))))
    if files.selected is not None:  # these rows alone are the job's, wherever they are
        scanned_fraction = 1.0
    spans = _scanned_spans(files, scanned_fraction)
    within = sum(span.num_rows for span in spans)
    if scanned_fraction < 1.0 and within <= rows:  # all of these are read, but they still represent other rows
        spans = [Slice(piece.file, piece.first_row + i, 1) for piece in spans for i in range(piece.num_rows)]
    if within < 2:
        scanned_fraction, spans = 1.0, _scanned_spans(files, 1.0)
    runs = tuple(files.place(run) for run in sample_runs(spans, rows, seed))
    return SamplePlan(files.num_rows, runs, scanned_fraction)


def sample_runs(spans: Sequence[Slice], rows: int, seed: int) -> list[tuple[Slice, ...]]:
    """Cut the rows of the spans into runs of one length (the last may be shorter) and sample about `rows` rows.

    Each run has the same probability; runs keep the order of the input. Where there are no more than `rows` rows, each
    span is a run.
    """
    ends = list(accumulate(span.num_rows for span in spans))
    total = ends[-1] if ends else 0
    if total <= rows:
        return [(span,) for span in spans]
    size = max(1, rows // RUNS)
    count = -(-total // size)
    numbers = sorted(random.Random(seed).sample(range(count), min(count, rows // size)))
    return [tuple(_cut(spans, ends, number * size, min(size, total - number * size))) for number in numbers]


def _cut(spans: Sequence[Slice], ends: Sequence[int], first: int, rows: int) -> Iterator[Slice]:
    """Yield the slices that hold `rows` rows from row `first` of the concatenated spans."""
    index = bisect_right(ends, first)
    while rows > 0:
        span = spans[index]
        offset = first - (ends[index] - span.num_rows)
        num_rows = min(rows, span.num_rows - offset)
        if num_rows > 0:
            yield Slice(span.file, span.first_row + offset, num_rows)
        first, rows, index = first + num_rows, rows - num_rows, index + 1


def _scanned_spans(files: InputFiles, scanned_fraction: float) -> list[Slice]:
    """Return the rows that may be sampled: all that the job has, or the first ones of each row group."""
    if scanned_fraction >= 1.0:
        return [span for path, rows in files.rows for span in _neighbours(path, rows)]
    return [
        Slice(file.path, first, -int(-rows * scanned_fraction // 1))
        for file in files.files
        for first, rows in zip(accumulate(file.row_group_rows, initial=0), file.row_group_rows, strict=False)
        if rows
    ]


def _neighbours(path: str, rows: Sequence[int]) -> Iterator[Slice]:
    """Yield the slices of adjacent rows of a file."""
    if not isinstance(rows, range):
        first = 0
        for index in range(1, len(rows) + 1):
            if index == len(rows) or rows[index] != rows[index - 1] + 1:
                yield Slice(path, rows[first], index - first)
                first = index
    elif rows:
        yield Slice(path, rows[0], len(rows))


def _measure(files: InputFiles, columns: Sequence[str]) -> ColumnBytes:
    """Estimate the size of the columns from the footers of some files, spread over all."""
    with_rows = [file for file in files.files if file.num_rows]
    chosen = with_rows[:: max(1, len(with_rows) // FOOTERS)][:FOOTERS]
    if not chosen:
        return ColumnBytes(0.0, 0.0)
    with ThreadPoolExecutor(FOOTERS) as pool:
        found = list(pool.map(lambda file: _column_bytes(files, file, columns), chosen))
    factor = sum(file.num_rows for file in with_rows) / sum(file.num_rows for file in chosen)
    return ColumnBytes(*(factor * sum(sizes) for sizes in zip(*found, strict=True)))


def _column_bytes(files: InputFiles, file: InputFile, columns: Sequence[str]) -> tuple[int, int]:
    if files.format == "jsonl":  # a line is read as a whole
        return file.size, file.size
    try:
        with files.filesystem.open_input_file(files.full_path(file.path)) as source:
            metadata = pq.read_metadata(source)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path}: cannot be opened any more: {error}") from None
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    ours = [i for i, path in enumerate(paths) if any(f"{path}.".startswith(f"{name}.") for name in columns)]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in ours]
    return sum(chunk.total_compressed_size for chunk in chunks), sum(chunk.total_uncompressed_size for chunk in chunks)
