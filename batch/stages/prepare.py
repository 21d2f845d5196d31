"""Prepare: reads a shard's rows and prepares them for the engine, or finds why a row cannot run."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa

from moray.batch.input.casts import readable
from moray.batch.input.hive import is_hive
from moray.batch.input.line_rows import read_errors
from moray.batch.input.reader import ShardReader
from moray.batch.json_values import decode_json
from moray.batch.retry import StoreError, retry_with_backoff
from moray.batch.shards import Shard, Slice
from moray.batch.spec import JobSpec
from moray.batch.stages.block_schemas import KEPT, PREPARED, READY, Failure
from moray.batch.stages.column_values import TokenIds, read_values
from moray.batch.stages.continuations import Encoded
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.row_params import pack_params
from moray.batch.stages.shard_item import ShardItem
from moray.engine.core.limits import check_length
from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams


class _PreparedRow(NamedTuple):
    """Holds a row's columns of READY, except those that follow from its place; None in a row that cannot run."""

    num_prompt_tokens: int | None = None
    begins_open: bool | None = None
    prompt_token_ids: TokenIds | None = None
    continuations: Sequence[TokenIds] | None = None
    params: SamplingParams | None = None
    error: Mapping[str, str] | None = None


class Prepare:
    """Turns shards into blocks.

    kept:           input columns to carry through, with their types in the output
    max_model_len:  the engine's limit in tokens; a row that needs more fails here
    """

    def __init__(
        self, spec: JobSpec, reader: ShardReader, prompts: Prompts, kept: pa.Schema, max_model_len: int
    ) -> None:
        self._spec = spec
        self._reader = reader
        self._prompts = prompts
        self._kept = kept
        self._max_model_len = max_model_len

    def __call__(self, item: ShardItem) -> pa.Table:
        """Return the block of a shard, after several attempts where an object store does not deliver it; see `block`.

        Raises InputError where a file has changed since the job was planned.
        """
        self._reader.expect(item.file_digests)
        return retry_with_backoff(lambda: self.block(item.shard, item.part), StoreError)

    def block(self, shard: Shard, part: str) -> pa.Table:
        """Return the block of a shard: its rows, prepared or failed, in order.

        part:  name of the shard's part

        Raises InputError where a file has changed, and StoreError where an object store does not deliver it, which is
        not the fault of the rows.
        """
        block = pa.concat_tables([self._read_slice(piece) for piece in shard.slices])
        assert block.num_rows == shard.num_rows, f"shard {shard.index}: {block.num_rows} rows, not {shard.num_rows}"
        same = {"shard": shard.index, "shard_rows": shard.num_rows, "part": part}
        for name, value in same.items():
            field = PREPARED.field(name)
            block = block.append_column(field, pa.repeat(pa.scalar(value, field.type), block.num_rows))
        return block.select([*PREPARED.names, *(KEPT + name for name in self._kept.names)])

    def _read_slice(self, piece: Slice) -> pa.Table:
        try:
            return self._encode_rows(piece, self._reader.read(piece))
        except (pa.ArrowException, OSError):
            return pa.concat_tables([self._read_row_group(part) for part in self._reader.split(piece)])

    def _read_row_group(self, piece: Slice) -> pa.Table:
        """Read rows of one row group.

        Reading them again makes sense because on an object store the next attempt may succeed.
        """
        try:
            return self._encode_rows(piece, self._reader.read(piece))
        except (pa.ArrowException, OSError) as error:
            self._reader.check_reachable(piece)
            place = f"rows {piece.first_row} to {piece.end - 1} of {piece.file}"
            failure = Failure("read", "unreadable", f"{place} cannot be read: {str(error).splitlines()[0]}")
            kept = [pa.nulls(piece.num_rows, field.type) for field in self._kept]
            return self._build_block(piece, [_PreparedRow(error=failure.as_struct())] * piece.num_rows, kept)

    def _encode_rows(self, piece: Slice, table: pa.Table) -> pa.Table:
        encoded = self._prompts.encode(table)
        rows = [self._check(*row) for row in zip(encoded, self._params(table), strict=True)]
        for index, message in read_errors(table).items():
            rows[index] = _PreparedRow(error=Failure("read", "invalid_json", message).as_struct())
        return self._build_block(piece, rows, [readable(table[name]) for name in self._kept.names])

    def _build_block(self, piece: Slice, rows: Sequence[_PreparedRow], kept: list[Any]) -> pa.Table:
        columns: dict[str, Sequence[Any]] = dict(zip(_PreparedRow._fields, zip(*rows, strict=True), strict=True))
        source_rows = piece.rows
        params: Sequence[SamplingParams | None] = columns["params"]
        columns |= pack_params(params)
        columns |= {
            "source_file": [piece.file] * piece.num_rows,
            "source_row": source_rows,
            "stream_key": [
                item and stream_key(item.seed, piece.file, row) for item, row in zip(params, source_rows, strict=True)
            ],
        }
        ready_columns = [pa.array(columns[name], kind) for name, kind in READY]
        names = [*(name for name, _ in READY), *(KEPT + name for name in self._kept.names)]
        return pa.table([*ready_columns, *kept], names=names)

    def _params(self, table: pa.Table) -> list[SamplingParams | Failure]:
        columns = self._spec.sampling.columns
        if not columns:  # a job that scores never has sampling columns
            return [self._spec.sampling_params()] * table.num_rows
        values = [_sampling_values(table, column) for column in columns.values()]
        return [self._row_params(dict(zip(columns, row, strict=True))) for row in zip(*values, strict=True)]

    def _row_params(self, values: dict[str, Any]) -> SamplingParams | Failure:
        if failed := [value for value in values.values() if isinstance(value, Failure)]:
            return failed[0]
        try:
            return self._spec.sampling_params(values)
        except RequestError as error:
            return Failure("read", error.code, f"sampling.columns: {error.message}")

    def _check(self, encoded: Encoded | Failure, params: SamplingParams | Failure) -> _PreparedRow:
        if isinstance(encoded, Failure):
            return _PreparedRow(error=encoded.as_struct())
        if isinstance(params, Failure):
            return _PreparedRow(error=params.as_struct())
        prompt, continuations = encoded
        try:
            if continuations:
                check_length(
                    len(prompt),
                    max(map(len, continuations)),
                    self._max_model_len,
                    "continuation",
                    key="model.max_model_len",
                )
            else:
                check_length(len(prompt), params.max_tokens, self._max_model_len, key="model.max_model_len")
        except RequestError as error:
            return _PreparedRow(len(prompt), error=Failure("too_long", error.code, error.message).as_struct())
        return _PreparedRow(len(prompt), self._prompts.begins_open(prompt), prompt, continuations, params)


def _sampling_values(table: pa.Table, column: str) -> list[Any]:
    """Return the values of a column. Text in the names of folders may stand for a number, or for true or false."""
    values = read_values(table, column)
    if not is_hive(table.schema.field(column)):
        return values
    found = []
    for text in values:
        try:
            found.append(None if text is None else decode_json(text))
        except ValueError:  # it is refused as what it is
            found.append(text)
    return found


def stream_key(seed: int, file: str, row: int) -> int:
    """Return the 64-bit key of a row's random stream: it depends on what the row is, not on when or where it runs."""
    key = _begin_key(seed, file).copy()
    key.update(b"%d" % row)
    return int.from_bytes(key.digest(), "big")


@lru_cache(maxsize=64)
def _begin_key(seed: int, file: str) -> blake2b:
    return blake2b(f"{seed}\0{file}\0".encode(), digest_size=8)
