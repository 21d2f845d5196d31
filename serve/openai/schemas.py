"""Requests of the OpenAI API: what is supported, under OpenAI's names, and some fields of other servers. What is not
supported is refused by name; where it asks for nothing (an empty list of tools), it is dropped."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.params import RANGES

# field -> values with which it asks for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}


def _describe_ranges(schema: dict[str, Any]) -> None:
    """Write the ranges that are checked when SamplingParams are made into a body's description."""
    for name, field in schema["properties"].items():
        low, high, _ = RANGES.get(name, (None, None, True))
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                kind |= {key: limit for key, limit in (("minimum", low), ("maximum", high)) if limit is not None}


class Body(BaseModel):
    """Strict: a number in quotes is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), json_schema_extra=_describe_ranges)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or (value is not None and value not in NEUTRAL.get(name, ()))
        }


class StreamOptions(Body):
    include_usage: bool = False


class GenerationBody(Body):
    """What both kinds of completion take. Ranges are those of engine/params.py.

    service_tier:       "flex" = in the background: waits for, and makes way to, all other requests
    top_k and below:    as in the job spec
    user, metadata:     taken and not used
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None


class CompletionBody(GenerationBody):
    """prompt: text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, description="16 by default")
    echo: bool = False
    logprobs: int | None = Field(None, description="number of best tokens at each place")


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A developer message is a system message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(GenerationBody):
    messages: list[Message]
    max_completion_tokens: int | None = Field(None, description="by default what the context holds")
    max_tokens: int | None = Field(None, description="the older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int | None = None


class TokenizeBody(Body):
    """One of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]
