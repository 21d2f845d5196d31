"""Checks the input file of a batch, all or nothing: a file with one wrong line is not run at all.

Only the lines' frame is checked. A body that is wrong for the model is answered with its error when it runs.
"""

import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moray.batch.units import count, size
from moray.engine.errors import show
from moray.jobs.batches.lines import Line
from moray.jobs.batches.record import LineError

FIELDS = ("custom_id", "method", "url", "body")
MAX_ERRORS = 1000  # that are kept; one more says how many others there are
MAX_CUSTOM_ID = 512  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can express and UTF-8 cannot


@dataclass(frozen=True)
class Rules:
    """States what a file must be like.

    urls:         paths that its requests may have
    model:        the model that they must name
    max_requests, max_line_bytes:  limits of the file, and of a line
    """

    urls: Collection[str]
    model: str
    max_requests: int
    max_line_bytes: int


@dataclass
class Checked:
    """Holds what was found in a file.

    offsets, numbers:  of the line of each request
    errors:            what is wrong; empty where the file can be run
    """

    errors: list[LineError] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    numbers: "array[int]" = field(default_factory=lambda: array("q"))


def check_lines(lines: Iterable[Line], rules: Rules) -> Checked:
    """Check the lines of a file. Raises nothing: what is wrong is in the result."""
    found, seen, num_errors = Checked(), dict[str, int](), 0
    model: str | None = None
    for line in lines:
        if len(found.offsets) == rules.max_requests:
            message = f"The file has more than {count(rules.max_requests, 'request')}, this endpoint's limit."
            found.errors.append(LineError("too_many_tasks", message, None, line.number))
            num_errors += 1
            break
        found.offsets.append(line.offset)
        found.numbers.append(line.number)
        error, model = _check(line, rules, seen, model)
        if error is not None:
            num_errors += 1
            if len(found.errors) < MAX_ERRORS:
                found.errors.append(error)
    if num_errors > len(found.errors):
        message = f"{count(num_errors - len(found.errors), 'further line')} of the file are wrong too."
        found.errors.append(LineError("more_errors", message))
    if not found.offsets:
        found.errors.append(LineError("empty_file", "The file has no requests."))
    return found


def _check(line: Line, rules: Rules, seen: dict[str, int], model: str | None) -> tuple[LineError | None, str | None]:
    """Return the first mistake in a line, and the model of the file's first line that names one."""
    if line.text is None:
        message = f"The line is longer than {size(rules.max_line_bytes)}, this endpoint's limit of a request."
        return LineError("invalid_request", message, None, line.number), model
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError):
        message = "This line is not parseable as valid JSON."
        return LineError("invalid_json_line", message, None, line.number), model
    named = value["body"].get("model") if isinstance(value, dict) and isinstance(value.get("body"), dict) else None
    if model is None and isinstance(named, str):
        model = named
    mistakes = _find_mistakes(value, rules, seen, line.number, model)
    code, message, param = next(mistakes, (None, "", None))
    return (None if code is None else LineError(code, message, param, line.number)), model


def _find_mistakes(
    value: Any, rules: Rules, seen: dict[str, int], number: int, model: str | None
) -> Iterator[tuple[str, str, str | None]]:
    """Yield code, message and param of each mistake in the JSON value of a line."""
    if not isinstance(value, dict):
        yield "invalid_request", "The line must be a JSON object.", None
        return
    for name in FIELDS:
        if value.get(name) is None:
            yield "missing_required_parameter", f"Missing required parameter: '{name}'.", name
    for name in value.keys() - set(FIELDS):
        yield "invalid_request", f"Unknown parameter: {show(name)}. A line has {', '.join(FIELDS)}.", name
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID or _SURROGATE.search(custom_id):
        yield "invalid_request", f"custom_id must be text of 1 to {MAX_CUSTOM_ID} characters.", "custom_id"
    elif (first := seen.setdefault(custom_id, number)) != number:
        yield "duplicate_custom_id", f"The custom_id {show(custom_id)} is that of line {first} too.", "custom_id"
    if value.get("method") != "POST":
        yield "invalid_request", f"The method must be 'POST', is {show(value.get('method'))}.", "method"
    if value.get("url") not in rules.urls:
        allowed = ", ".join(rules.urls)
        message = f"The URL provided for this request does not match the batch endpoint: it must be {allowed}"
        yield "invalid_url", f"{message}, is {show(value.get('url'))}.", "url"
    if not isinstance(body, dict):
        yield "invalid_request", "body must be a JSON object.", "body"
        return
    if body.get("model") is None:
        yield "missing_required_parameter", "Missing required parameter: 'body.model'.", "body.model"
    elif body["model"] != model:
        message = f"The model {show(body['model'])} is not that of the lines before, {show(model)}. Each batch must "
        yield "mismatched_model", message + "contain requests for a single model.", "body.model"
    elif model != rules.model:
        message = f"The model {show(model)} is not here; this endpoint has {show(rules.model)}."
        yield "model_not_found", message, "body.model"
    if body.get("stream"):
        yield "invalid_request", "body.stream: true is not supported in a batch.", "body.stream"
