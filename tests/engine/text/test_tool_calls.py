"""Calls of tools in the text of a model, whatever pieces it comes in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.engine.text.tool_calls import (
    HERMES,
    MISTRAL,
    CallPart,
    CallReader,
    ForcedCallReader,
    FreeCallReader,
    find_tool_format,
)

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ("add", '{"a": 1}')


def read(reader: CallReader, text: str, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls, each with all of its arguments, of a text that is cut into pieces."""
    ends = sorted({cut % (len(text) + 1) for cut in cuts} | {len(text)})
    pieces = [reader.push(text[start:end]) for start, end in zip([0, *ends], ends, strict=False)] + [reader.finish()]
    calls: list[tuple[str, str]] = []
    for part in (part for piece in pieces for part in piece.parts):
        if part.name is not None:
            assert part.call == len(calls)
            calls.append((part.name, ""))
        calls[part.call] = calls[part.call][0], calls[part.call][1] + part.arguments
    assert reader.num_calls == len(calls)
    return "".join(piece.text for piece in pieces), calls


CUTS = st.lists(st.integers(0, 1000), max_size=20)


@pytest.mark.parametrize(
    ("text", "expected", "calls"),
    [
        ("102 ", "102 ", []),
        (CALL, "", [ADD]),
        (f"I add. \n{CALL}\n{CALL}", "I add.", [ADD, ADD]),
        (f"I add. {CALL}\n done now ", "I add. done now", [ADD]),
        (CALL.removesuffix("</tool_call>"), "", [ADD]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("a <tool_call>nothing</tool_call> <tool", "a <tool_call>nothing</tool_call> <tool", []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "", [("f", '{"a": "\\ud800"}')]),
    ],
)
@given(cuts=CUTS)
def test_calls_in_tags(text: str, expected: str | None, calls: list[tuple[str, str]], cuts: list[int]) -> None:
    assert read(FreeCallReader(HERMES), text, cuts) == (text if expected is None else expected, calls)


@given(cuts=CUTS)
def test_a_list_of_calls_at_the_end(cuts: list[int]) -> None:
    text = 'Well [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]'
    assert read(FreeCallReader(MISTRAL), text, cuts) == ("Well", [ADD, ("f", "{}")])
    assert read(FreeCallReader(MISTRAL, max_calls=1), text, cuts) == ("Well", [ADD])


@given(
    name=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    arguments=st.dictionaries(st.text(max_size=4), st.recursive(st.text(max_size=4) | st.integers(), st.lists)),
    cuts=CUTS,
)
def test_a_forced_call(name: str, arguments: dict[str, object], cuts: list[int]) -> None:
    written = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    text = f'{{"name":"{name}","arguments":{written}}}'
    assert read(ForcedCallReader(), text, cuts) == ("", [(name, written)])
    cut = text[: max(0, len(text) - 3)]  # by max_tokens
    shown = cut.partition('"arguments":')[2]
    assert read(ForcedCallReader(), cut, cuts) == ("", [(name, shown)] if '"arguments":' in cut else [])


def test_the_name_comes_before_the_arguments() -> None:
    reader = ForcedCallReader()
    assert [reader.push(piece).parts for piece in ('{"name":"a', 'dd","arguments":', '{"a"', ":1}}")] == [
        (),
        (CallPart(0, "add", ""),),
        (CallPart(0, None, '{"a"'),),
        (CallPart(0, None, ":1}"),),
    ]


def test_formats_are_found_in_templates() -> None:
    assert find_tool_format("{{ '<tool_call>' }}") is HERMES
    assert find_tool_format("{{ '[TOOL_CALLS] ' }}") is MISTRAL
    assert find_tool_format("{{ '<tool_call><function=' }}") is None  # Qwen3-Coder's XML
    assert find_tool_format("{{ messages }}") is None
