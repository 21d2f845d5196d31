"""Draw a sample: which rows are looked at. The same ones each time, spread over the whole input."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from batch.input.columns import prompt_columns
from batch.input.files import InputFiles
from batch.input.footer import InputFile
from batch.planning.plan import Slice
from batch.spec import JobSpec
from engine.errors import InputError

SAMPLE_ROWS = 1000
RUNS = 100  # of rows that lie together: it is runs that are drawn, since each costs a look into a file
READ_BYTES = 64 << 20  # of files, compressed; of larger inputs only the beginning of each row group is read
TEXT_BYTES = 32 << 20  # to tokenize; of longer rows fewer are drawn, but a row a run
LOOKS = 8  # files whose footers say how large the prompts' columns are


@dataclass(frozen=True)
class Widths:
    """Bytes of the prompts' columns, over all rows: in the files, and once they are read."""

    stored: float
    read: float


@dataclass(frozen=True)
class Draw:
    """Which rows make the sample: see Sample. runs: the slices of each"""

    input_rows: int
    runs: tuple[tuple[Slice, ...], ...]
    reach: float


def choose_rows(files: InputFiles, spec: JobSpec, seed: int = 0, rows: int = SAMPLE_ROWS) -> Draw:
    """About `rows` rows, of an input with no more all of them. Reads some footers.

    Raises InputError where a file is not there any more.
    """
    widths = _measure(files, prompt_columns(spec))
    groups = sum(len(file.row_group_rows) for file in files.files)
    reach = min(1.0, READ_BYTES / max(1.0, widths.stored * min(1.0, RUNS / max(1, groups))))
    rows = max(min(rows, RUNS), min(rows, int(TEXT_BYTES * files.num_rows / max(1.0, widths.read))))
    stretches = _within_reach(files.files, reach)
    within = sum(stretch.num_rows for stretch in stretches)
    if reach < 1.0 and within <= rows:  # not all there are, so each tells of others
        stretches = [Slice(piece.file, piece.first_row + i, 1) for piece in stretches for i in range(piece.num_rows)]
    if within < 2:
        reach, stretches = 1.0, _within_reach(files.files, 1.0)
    return Draw(files.num_rows, tuple(draw_runs(stretches, rows, seed)), reach)


def draw_runs(stretches: Sequence[Slice], rows: int, seed: int) -> list[tuple[Slice, ...]]:
    """Cut the rows of the stretches into runs of one length (the last may be shorter) and draw about `rows` rows of
    them, each run as likely as any other, in the order of the input. All rows where there are no more: a run a stretch.
    """
    ends = list(accumulate(stretch.num_rows for stretch in stretches))
    total = ends[-1] if ends else 0
    if total <= rows:
        return [(stretch,) for stretch in stretches]
    size = max(1, rows // RUNS)
    count = -(-total // size)
    drawn = sorted(random.Random(seed).sample(range(count), min(count, rows // size)))
    return [tuple(_cut(stretches, ends, number * size, min(size, total - number * size))) for number in drawn]


def _cut(stretches: Sequence[Slice], ends: Sequence[int], first: int, rows: int) -> Iterator[Slice]:
    """The slices that hold `rows` rows from row `first` of all the stretches together."""
    index = bisect_right(ends, first)
    while rows > 0:
        stretch = stretches[index]
        offset = first - (ends[index] - stretch.num_rows)
        taken = min(rows, stretch.num_rows - offset)
        if taken > 0:
            yield Slice(stretch.file, stretch.first_row + offset, taken)
        first, rows, index = first + taken, rows - taken, index + 1


def _within_reach(files: Sequence[InputFile], reach: float) -> list[Slice]:
    """The rows that may be drawn: all, or the first ones of each row group."""
    if reach >= 1.0:
        return [Slice(file.path, 0, file.num_rows) for file in files if file.num_rows]
    return [
        Slice(file.path, first, -int(-rows * reach // 1))
        for file in files
        for first, rows in zip(accumulate(file.row_group_rows, initial=0), file.row_group_rows, strict=False)
        if rows
    ]


def _measure(files: InputFiles, columns: Sequence[str]) -> Widths:
    """From the footers of some files, spread over all."""
    there = [file for file in files.files if file.num_rows]
    looked = there[:: max(1, len(there) // LOOKS)][:LOOKS]
    if not looked:
        return Widths(0.0, 0.0)
    with ThreadPoolExecutor(LOOKS) as pool:
        found = list(pool.map(lambda file: _column_bytes(files, file, columns), looked))
    share = sum(file.num_rows for file in there) / sum(file.num_rows for file in looked)
    return Widths(*(share * sum(sizes) for sizes in zip(*found, strict=True)))


def _column_bytes(files: InputFiles, file: InputFile, columns: Sequence[str]) -> tuple[int, int]:
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
