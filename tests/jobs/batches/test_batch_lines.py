import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_batches import MODEL, URL, jsonl, line

from moray.jobs.batches import lines as lines_module
from moray.jobs.batches.lines import BOM, read_lines
from moray.jobs.batches.validate import MAX_ERRORS, Checked, Rules, check_lines

RULES = Rules((URL,), MODEL, max_requests=5, max_line_bytes=500)


@given(
    st.lists(st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")), max_size=12),
    st.booleans(),
    st.integers(1, 9),
)
def test_lines_are_those_of_the_file(texts: list[bytes], has_end: bool, block: int) -> None:
    content = b"\n".join(texts) + (b"\n" if has_end else b"")
    before, lines_module.BLOCK_BYTES = lines_module.BLOCK_BYTES, block
    try:
        found = list(read_lines(io.BytesIO(content), 6))
        for one in found:  # whoever begins at a line's offset reads the same
            again = next(read_lines(io.BytesIO(content[one.offset :]), 6, one.offset, one.number))
            assert again == one
    finally:
        lines_module.BLOCK_BYTES = before
    expected = []
    for number, text in enumerate(content.split(b"\n"), 1):
        kept = (text.removeprefix(BOM) if number == 1 else text).strip()
        if kept or len(text) > 6:
            expected.append((number, kept if len(text) <= 6 else None))
    assert [(one.number, one.text) for one in found] == expected


def test_a_long_line_is_left_out_and_counts() -> None:
    content = BOM + b"\n\na\n" + b"x" * 5_000_000 + b"\nb"
    found = list(read_lines(io.BytesIO(content), 100))
    assert [(one.number, one.text) for one in found] == [(3, b"a"), (4, None), (5, b"b")]


def check(content: bytes, rules: Rules = RULES) -> Checked:
    return check_lines(read_lines(io.BytesIO(content), rules.max_line_bytes), rules)


def without(value: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: one for key, one in value.items() if key != name}


@pytest.mark.parametrize(
    ("wrong", "code", "param", "message"),
    [
        (b"{", "invalid_json_line", None, "This line is not parseable as valid JSON."),
        (b"\xff", "invalid_json_line", None, "not parseable"),
        (b"[" * 400, "invalid_json_line", None, "not parseable"),
        (b"[]", "invalid_request", None, "must be a JSON object"),
        (without(line(1), "custom_id"), "missing_required_parameter", "custom_id", "Missing required parameter"),
        (line(1) | {"body": None}, "missing_required_parameter", "body", "'body'"),
        (line(1) | {"custom_id": 7}, "invalid_request", "custom_id", "must be text"),
        (line(1) | {"custom_id": "\ud800"}, "invalid_request", "custom_id", "must be text"),
        (line(1) | {"custom_id": "c0"}, "duplicate_custom_id", "custom_id", "'c0' is that of line 1 too"),
        (line(1) | {"method": "GET"}, "invalid_request", "method", "is 'GET'"),
        (line(1) | {"url": "/v1/x"}, "invalid_url", "url", "does not match the batch endpoint"),
        (line(1) | {"body": []}, "invalid_request", "body", "must be a JSON object"),
        (line(1) | {"extra": 1}, "invalid_request", "extra", "Unknown parameter"),
        (line(1, model=None), "missing_required_parameter", "body.model", "'body.model'"),
        (line(1, model="gpt"), "mismatched_model", "body.model", "for a single model"),
        (line(1, stream=True), "invalid_request", "body.stream", "not supported in a batch"),
        (line(1, prompt="x" * 500), "invalid_request", None, "longer than 500 B"),
    ],
)
def test_a_wrong_line(wrong: dict[str, Any] | bytes, code: str, param: str | None, message: str) -> None:
    text = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    (error,) = check(jsonl([line(0)]) + b"\n" + text + b"\n" + jsonl([line(2)])).errors
    assert (error.code, error.param, error.line) == (code, param, 3)
    assert message in error.message


def test_another_model_in_all_lines() -> None:
    errors = check(jsonl([line(number, model="gpt") for number in range(2)])).errors
    assert [(error.code, error.line) for error in errors] == [("model_not_found", 1), ("model_not_found", 2)]


def test_the_file_as_a_whole() -> None:
    assert [error.code for error in check(b" \n\n").errors] == ["empty_file"]
    (error,) = check(jsonl([line(number) for number in range(6)])).errors
    assert (error.code, error.line) == ("too_many_tasks", 6)
    good = check(b"\n" + jsonl([line(number) for number in range(5)]))
    assert not good.errors and list(good.numbers) == [2, 3, 4, 5, 6]
    many = check(b"{\n" * (MAX_ERRORS + 7), Rules((URL,), MODEL, 10_000, 500)).errors
    assert len(many) == MAX_ERRORS + 1 and "7 further lines" in many[-1].message
