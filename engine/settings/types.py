"""The types of settings: pydantic's own, with words for what each allows. Job specs and the endpoint share them.

A type is strict where its model is: pydantic converts nothing then, except a list where a tuple is meant. This module
and reader.py are the only ones of the engine that need pydantic, and nothing that runs a model imports them.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from moray.engine.quantization.kv_cache import KV_CACHE_DTYPES, KvCacheDtype
from moray.engine.quantization.scheme import ON_LOAD_KINDS, OnLoadKind
from moray.engine.settings.markers import PRESETS, Preset
from moray.engine.settings.problems import PLAIN, SHAPE
from moray.engine.settings.sizes import read_size


def wrong(message: str) -> PydanticCustomError:
    """Make the error of a check of our own; the message is shown unchanged."""
    return PydanticCustomError(PLAIN, "{message}", {"message": message})


def must(allowed: str) -> WrapValidator:
    """Make a validator that replaces pydantic's errors, of which a union has several, by one in words.

    allowed: what the value must be
    """

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            complete = [found["msg"] for found in error.errors(include_url=False) if found["type"] == PLAIN]
            raise wrong(complete[0]) if complete else PydanticCustomError(SHAPE, allowed) from None

    return WrapValidator(check)


def expect(is_valid: Callable[[Any], bool]) -> AfterValidator:
    """Make a check whose message is that of a `must` around it."""

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError
        return value

    return AfterValidator(check)


def _are_different(values: tuple[str, ...]) -> bool:
    return len(set(values)) == len(values)


def _is_json(value: Any) -> bool:
    """Return whether JSON can express a value: it has no infinite numbers."""
    try:
        return bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


def _are_gpus(value: float) -> bool:
    """Return whether a number is a share of one GPU, or of GPUs that a model can be split among; see NumRanks."""
    return 0 <= value <= 1 or value in (2, 4, 8)


as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Auto = Literal["auto"]
Text = Annotated[str, Field(pattern=r"\S")]  # with more than white space in it
MaybeText = Annotated[str | None, must("text or null")]
Texts = Annotated[tuple[Text, ...], Field(min_length=1), as_tuple]
Paths = Annotated[Text | Texts, must("a path or a list of paths")]
Keep = Annotated[
    Literal["all", "none"] | Annotated[Texts, expect(_are_different)],
    must("all, none or a list of different columns"),
]
Column = Annotated[Text | None, must("the name of a column")]
Labels = Annotated[dict[Text, Text], must("a map from node labels to text")]
Columns = Annotated[dict[Text, Text], must("a map from names to input columns")]
Json = Annotated[
    dict[Text, JsonValue],
    expect(_is_json),
    must("a map from names to text, numbers, true, false, null, lists and maps"),
]

Reasoning = Annotated[
    Preset | Annotated[dict[Literal["start", "end"], Text], Field(min_length=2)] | None,
    must(f"null, {', '.join(PRESETS)} or a map with the texts start and end"),
]
AutoKvCacheDtype = Annotated[KvCacheDtype | Auto, must(f"auto, {KV_CACHE_DTYPES[0]} or {KV_CACHE_DTYPES[1]}")]
Quantization = Annotated[OnLoadKind | None, must(f"null, {', '.join(ON_LOAD_KINDS[:-1])} or {ON_LOAD_KINDS[-1]}")]

Count = Annotated[PositiveInt, must("a whole number, 1 or more")]
AutoCount = Annotated[PositiveInt | Auto, must("auto or a whole number, 1 or more")]
NumRanks = Annotated[Literal[1, 2, 4, 8] | Auto, must("auto, 1, 2, 4 or 8")]
Gpus = Annotated[float, expect(_are_gpus), must("a number from 0 to 1, 2, 4 or 8")]
AutoGpus = Annotated[Annotated[float, expect(_are_gpus)] | Auto, must("auto, a number from 0 to 1, 2, 4 or 8")]
MaybeCount = Annotated[PositiveInt | None, must("null or a whole number, 1 or more")]
Whole = Annotated[int, Field(ge=0), must("a whole number, 0 or more")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), must("a number, 0 or more")]
_AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[_AboveZero, must("a number above 0")]
AutoAmount = Annotated[_AboveZero | Auto, must("auto or a number above 0")]
MaybeSeconds = Annotated[_AboveZero | None, must("null or a number above 0")]

_Bytes = Annotated[PositiveInt, BeforeValidator(read_size)]
Size = Annotated[_Bytes, must("bytes or a size such as 2GiB, more than 0")]
AutoSize = Annotated[_Bytes | Auto, must("auto, bytes or a size such as 2GiB, more than 0")]
