"""Conversations in every form in which people store them: one list of messages, or an error that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY, make_spec, write_input

from moray.batch.input import read_input
from moray.batch.stages.block_schemas import Failure
from moray.batch.stages.chats import ChatReader
from moray.batch.stages.column_values import read_values
from moray.batch.stages.prompts import Prompts
from moray.engine.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Add 1 and 3."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def read(value: Any, format: Any = "auto", words: tuple[str, ...] = ("tool_calls", "tool")) -> Any:
    found = ChatReader(format, lambda word: word in words).read(value)
    if isinstance(found, Failure):
        assert (found.stage, found.code) == ("template", "bad_messages")
        return found.message
    return found


@pytest.mark.parametrize(
    "value",
    [
        [USER],
        [USER | {"name": None}],
        json.dumps([USER]),
        [list(USER.items())],
        [USER | {"content": [{"type": "text", "text": "Add 1 "}, {"type": "text", "text": "and 3.", "url": None}]}],
        [USER | {"content": [[("type", "text"), ("text", "Add 1 and 3.")]]}],
        [{"from": "human", "value": "Add 1 and 3."}],
        [{"from": "user", "value": "Add 1 and 3.", "role": None, "content": None}],
        json.dumps([{"from": "human", "value": "Add 1 and 3."}]),
        [USER | {"tool_calls": []}],
    ],
)
def test_one_conversation_in_many_forms(value: Any) -> None:
    assert read(value) == [USER]


def test_roles_of_sharegpt() -> None:
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("observation", "o"), ("tool", "t")]
    assert [m["role"] for m in read([{"from": a, "value": b} for a, b in turns])] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
    ]
    both = [USER | {"from": "gpt", "value": "no"}]
    assert read(both) == both and read(both, "sharegpt")[0]["role"] == "assistant"
    assert read([{"from": "human", "value": "x"}], "openai") == [{"from": "human", "value": "x"}]
    assert read([{"from": "moon", "value": "x"}]) == (
        "message 0: from must be one of human, user, gpt, assistant, system, tool, observation, is 'moon'"
    )


def test_tool_calls() -> None:
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
    found = read(chat)
    assert found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert found[2] == {"role": "tool", "content": "4"}
    assert read(chat, words=("tool",)) == "message 1 has tool_calls, which the chat template does not know"
    assert read(chat, words=("tool_calls",)) == "message 2 is of role tool, which the chat template does not know"
    broken = CALL | {"function": {"name": "add", "arguments": "{"}}
    assert read([USER | {"tool_calls": [broken]}]).startswith("arguments of tool call 0 of message 0 are not JSON: EOF")
    assert read([USER | {"function_call": {}}]) == "message 0: function_call is not supported; write tool_calls"


def test_nulls_of_structs_are_no_arguments_and_those_of_json_are() -> None:
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("a", "b")]
    (value,) = pa.array([[USER | {"tool_calls": calls}]]).to_pylist()
    assert value[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    assert read(value)[0]["tool_calls"] == calls
    reader = ChatReader("auto", lambda word: True)
    (message,) = reader.read(value, keeps_nulls=True)
    assert isinstance(message, dict) and message["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    text = json.dumps(value)
    assert reader.read(text) == reader.read(value, keeps_nulls=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "messages are text that is not JSON: expected value at line 1 column 1"),
        ('{"role": "user"}', "messages must be a list, is {'role': 'user'}"),
        (["hello"], "message 0 must have role and content, is 'hello'"),
        ([USER, [1, 2]], "message 1 must have role and content, is [1, 2]"),
        (
            [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "part 0 of message 0 is of type 'image_url'; the model reads text parts only",
        ),
        ([USER | {"content": [{"type": "text"}]}], "part 0 of message 0 must have a text, is null"),
        ([USER | {"content": ["x"]}], "part 0 of message 0 must have role and content, is 'x'"),
        ([USER | {"tool_calls": "x"}], "tool_calls of message 0 must be a list, is 'x'"),
    ],
)
def test_what_is_refused(value: Any, message: str) -> None:
    assert read(value) == message


MAP = pa.list_(pa.map_(pa.string(), pa.string()))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[USER]]),
        pa.array([json.dumps([USER])]),
        pa.array([json.dumps([USER])], pa.json_()),
        pa.array([[list(USER.items())]], MAP),
        pa.array([[{"from": "human", "value": "Add 1 and 3."}]]),
        pa.array([[{"role": "user", "content": [{"type": "text", "text": "Add 1 and 3."}]}]]),
    ],
)
def test_columns_of_parquet(column: Any, tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"chat": column})
    spec = make_spec(tmp_path, input={"messages": "chat"})
    assert read_input(spec).num_rows == 1
    tokenizer = Tokenizer(TINY)
    ((ids, _),) = Prompts(spec, tokenizer, 2000).encode(pq.read_table(tmp_path / "in/a.parquet"))
    assert ids == tokenizer.encode_chat([USER])


def test_a_template_that_knows_no_tools_gives_an_error_row(tmp_path: Path) -> None:
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    table = pa.table({"chat": [chat]})
    assert read_values(table, "chat") == [[{"tool_calls": None, **chat[0]}, chat[1]]]
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %}"
    )
    for text, known in ((template + "{% endfor %}", True), ("{{ messages[0].content }}", False)):
        spec = make_spec(tmp_path, input={"messages": "chat"}, template={"chat": text})
        (found,) = Prompts(spec, Tokenizer(TINY), 2000).encode(table)
        assert isinstance(found, Failure) is not known
        assert known or "message 1 has tool_calls, which the chat template does not know" in str(found)
