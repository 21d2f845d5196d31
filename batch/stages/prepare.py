"""Prepare: reads a shard's rows and makes them ready for the engine, or says of each why it cannot run."""

import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa

from batch.input.column_types import readable
from batch.input.reader import ShardReader
from batch.planning.plan import Shard, Slice
from batch.spec import JobSpec
from batch.stages.cells import TokenIds, read_values
from batch.stages.continuations import Encoded
from batch.stages.prompts import Prompts
from batch.stages.rows import KEPT, PREPARED, READY, Failure
from engine.errors import RequestError
from engine.params import SamplingParams


class _Row(NamedTuple):
    """A row's columns of READY, without those that follow from its place; nulls of one that cannot run."""

    num_prompt_tokens: int | None = None
    prompt_token_ids: TokenIds | None = None
    continuations: Sequence[TokenIds] | None = None
    params: SamplingParams | None = None
    error: Mapping[str, str] | None = None


class Prepare:
    """Turns shards into blocks.

    kept:           input columns to carry through, with their types in the output
    max_model_len:  the engine's; a row that needs more is refused here
    """

    def __init__(
        self, spec: JobSpec, reader: ShardReader, prompts: Prompts, kept: pa.Schema, max_model_len: int
    ) -> None:
        self._spec = spec
        self._reader = reader
        self._prompts = prompts
        self._kept = kept
        self._max_model_len = max_model_len

    def block(self, shard: Shard, part: str) -> pa.Table:
        """The shard's rows, ready or failed, in order.

        Raises InputError where a file is not what it was, StoreError where an object store does not give it: that is no
        fault of the rows.
        """
        block = pa.concat_tables([self._piece(piece) for piece in shard.slices])
        assert block.num_rows == shard.num_rows, f"shard {shard.index}: {block.num_rows} rows, not {shard.num_rows}"
        same = {"shard": shard.index, "shard_rows": shard.num_rows, "part": part}
        for name, value in same.items():
            field = PREPARED.field(name)
            block = block.append_column(field, pa.repeat(pa.scalar(value, field.type), block.num_rows))
        return block.select([*PREPARED.names, *(KEPT + name for name in self._kept.names)])

    def _piece(self, piece: Slice) -> pa.Table:
        try:
            return self._ready(piece, self._reader.read(piece))
        except (pa.ArrowException, OSError):
            return pa.concat_tables([self._group(part) for part in self._reader.split(piece)])

    def _group(self, piece: Slice) -> pa.Table:
        """Rows of one row group; once more, since on an object store the next attempt may go well."""
        try:
            return self._ready(piece, self._reader.read(piece))
        except (pa.ArrowException, OSError) as error:
            self._reader.check_reachable(piece)
            place = f"rows {piece.first_row} to {piece.first_row + piece.num_rows - 1} of {piece.file}"
            failure = Failure("read", "unreadable", f"{place} cannot be read: {str(error).splitlines()[0]}")
            kept = [pa.nulls(piece.num_rows, field.type) for field in self._kept]
            return self._block(piece, [_Row(error=failure.as_struct())] * piece.num_rows, kept)

    def _ready(self, piece: Slice, table: pa.Table) -> pa.Table:
        encoded = self._prompts.encode(table)
        rows = [self._check(*row) for row in zip(encoded, self._params(table), strict=True)]
        return self._block(piece, rows, [readable(table[name]) for name in self._kept.names])

    def _block(self, piece: Slice, rows: Sequence[_Row], kept: list[Any]) -> pa.Table:
        columns: dict[str, Sequence[Any]] = dict(zip(_Row._fields, zip(*rows, strict=True), strict=True))
        places = range(piece.first_row, piece.first_row + piece.num_rows)
        params: Sequence[SamplingParams | None] = columns["params"]
        columns |= {
            "source_file": [piece.file] * piece.num_rows,
            "source_row": places,
            "params": _pickle_each(params),
            "stream_key": [
                one and stream_key(one.seed, piece.file, row) for one, row in zip(params, places, strict=True)
            ],
        }
        made = [pa.array(columns[name], kind) for name, kind in READY]
        names = [*(name for name, _ in READY), *(KEPT + name for name in self._kept.names)]
        return pa.table([*made, *kept], names=names)

    def _params(self, table: pa.Table) -> list[SamplingParams | Failure]:
        columns = self._spec.sampling.columns
        if not columns:  # a job that scores never has any
            return [self._spec.sampling_params()] * table.num_rows
        values = [read_values(table, column) for column in columns.values()]
        return [self._row_params(dict(zip(columns, row, strict=True))) for row in zip(*values, strict=True)]

    def _row_params(self, values: dict[str, Any]) -> SamplingParams | Failure:
        try:
            return self._spec.sampling_params(values)
        except RequestError as error:
            return Failure("read", error.code, f"sampling.columns: {error.message}")

    def _check(self, encoded: Encoded | Failure, params: SamplingParams | Failure) -> _Row:
        if isinstance(encoded, Failure):
            return _Row(error=encoded.as_struct())
        if isinstance(params, Failure):
            return _Row(error=params.as_struct())
        prompt, continuations = encoded
        if (failure := self._check_length(prompt, continuations, params)) is not None:
            return _Row(len(prompt), error=failure.as_struct())
        return _Row(len(prompt), prompt, continuations, params)

    def _check_length(
        self, prompt: TokenIds, continuations: Sequence[TokenIds], params: SamplingParams
    ) -> Failure | None:
        more = max(map(len, continuations)) if continuations else params.max_tokens
        needed = len(prompt) + more
        if needed <= self._max_model_len:
            return None
        what = "continuation" if continuations else "max_tokens"
        return Failure(
            "too_long",
            "too_long",
            f"needs {needed:,} tokens (prompt {len(prompt):,} + {what} {more:,}); "
            f"this model holds {self._max_model_len:,}. Shorten it or raise model.max_model_len.",
        )


def _pickle_each(params: Sequence[SamplingParams | None]) -> list[bytes | None]:
    """Once each that there is: most rows share one."""
    pickled = {i: None if one is None else pickle.dumps(one) for i, one in {id(one): one for one in params}.items()}
    return [pickled[id(one)] for one in params]


def stream_key(seed: int, file: str, row: int) -> int:
    """64-bit key of a row's random stream: of what the row is, not of when or where it runs."""
    key = _begin_key(seed, file).copy()
    key.update(b"%d" % row)
    return int.from_bytes(key.digest(), "big")


@lru_cache(maxsize=64)
def _begin_key(seed: int, file: str) -> blake2b:
    return blake2b(f"{seed}\0{file}\0".encode(), digest_size=8)
