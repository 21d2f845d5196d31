"""Carries sampling parameters in prepared blocks, in which rows with the same ones share them.

What completions must obey has a column of its own: a schema of kilobytes is in a block once, even where each row has
another seed.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from moray.engine.params import SamplingParams

PICKLED = pa.dictionary(pa.int32(), pa.binary())  # each different value is in a block once
COLUMNS = [("params", PICKLED), ("structured", PICKLED)]


def pack_params(params: Sequence[SamplingParams | None]) -> Mapping[str, Sequence[bytes | None]]:
    """Return the values of COLUMNS for the parameters of each row; None for a row that cannot run."""
    return {"params": _pickle_each(params, _without_structured), "structured": _pickle_each(params, _structured)}


def unpack_params(block: pa.Table) -> list[SamplingParams | None]:
    """Return the parameters of each row of a block, one object for all rows that have equal ones."""
    known: dict[tuple[bytes, bytes | None], SamplingParams] = {}
    kinds: dict[bytes, Any] = {}  # so that rows whose other parameters differ share it too
    found: list[SamplingParams | None] = []
    for pair in zip(*(_values(block[name]) for name, _ in COLUMNS), strict=True):
        pickled, structured = pair
        if pickled is not None and pair not in known:
            params = pickle.loads(pickled)
            if structured is not None:
                if structured not in kinds:
                    kinds[structured] = pickle.loads(structured)
                params = replace(params, structured=kinds[structured])
            known[pair] = params
        found.append(None if pickled is None else known[pair])
    return found


def _without_structured(params: SamplingParams) -> SamplingParams:
    return params if params.structured is None else replace(params, structured=None)


def _structured(params: SamplingParams) -> Any:
    return params.structured


def _pickle_each(params: Sequence[SamplingParams | None], part: Callable[[SamplingParams], Any]) -> list[bytes | None]:
    """Pickle a part of the parameters of each row; that of equal objects once, because most rows share one."""
    pickled: dict[int, bytes | None] = {}
    for item in {id(item): item for item in params}.values():
        wanted = None if item is None else part(item)
        pickled[id(item)] = None if wanted is None else pickle.dumps(wanted)
    return [pickled[id(item)] for item in params]


def _values(column: pa.ChunkedArray) -> list[bytes | None]:
    """Return the values of a column of PICKLED, one object for all equal ones of a chunk."""
    found: list[bytes | None] = []
    for chunk in column.chunks:
        different = chunk.dictionary.to_pylist()
        found += [None if index is None else different[index] for index in chunk.indices.to_pylist()]
    return found
