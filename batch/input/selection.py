"""Find the rows of the files that are rows of the job, where input.where, sample or limit leave some out."""

import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from moray.batch.input.column_types import normalise
from moray.batch.input.condition import Condition
from moray.batch.input.hive import is_hive, read_keys
from moray.batch.input.input_file import InputFile
from moray.batch.input.layout import Layout
from moray.batch.input.line_rows import read_errors
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Slice
from moray.batch.spec.input_section import InputSpec
from moray.batch.spec.where import Node, find_columns, parse_where
from moray.engine.errors import InputError
from moray.engine.settings.problems import nearest

_THREADS = 4  # files whose columns are read at once
_BATCH_ROWS = 16_384  # rows that are compared at once

Rows = Sequence[int]


class Selection:
    """Selects rows of files as a spec says: those that meet the condition, then a sample of them, then the first ones.

    Lines that are no JSON have no columns to meet a condition with; they are selected, and become error rows.
    """

    def __init__(self, source: InputSpec, filesystem: fs.FileSystem, root: str, layout: Layout) -> None:
        self._source = source
        self._filesystem = filesystem
        self._root = root
        self._layout = layout

    def select(self, files: Sequence[InputFile]) -> dict[str, Rows]:
        """Return the rows of each file in ascending order.

        Raises InputError where the condition does not fit the columns, or they cannot be read.
        """
        rows: list[Rows] = [range(file.num_rows) for file in files]
        if self._source.where is not None:
            node = parse_where(self._source.where)
            _check_columns(node, files)
            rows = list(self._filter_each(files, node))
        if self._source.sample is not None:
            rows = _draw(rows, self._source.sample, self._source.sample_seed)
        if self._source.limit is not None:
            rows = list(_first(rows, self._source.limit))
        return {file.path: some for file, some in zip(files, rows, strict=True)}

    def _filter_each(self, files: Sequence[InputFile], node: Node) -> Iterator[Rows]:
        """Yield the rows of each file that meet the condition; nothing more is read once the limit is reached."""
        if self._source.limit is None or self._source.sample is not None:
            with ThreadPoolExecutor(_THREADS) as pool:
                yield from pool.map(lambda file: self._filter(file, node, file.num_rows), files)
            return
        wanted = self._source.limit
        for file in files:
            found = self._filter(file, node, wanted)
            wanted = max(0, wanted - len(found))
            yield found

    def _filter(self, file: InputFile, node: Node, wanted: int) -> Rows:
        names = find_columns(node)
        has = [name for name in names if name in file.schema.names]
        fields = [file.schema.field(name) for name in has]
        if self._layout.format == "parquet":
            fields = [field.with_type(normalise(field.type)) for field in fields]
        lacking = [pa.field(name, pa.null()) for name in names if name not in has]
        schema = pa.schema([*fields, *lacking])
        try:
            condition = Condition(node, schema)
            return self._matching(file, condition, all(map(is_hive, fields)) and not lacking, wanted)
        except (ValueError, OSError) as error:  # Arrow's exceptions are among them
            raise InputError(f"{file.path}: input.where: {str(error).splitlines()[0]}") from None

    def _matching(self, file: InputFile, condition: Condition, in_names: bool, wanted: int) -> Rows:
        """Return the rows that meet the condition.

        in_names:  whether all of its columns are in the names of folders
        wanted:    how many rows are enough
        """
        schema = condition.schema
        if in_names:
            keys = read_keys(file.path)
            one = pa.table({name: pa.array([keys[name]], pa.string()) for name in schema.names})
            return range(file.num_rows) if condition.evaluate(one)[0].as_py() else range(0)
        reader = ShardReader(self._filesystem, self._root, schema.names, schema, self._layout)
        found = array("q")
        for first, num_rows in self._spans(file, condition):
            if len(found) >= wanted:
                break
            table = reader.read(file.place(Slice(file.path, first, num_rows)))
            is_met = condition.evaluate(table).to_pylist()
            bad = read_errors(table)
            found.extend(first + index for index, met in enumerate(is_met) if met is True or index in bad)
        return found

    def _spans(self, file: InputFile, condition: Condition) -> Iterator[tuple[int, int]]:
        """Yield the first row and the number of rows of pieces of the file, without row groups in which, by their
        statistics, no row meets the condition."""
        if self._layout.format == "parquet":
            groups = self._find_groups(file, condition)
            starts = [0, *accumulate(file.row_group_rows)]
        else:
            groups, starts = range(1), [0, file.num_rows]
        for group in groups:
            for first in range(starts[group], starts[group + 1], _BATCH_ROWS):
                yield first, min(_BATCH_ROWS, starts[group + 1] - first)

    def _find_groups(self, file: InputFile, condition: Condition) -> Sequence[int]:
        """Return the row groups of a Parquet file in which rows may meet the condition, by their statistics."""
        fragment = ds.ParquetFileFormat().make_fragment(
            f"{self._root.rstrip('/')}/{file.path}", self._filesystem, partition_expression=_known(file)
        )
        try:
            groups = fragment.subset(condition.expression, schema=condition.schema).row_groups
        except pa.ArrowException:  # statistics that cannot be compared rule nothing out
            return range(len(file.row_group_rows))
        return [group.id for group in groups]


def _known(file: InputFile) -> pc.Expression:
    """Return what the names of folders say of all rows of a file."""
    found = pc.scalar(True)
    for name, value in read_keys(file.path).items():
        if name in file.schema.names and is_hive(file.schema.field(name)):
            found = found & (pc.field(name).is_null() if value is None else pc.field(name) == value)
    return found


def _check_columns(node: Node, files: Sequence[InputFile]) -> None:
    """Raise InputError where no file has a column of the condition."""
    known = list(dict.fromkeys(name for file in files for name in file.schema.names))
    if unknown := [name for name in find_columns(node) if name not in known]:
        raise InputError("\n".join(f"input.where: unknown column {n!r}{nearest(n, known)}" for n in unknown))


def _draw(rows: Sequence[Rows], sample: int | str, seed: int) -> list[Rows]:
    """Return rows that are drawn with equal probability, without replacement: the same ones each time."""
    total = sum(map(len, rows))
    if isinstance(sample, str):
        sample = math.ceil(Fraction(sample.rstrip("% ")) * total / 100)
    drawn = sorted(random.Random(seed).sample(range(total), min(sample, total)))
    found: list[Rows] = []
    first = 0
    for some in rows:
        begin, end = bisect_left(drawn, first), bisect_left(drawn, first + len(some))
        found.append(array("q", (some[index - first] for index in drawn[begin:end])))
        first += len(some)
    return found


def _first(rows: Sequence[Rows], limit: int) -> Iterator[Rows]:
    for some in rows:
        yield some[:limit]
        limit -= len(some[:limit])
