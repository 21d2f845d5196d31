"""Find what the text of a request must obey, in any of the fields that can say it."""

from functools import partial
from typing import Any

from moray.engine.structured.constraint import Kind, Structured
from moray.serve.errors import ApiError
from moray.serve.grammar_compiler import Constraint
from moray.serve.openai.schemas import GenerationBody
from moray.serve.request_body import INVALID

FORMAT, OUTPUTS = "response_format", "structured_outputs"
KINDS: dict[str, Kind] = {
    "json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar", "json_object": "json_object",
}  # fmt: skip


def find_constraint(body: GenerationBody) -> Constraint | None:
    """Return what the text of a request must obey, or None where it is free. Raises ApiError where it has two."""
    found = [one for one in (_of_format(body), _of_outputs(body)) if one is not None]
    if len(found) > 1:
        refuse_both(FORMAT, OUTPUTS)
    return found[0] if found else None


def refuse_both(first: str, second: str) -> None:
    """Raise ApiError for a request with two constraints."""
    message = f"{second}: {first} constrains the text already; a text obeys one, give one"
    raise ApiError(400, INVALID, message, param=second)


def _of_format(body: GenerationBody) -> Constraint | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema = None if wanted.json_schema is None else wanted.json_schema.schema_
    return _constraint(FORMAT, "json_object", True) if schema is None else _constraint(FORMAT, "json_schema", schema)


def _of_outputs(body: GenerationBody) -> Constraint | None:
    given: dict[str, Any] = {} if body.structured_outputs is None else body.structured_outputs.given
    return next((_constraint(OUTPUTS, KINDS[name], value) for name, value in given.items()), None)


def _constraint(param: str, kind: Kind, value: object) -> Constraint:
    return Constraint(param, partial(Structured.from_value, kind, value))
