"""Read `sampling.structured`, what a completion must obey, from a spec and from the columns of a row."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import PlainSerializer, PlainValidator

from moray.engine.errors import Problem, RequestError, show
from moray.engine.settings.problems import nearest
from moray.engine.settings.types import wrong
from moray.engine.structured.checker import check_apart
from moray.engine.structured.constraint import KINDS, Kind, Structured

PREFIX = "structured."  # of sampling.columns
COLUMN_KINDS: tuple[Kind, ...] = ("json_schema", "regex", "choice", "grammar")
COLUMN_NAMES = tuple(PREFIX + kind for kind in COLUMN_KINDS)
_CACHED = 1_024  # texts of columns whose check is remembered
_FORMS = "must be an object, its JSON text, or the path of a .json file"


def read_structured(value: Any) -> Structured | None:
    """Return what a spec has, checked: a map with one of KINDS, or null."""
    if value is None or isinstance(value, Structured):
        return value
    if not isinstance(value, Mapping):
        raise wrong(f"must be null or a map with one of {', '.join(KINDS)}, is {show(value)}")
    if unknown := [key for key in value if key not in KINDS]:
        raise wrong("; ".join(f"unknown key {key!r}{nearest(str(key), KINDS)}" for key in unknown))
    given = {kind: inner for kind, inner in value.items() if inner is not None}
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise wrong(f"must have exactly one of {', '.join(KINDS)}, has {found}; set the others to null")
    ((kind, inner),) = given.items()
    try:
        structured = Structured.from_value(kind, _read_file(inner) if kind == "json_schema" else inner)
        check_apart(structured)
    except RequestError as error:
        raise wrong(error.message) from None
    return structured


def _read_file(value: Any) -> Any:
    """Return the schema in the file that a text names; a text that is JSON, and any other value, as it is.

    A job travels without the file: its specs hold the text, in which properties keep their order.
    """
    if not isinstance(value, str) or value.lstrip().startswith("{") or value in ("true", "false"):
        return value
    if "://" in value or not value.endswith(".json"):
        raise wrong(f"json_schema {_FORMS} on this machine, is {show(value)}")
    try:
        return Path(value).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise wrong(f"json_schema: {value} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise wrong(f"json_schema: {value} is not UTF-8 text") from None


def dump_structured(structured: Structured | None) -> dict[str, Any] | None:
    """Return what read_structured reads back; a schema as text, because dumps of a fingerprint sort keys."""
    if structured is None:
        return None
    values: dict[str, Callable[[str], Any]] = {"choice": json.loads, "json_object": lambda text: True}
    return {structured.kind: values.get(structured.kind, str)(structured.text)}


def read_row(values: Mapping[str, Any]) -> Structured | None:
    """Return what a row's columns say; None where all are null.

    values:  name without PREFIX -> the row's value

    Raises RequestError("bad_grammar"), and "bad_params" where the row has two kinds.
    """
    given = {kind: value for kind, value in values.items() if value is not None}
    if len(given) > 1:
        message = f"a row may have one kind, this one has {' and '.join(given)}; set all but one to null"
        raise RequestError.bad_params([Problem("structured", message)])
    for kind, value in given.items():
        if kind == "json_schema" and isinstance(value, dict | bool):  # of JSON lines
            value = json.dumps(value, ensure_ascii=False)
        value = tuple(value) if isinstance(value, list) else value
        found = (_read_checked if _is_hashable(value) else _read_checked.__wrapped__)(cast("Kind", kind), value)
        if isinstance(found, RequestError):
            raise found
        return found
    return None


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=_CACHED)
def _read_checked(kind: Kind, value: Any) -> Structured | RequestError:
    """Return what a value of a column says, or its mistake: rows with the same text are checked once."""
    try:
        structured = Structured.from_value(kind, value)
        check_apart(structured)
    except RequestError as error:
        return error
    return structured


StructuredValue = Annotated[Structured | None, PlainValidator(read_structured), PlainSerializer(dump_structured)]
