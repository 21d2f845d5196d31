"""Tables of every type that Parquet files can hold, with the values that break conversions, for hypothesis."""

from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

Array = Any  # pa.Array

_I64 = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, -1, 2**62, -(2**62), 253402300800 * 10**6]))
_I32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([0, 1, -1, 2932897, 86400, 86400000]))
_BYTES = st.one_of(st.sampled_from([b"", b"fine", b"\xff\xfe", b"caf\xe9", b"<|end|>"]), st.binary(max_size=8))
ROWS = 4


def _lists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | values, min_size=ROWS, max_size=ROWS)


def _viewed(bits: int, *kinds: pa.DataType) -> st.SearchStrategy[Array]:
    """Return integers of that many bits, reinterpreted as another type without a check."""
    whole = pa.int64() if bits == 64 else pa.int32()
    numbers = _lists(_I64 if bits == 64 else _I32).map(lambda values: pa.array(values, whole))
    return st.builds(lambda array, kind: array.view(kind), numbers, st.sampled_from(kinds))


def text_of(values: list[bytes | None], kind: pa.DataType) -> Array:
    """Return text of any bytes, as careless programs write it."""
    binary = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    if kind == pa.string_view():
        return pa.Array.from_buffers(pa.string(), len(values), binary.buffers()).cast(kind)
    return pa.Array.from_buffers(kind, len(values), binary.buffers())


_UNITS = ("ms", "us", "ns")
_TIMES = _viewed(
    64,
    *(pa.timestamp(unit, zone) for unit in _UNITS for zone in (None, "UTC", "Europe/Berlin", "Mars/Olympus")),
    *(pa.duration(unit) for unit in ("s", *_UNITS)),
    pa.time64("us"),
    pa.time64("ns"),
)
_TEXTS = st.builds(text_of, _lists(_BYTES), st.sampled_from([pa.string(), pa.large_string(), pa.string_view()]))
_FLOATS = st.builds(
    pa.array,
    _lists(st.sampled_from([0.0, 1.5, -1.0, float("nan"), float("inf"), 1e300])).map(
        lambda values: [v if v is None or v != 1e300 else 60000.0 for v in values]
    ),
    st.sampled_from([pa.float16(), pa.float32(), pa.float64()]),
)
_WHOLE = st.sampled_from([pa.int8(), pa.int16(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int64()])
_NUMBERS = st.builds(lambda values, kind: pa.array(values, pa.int64()).cast(kind, safe=False), _lists(_I64), _WHOLE)
_DECIMALS = st.builds(
    lambda values, kind: pa.array([None if v is None else v % 10**5 for v in values], pa.int64()).cast(kind),
    _lists(_I64),
    st.sampled_from([pa.decimal128(38, 2), pa.decimal256(76, 9), pa.decimal128(20, 0)]),
)
_BINARY = _lists(st.binary(min_size=16, max_size=16)).map(lambda values: pa.array(values, pa.binary(16)))


def _extended(kind: Any, storage: st.SearchStrategy[Array]) -> st.SearchStrategy[Array]:
    return storage.map(lambda array: pa.ExtensionArray.from_storage(kind, array))


_FLAT = st.one_of(
    _TEXTS,
    _TIMES,
    _viewed(32, pa.date32(), pa.time32("ms"), pa.float32()),
    _FLOATS,
    _NUMBERS,
    _DECIMALS,
    _BINARY,
    _lists(st.booleans()).map(lambda values: pa.array(values, pa.bool_())),
    st.just(pa.nulls(ROWS)),
    _lists(_BYTES).map(lambda values: pa.array(values, pa.binary())),
    _lists(_BYTES).map(lambda values: pa.array(values, pa.binary_view())),
    _lists(st.sampled_from(["a", "b"])).map(lambda values: pa.array(values, pa.string()).dictionary_encode()),
    _extended(pa.json_(), st.builds(text_of, _lists(_BYTES), st.just(pa.string()))),
    _extended(pa.uuid(), _BINARY),
    _extended(pa.bool8(), _lists(st.integers(-2, 2)).map(lambda values: pa.array(values, pa.int8()))),
    _extended(pa.opaque(pa.int64(), "a", "b"), _lists(_I64).map(lambda values: pa.array(values, pa.int64()))),
)


def _list_of(values: Array, lengths: list[int | None], kind: str) -> Array:
    """Return lists that divide the values between them, in order; None is a null list."""
    ends = [min(length or 0, ROWS) for length in lengths]
    offsets, sizes = [], []
    begin = 0
    for end in ends:
        size = min(end, len(values) - begin)
        offsets.append(begin)
        sizes.append(size)
        begin += size
    mask = pa.array([length is None for length in lengths])
    if kind == "view":
        whole = pa.ListViewArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(sizes, pa.int32()), values)
        return (
            whole
            if not any(mask.to_pylist())
            else whole.take(pa.array([None if gone else i for i, gone in enumerate(mask.to_pylist())], pa.int64()))
        )
    large = kind == "large"
    edges = pa.array([*offsets, begin], pa.int64() if large else pa.int32())
    return (pa.LargeListArray if large else pa.ListArray).from_arrays(edges, values, mask=mask)


_LENGTHS = st.lists(st.none() | st.integers(0, 3), min_size=ROWS, max_size=ROWS)


def _nested(inner: st.SearchStrategy[Array]) -> st.SearchStrategy[Array]:
    mask = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(pa.array)
    return st.one_of(
        st.builds(_list_of, inner, _LENGTHS, st.sampled_from(["plain", "large", "view"])),
        st.builds(
            lambda a, b, gone: pa.StructArray.from_arrays([a, b], ["role", "content"], mask=gone), inner, inner, mask
        ),
        inner.map(lambda values: pa.MapArray.from_arrays(list(range(ROWS + 1)), pa.array(list("abcd")), values)),
    )


def arrays(depth: int = 2) -> st.SearchStrategy[Array]:
    """Return columns of ROWS rows."""
    found: st.SearchStrategy[Array] = _FLAT
    for _ in range(depth):
        found = _FLAT | _nested(found)
    return found


def texts() -> st.SearchStrategy[Array]:
    return _TEXTS


def chats() -> st.SearchStrategy[Array]:
    """Return messages whose fields hold anything, with role and content as text of any bytes."""
    messages = st.builds(
        lambda role, content, other: pa.StructArray.from_arrays([role, content, other], ["role", "content", "other"]),
        st.builds(text_of, _lists(st.sampled_from([b"user", b"system", b"\xff"])), st.just(pa.string())),
        _TEXTS,
        _FLAT,
    )
    return st.builds(_list_of, messages, _LENGTHS, st.sampled_from(["plain", "large", "view"]))


def id_lists() -> st.SearchStrategy[Array]:
    return st.builds(_list_of, _NUMBERS, _LENGTHS, st.sampled_from(["plain", "large", "view"]))


def text_lists() -> st.SearchStrategy[Array]:
    return st.builds(_list_of, _TEXTS, _LENGTHS, st.sampled_from(["plain", "large", "view"]))
