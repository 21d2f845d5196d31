"""RequestBody: the base class of all request bodies.

Bodies are strict: null means a field's default, and a field that is not supported is refused by name, never ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from moray.engine.params import RANGES, Range
from moray.engine.settings.problems import PLAIN, SHAPE, closest

UNKNOWN, UNSUPPORTED, UNSUPPORTED_VALUE = "unknown_parameter", "unsupported_parameter", "unsupported_value"
INVALID, MISSING = "invalid_parameter", "missing_required_parameter"


@dataclass(frozen=True)
class Refusal:
    """Describes a field that clients send and this endpoint does not support.

    why:      end of the error's message, after the field's name
    neutral:  values that ask for nothing and so are accepted, as null is
    """

    why: str
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: Any) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.neutral)


def field_error(message: str, *at: str | int, code: str) -> PydanticCustomError:
    """Make an error with a complete message about the field at the path `at` below the object that is validated."""
    return PydanticCustomError(PLAIN, "{message}", {"message": message, "at": at, "code": code})


def choose_by(find_tag: Callable[[Any], str | None], allowed: str) -> Discriminator:
    """Choose the member of a union by the tag that `find_tag` returns for a value.

    Tags are in angle brackets, which keeps them out of the paths in errors. A value without a tag (None) is refused
    with a message that lists what is `allowed`.
    """
    return Discriminator(find_tag, custom_error_type=SHAPE, custom_error_message=allowed)


def ignored_field() -> Any:
    """Make a field that is accepted and ignored, because it changes no answer here."""
    return Field(None, description=WITHOUT_EFFECT)


WITHOUT_EFFECT = "without effect here"
# JSON has one kind of number: 6.0 is a whole one.
Int = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]
TopK = Annotated[Int, AfterValidator(lambda v: 0 if v == -1 else v)]  # vLLM writes -1 for all tokens


def _describe_ranges(schema: dict[str, Any]) -> None:
    """Add the ranges that SamplingParams checks to a body's JSON schema."""
    for name, field in schema["properties"].items():
        low, high = RANGES.get(name, Range())
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                kind |= {key: limit for key, limit in (("minimum", low), ("maximum", high)) if limit is not None}


class RequestBody(BaseModel):
    """A JSON object of a request. Its types are strict: a number in quotes is not a number.

    refused:         known fields that are not supported; supported ones are declared as fields
    refused_values:  field -> value that is known and not supported -> end of the error's message; checked first
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), json_schema_extra=_describe_ranges)
    refused: ClassVar[Mapping[str, Refusal]] = {}
    refused_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, reasons in cls.refused_values.items():
            value = values.get(name)
            if isinstance(value, str) and value in reasons:
                raise field_error(f"{value!r} {reasons[value]}", name, code=UNSUPPORTED_VALUE)
        return {name: value for name, value in values.items() if cls._is_given(name, value)}

    @classmethod
    def _fields(cls) -> Mapping[str, FieldInfo]:
        """Return the fields by their names in a body, which differ where pydantic has a method of that name."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def _is_given(cls, name: str, value: Any) -> bool:
        """Return whether a field asks for something. Raises an error for one that is unknown or not supported."""
        field = cls._fields().get(name)
        if field is not None:
            return value is not None or field.is_required()
        if value is None:
            return False
        if name not in cls.refused:
            hint = closest(name, cls._fields()) or "; /docs lists the fields there are"
            raise field_error(f"is not a field that this endpoint has{hint}", name, code=UNKNOWN)
        if cls.refused[name].is_neutral(value):
            return False
        raise field_error(cls.refused[name].why, name, code=UNSUPPORTED)
