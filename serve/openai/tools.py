"""ToolUse: the tools of a chat, how the model is told of them, and how its calls are read."""

import json
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moray.engine.errors import RequestError, show
from moray.engine.structured import json_schema
from moray.engine.structured.constraint import Structured
from moray.engine.text.chat_template import reads_tools
from moray.engine.text.tokenizer import Tokenizer
from moray.engine.text.tool_calls import (
    MISTRAL,
    CallReader,
    ForcedCallReader,
    FreeCallReader,
    ToolFormat,
    find_tool_format,
)
from moray.serve.errors import ApiError
from moray.serve.grammar_compiler import Constraint
from moray.serve.openai.schemas import ChatBody
from moray.serve.openai.structured import find_constraint, refuse_both
from moray.serve.openai.tool_fields import NamedTool, Tool
from moray.serve.request_body import INVALID, UNSUPPORTED, UNSUPPORTED_VALUE

MAX_TOOLS = 128
TOOLS, CHOICE = "tools", "tool_choice"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_BEFORE = '{"name":'
_BETWEEN = ',"arguments":'
_ESCAPED = r"\u003a:="
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolUse:
    """Holds the tools that the model may call in one request. A RequestError about one has its path as its field.

    tools:          their definitions, which the model is shown
    callable:       those that it may call
    choice:         named = it calls the one, required = it calls one of them, auto = it may call some
    tool_format:    how its family writes calls; None where it is told to write them in a format of ours
    is_in_template: the chat template shows the tools; otherwise a system message does
    is_parallel:    it may call several
    """

    tools: Sequence[Tool]
    callable: Sequence[Tool]
    choice: Literal["named", "required", "auto"]
    tool_format: ToolFormat | None
    is_in_template: bool
    is_parallel: bool

    @property
    def constraint(self) -> Constraint | None:
        """Return what the text of a forced call must obey; None where the model is free to call."""
        return None if self.choice == "auto" else Constraint(TOOLS, self._make_structured, self._parts)

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates get them."""
        return [
            {
                "type": "function",
                "function": _describe(tool) | {"parameters": tool.function.parameters or _NO_ARGUMENTS},
            }
            for tool in self.tools
        ]

    def add_to(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation in which the model is told of the tools, where its chat template does not do that."""
        if self.is_in_template:
            return messages
        text = self._explain()
        if messages and messages[0]["role"] == "system":
            return [messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def reader(self) -> CallReader:
        """Return a reader of one answer."""
        if self.choice != "auto":
            return ForcedCallReader()
        assert self.tool_format is not None
        return FreeCallReader(self.tool_format, max_calls=None if self.is_parallel else 1)

    def new_id(self) -> str:
        """Return an id for a call. Mistral's templates take ids of nine letters and digits alone."""
        if self.tool_format is MISTRAL:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def finish_reason(self, reason: str, num_calls: int) -> str:
        """Return the finish_reason of an answer. That of a named tool stays `stop`, as OpenAI's does."""
        return "tool_calls" if reason == "stop" and num_calls and self.choice != "named" else reason

    def _explain(self) -> str:
        """Return the text that tells the model of the tools that it must call."""
        which = "this function" if len(self.callable) == 1 else "one of these functions"
        lines = [json.dumps(_describe(tool), ensure_ascii=False) for tool in self.callable]
        example = '{"name": the name of the function, "arguments": an object that follows its parameters}'
        return "\n".join([f"Answer with a call of {which}, as JSON and nothing else: {example}", *lines])

    def _make_structured(self) -> Structured:
        """Return the grammar of a call of one of the tools. Raises RequestError.

        Each schema is a document of its own, so that references in it stay right.
        """
        names, rules = [], []
        for number, (tool, schema) in enumerate(zip(self.callable, self._schemas(), strict=True)):
            prepared = json_schema.prepare(json.loads(schema.text))
            text = json.dumps(prepared, ensure_ascii=False, separators=(",", ":"))
            # `::=` would make GBNF of the grammar.
            rules.append(f"arguments_{number}: %json {text.replace('::=', _ESCAPED)}")
            names.append(f"{_quote(json.dumps(tool.function.name) + _BETWEEN)} arguments_{number}")
        head = f"start: {_quote(_BEFORE)} ({' | '.join(names)}) {_quote('}')}"
        return Structured.from_value("grammar", "\n".join([head, *rules]))

    def _parts(self) -> Iterator[tuple[str, Structured]]:
        """Yield each schema with its place, so that a mistake in it has one."""
        for tool, schema in zip(self.callable, self._schemas(), strict=True):
            yield self._place(tool), schema

    def _schemas(self) -> Iterator[Structured]:
        """Yield the schemas of the arguments of the tools that may be called. Raises RequestError."""
        for tool in self.callable:
            schema = _NO_ARGUMENTS if tool.function.parameters is None else tool.function.parameters
            if (kind := schema.get("type", "object")) != "object":
                message = f"must be the schema of an object, has the type {show(kind)}"
                raise RequestError("bad_grammar", message, self._place(tool))
            try:
                yield Structured.from_value("json_schema", schema if "type" in schema else {"type": "object"} | schema)
            except RequestError as error:
                raise RequestError(error.code, error.message, self._place(tool)) from None

    def _place(self, tool: Tool) -> str:
        """Return the path of a tool's parameters in the request."""
        number = next(i for i, one in enumerate(self.tools) if one is tool)
        return f"{TOOLS}[{number}].function.parameters"


def find_tool_use(body: ChatBody, tokenizer: Tokenizer) -> ToolUse | None:
    """Return how a request uses tools, or None where the model calls none. Raises ApiError."""
    choice, tools = body.tool_choice, body.tools or []
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if not tools:
        raise ApiError(400, INVALID, f"{CHOICE}: needs tools; the request has none", param=CHOICE)
    _check_tools(tools)
    template = tokenizer.tool_template
    is_in_template, tool_format = bool(template) and reads_tools(template), find_tool_format(template)
    callable_tools: Sequence[Tool] = tools
    if isinstance(choice, NamedTool):
        callable_tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not callable_tools:
            names = ", ".join(tool.function.name for tool in tools)
            message = f"{CHOICE}.function.name: {choice.function.name!r} is not one of the tools: {names}"
            raise ApiError(400, INVALID, message, param=f"{CHOICE}.function.name")
    elif choice != "required":
        _check_auto(body, is_in_template, tool_format)
    use = ToolUse(
        tools,
        callable_tools,
        "named" if isinstance(choice, NamedTool) else "required" if choice == "required" else "auto",
        tool_format,
        is_in_template,
        body.parallel_tool_calls is not False,
    )
    other = find_constraint(body)
    if other is not None:
        refuse_both(TOOLS, other.param)
    return use


def _check_tools(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, INVALID, f"{TOOLS}: must be at most {MAX_TOOLS}, are {len(tools):,}", param=TOOLS)
    names: set[str] = set()
    for number, tool in enumerate(tools):
        name, param = tool.function.name, f"{TOOLS}[{number}].function.name"
        if _NAME.fullmatch(name) is None:
            message = f"{param}: must be 1 to 64 letters, digits, _ or -, is {name[:80]!r}"
            raise ApiError(400, INVALID, message, param=param)
        if name in names:
            raise ApiError(400, INVALID, f"{param}: {name!r} is the name of an earlier tool too", param=param)
        names.add(name)


def _check_auto(body: ChatBody, is_in_template: bool, tool_format: ToolFormat | None) -> None:
    """Raise ApiError where the model cannot be left free to call tools."""
    param, given = (TOOLS, "without tool_choice") if body.tool_choice is None else (CHOICE, "'auto'")
    code = UNSUPPORTED if body.tool_choice is None else UNSUPPORTED_VALUE
    force = "set tool_choice to 'required' or to a tool, which works with every model"
    if not is_in_template:
        message = f"{param}: {given} is not supported: this model's chat template knows no tools; {force}"
        raise ApiError(400, code, message, param=param)
    if tool_format is None:
        message = f"{param}: {given} is not supported: calls in this model's own format are not read; {force}"
        raise ApiError(400, code, message, param=param)
    for number, tool in enumerate(body.tools or []):
        if tool.function.strict:
            strict = f"{TOOLS}[{number}].function.strict"
            message = f"{strict}: true is not supported where the model is free to call; leave it out, or {force}"
            raise ApiError(400, UNSUPPORTED_VALUE, message, param=strict)


def _describe(tool: Tool) -> dict[str, Any]:
    """Return what the model is shown of a tool."""
    described = tool.function.model_dump(include={"name", "description"}, exclude_none=True)
    return described | {"parameters": tool.function.parameters or _NO_ARGUMENTS}


def _quote(text: str) -> str:
    """Write a text as Lark does."""
    return json.dumps(text)
