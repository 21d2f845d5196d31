"""Fields of a request that say what its text must obey: OpenAI's response_format, and vLLM's structured_outputs."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moray.serve.openai import refusals
from moray.serve.request_body import INVALID, MISSING, RequestBody, field_error


class JsonSchemaFormat(RequestBody):
    """Holds a JSON schema in OpenAI's wrapping.

    name, description:  for the reader; the model does not see them
    schema:             null = any JSON object
    strict:             the text always obeys the schema, whatever this is
    """

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestBody):
    """Says what the text must be: any text, a JSON object, or JSON that obeys a schema."""

    refused_values: ClassVar = {"type": refusals.FORMATS}

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise field_error("is required where type is 'json_schema'", "json_schema", code=MISSING)
        if self.type != "json_schema" and self.json_schema is not None:
            message = f"has no effect where type is {self.type!r}; write type 'json_schema', or leave it out"
            raise field_error(message, "json_schema", code=INVALID)
        return self


class StructuredOutputs(RequestBody):
    """Says what the text must obey, in vLLM's words; one of the fields.

    json:         a JSON schema, or its text
    regex:        a regular expression that the whole text matches
    choice:       the text is one of these
    grammar:      in Lark's or GBNF's syntax
    json_object:  true = any JSON object
    """

    refused: ClassVar = refusals.STRUCTURED

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Return the fields that ask for something, by their names in a body."""
        values = self.model_dump(by_alias=True, exclude_none=True)
        return {name: value for name, value in values.items() if (name, value) != ("json_object", False)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = list(self.given)
        if len(names) > 1:
            message = f"is one of several constraints ({', '.join(names)}); a text obeys one, give one"
            raise field_error(message, names[1], code=INVALID)
        return self
