"""Bodies of the OpenAI API's requests: the fields that are supported, under OpenAI's names and some of vLLM's.

refusals.py lists those that are not supported.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Tag, model_validator

from moray.serve.openai import refusals
from moray.serve.openai.structured_fields import ResponseFormat, StructuredOutputs
from moray.serve.openai.tool_fields import Tool, ToolCallParam, ToolChoice
from moray.serve.request_body import INVALID, MISSING, Int, RequestBody, TopK, choose_by, field_error, ignored_field


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _prompt(value: Any) -> str | None:
    if not isinstance(value, list):
        return "<text>" if isinstance(value, str) else None
    first = value[0] if value else ""
    if isinstance(first, bool):
        return None
    return "<texts>" if isinstance(first, str) else "<tokens>" if isinstance(first, int) else "<lists>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[int], Tag("<tokens>")]
    | Annotated[list[list[int]], Tag("<lists>")],
    choose_by(_prompt, "text, token ids, or a list of either"),
]
Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    choose_by(_text_or_list, "text or a list of texts"),
]


class StreamOptions(RequestBody):
    """Lists the options of a streamed answer.

    continuous_usage_stats: with include_usage, every chunk has the usage so far
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = ignored_field()


class GenerationBody(RequestBody):
    """Lists the fields that requests for completions of either kind share. Ranges are those of engine/params.py.

    service_tier:       "flex" = low priority: waits for all other requests, and is preempted for them
    response_format:    what the text must be, in OpenAI's form
    structured_outputs: the same in vLLM's form, which has more kinds
    top_k and below:    as in the job spec
    """

    refused: ClassVar = refusals.GENERATION

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int | None = None
    seed: Int | None = None
    stop: Stop | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    service_tier: Literal["auto", "default", "fast", "flex", "priority", "scale"] | None = None

    metadata: dict[str, Any] | None = ignored_field()
    prompt_cache_key: str | None = ignored_field()
    prompt_cache_options: dict[str, Any] | None = ignored_field()
    prompt_cache_retention: str | None = ignored_field()
    safety_identifier: str | None = ignored_field()
    user: str | None = ignored_field()

    top_k: TopK | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None


class CompletionBody(GenerationBody):
    """A request for completions.

    prompt: text, token ids, or a list of either; null = the beginning-of-sequence token alone
    """

    refused: ClassVar = refusals.COMPLETION

    prompt: Prompt | None
    max_tokens: Int | None = Field(None, description="16 by default")
    echo: bool | None = None
    logprobs: Int | None = Field(None, description="number of best tokens at each position")
    best_of: Int | None = Field(None, description="1, or n: all samples are returned")


class TextPart(RequestBody):
    """A part of a message's content."""

    refused_values: ClassVar = {"type": refusals.PARTS}

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = ignored_field()
    prompt_cache_breakpoint: dict[str, Any] | None = ignored_field()


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<list>")],
    choose_by(_text_or_list, "text or a list of text parts"),
]


class Message(RequestBody):
    """A message of a conversation. A developer's message becomes a system message.

    name and reasoning go to the chat template too, which may use them. The fields without effect are those of answers
    that clients send back unchanged.

    content:       may be null in an answer that calls tools
    tool_calls:    of an answer: the calls in it, for chat templates that show them
    tool_call_id:  of a tool's message: the call whose result it is
    """

    refused: ClassVar = refusals.MESSAGE
    refused_values: ClassVar = {"role": refusals.ROLES}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallParam] | None = None
    tool_call_id: str | None = None

    annotations: list[Any] | None = ignored_field()
    id: str | None = ignored_field()
    parsed: Any | None = ignored_field()
    provider_specific_fields: dict[str, Any] | None = ignored_field()
    reasoning_details: list[Any] | None = ignored_field()
    type: Literal["text", "message"] | None = ignored_field()

    @model_validator(mode="before")
    @classmethod
    def _read_content(cls, values: Any) -> Any:
        """Let an answer that calls tools have no content at all."""
        return {"content": None} | values if isinstance(values, dict) and values.get("tool_calls") else values

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise field_error("are of answers: only an assistant's message has them", "tool_calls", code=INVALID)
        if self.content is None and not self.tool_calls:
            raise field_error("must be text or a list of text parts, is null", "content", code=INVALID)
        if self.role == "tool" and self.tool_call_id is None:
            raise field_error("is required: the id of the call whose result this is", "tool_call_id", code=MISSING)
        if self.tool_call_id is not None and self.role != "tool":
            raise field_error("is the id of a call: only a tool's message has it", "tool_call_id", code=INVALID)
        return self


class ChatBody(GenerationBody):
    """A request for a chat completion.

    chat_template_kwargs:  further variables for the chat template, such as enable_thinking
    reasoning_effort:      a variable of that name, for chat templates that read it
    include_reasoning:     false = leave the reasoning out of the answer, where the endpoint splits it off
    tools, tool_choice:    functions that the model may call, and whether it must
    parallel_tool_calls:   false = at most one call
    """

    refused: ClassVar = refusals.CHAT

    messages: list[Message]
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Int | None = Field(None, description="by default what the context holds")
    max_tokens: Int | None = Field(None, description="the older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Int | None = None


class TokenizeBody(RequestBody):
    """A request to encode text: give one of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(RequestBody):
    """A request to decode token ids."""

    model: str | None = None
    tokens: list[int]
