"""Fields of a request and of messages about tools, as OpenAI has them: functions that a model may call."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from moray.serve.openai import refusals
from moray.serve.request_body import RequestBody, choose_by


class FunctionDefinition(RequestBody):
    """Describes a function that the model may call.

    parameters:  JSON schema of its arguments, an object; null = it has none
    strict:      the arguments always obey the schema; those of a forced call do in any case
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestBody):
    """Offers a tool that the model may call: a function."""

    refused_values: ClassVar = {"type": refusals.TOOL_TYPES}

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestBody):
    """Names a function."""

    name: str


class NamedTool(RequestBody):
    """Names the tool that must be called."""

    refused_values: ClassVar = {"type": refusals.CHOICE_TYPES}

    type: Literal["function"]
    function: NamedFunction


def _word_or_tool(value: Any) -> str | None:
    return "<word>" if isinstance(value, str) else "<tool>" if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<tool>")],
    choose_by(_word_or_tool, "'none', 'auto', 'required', or the name of a tool as an object"),
]


class CalledFunctionParam(RequestBody):
    """Holds the function of a call, in an answer that is sent back.

    arguments: JSON text of an object
    """

    name: str
    arguments: str


class ToolCallParam(RequestBody):
    """Holds a call in an answer that is sent back. The index of a stream's call has no effect."""

    refused_values: ClassVar = {"type": refusals.TOOL_TYPES}

    id: str
    type: Literal["function"] = "function"
    function: CalledFunctionParam
    index: int | None = Field(None, description="without effect here")
