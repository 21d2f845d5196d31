"""SamplingParams: how to sample a request. It has each sampling field once: its type, range, default and meaning.

The sampling section of a job spec inherits the fields, the endpoint's requests are converted to them, and both are
checked by find_problems.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, NamedTuple, get_origin, get_type_hints

from moray.engine.errors import Problem, RequestError, show
from moray.engine.structured.constraint import Structured

MAX_STOP_STRINGS = 64


class Range(NamedTuple):
    """Limits the numbers that a field may have, both ends included; None = no limit."""

    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class SamplingFields:
    """Has the fields that a job spec and a request share.

    max_tokens:          maximum tokens to generate; 0 = only run the prompt, for its logprobs
    min_tokens:          stop tokens are not sampled, and stop strings not searched for, before this many tokens
    temperature:         0 = greedy (lowest token id on ties)
    top_p:               sample from the most likely tokens whose probabilities sum up to this
    top_k:               sample from this many of the most likely tokens; 0 = all tokens
    min_p:               sample from the tokens with at least this share of the largest probability
    repetition_penalty:  scales the logits of tokens in the prompt or the completion; 1 = off
    presence_penalty:    subtracted from the logit of each token that was generated before
    frequency_penalty:   subtracted from a token's logit once for each time it was generated before
    logit_bias:          token id -> number added to its logit before all other steps
    stop:                strings that end the text; they are not part of it
    stop_token_ids:      tokens that end the completion, in addition to the model's own; they are not part of it
    ignore_eos:          do not stop at the model's own stop tokens
    seed, n:             n samples, each with its own random stream
    """

    max_tokens: Annotated[int, Range(0)] = 64
    min_tokens: Annotated[int, Range(0)] = 0
    temperature: Annotated[float, Range(0.0, 10.0)] = 0.0
    top_p: Annotated[float, Range(0.0, 1.0)] = 1.0
    top_k: Annotated[int, Range(0)] = 0
    min_p: Annotated[float, Range(0.0, 1.0)] = 0.0
    repetition_penalty: Annotated[float, Range(0.01, 10.0)] = 1.0
    presence_penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0
    n: Annotated[int, Range(1, 128)] = 1


@dataclass(frozen=True)
class SamplingParams(SamplingFields):
    """States how to sample one request.

    logprobs:            None = none; k = the logprobs of the chosen token and of the k best tokens, in the model's
                         distribution before bias, penalties and temperature
    prompt_logprobs:     the same for every prompt token but the first; with continuations, for their tokens only
    structured:          what the completion must obey; None = it is free. It may end it before min_tokens
    """

    logprobs: Annotated[int | None, Range(0, 20)] = None
    prompt_logprobs: Annotated[int | None, Range(0, 20)] = None
    structured: Structured | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises RequestError("bad_params") naming every field that is out of range."""
        problems = list(find_problems({f.name: getattr(self, f.name) for f in fields(self)}))
        if problems:
            raise RequestError.bad_params(problems)

    @property
    def is_greedy(self) -> bool:
        """Return whether sampling always chooses the best token."""
        return self.temperature == 0.0


FIELDS: tuple[str, ...] = tuple(f.name for f in fields(SamplingParams))
TYPES: Mapping[str, Any] = get_type_hints(SamplingParams)
RANGES: Mapping[str, Range] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items()
    if get_origin(hint) is Annotated
}


def is_integer(name: str) -> bool:
    """Return whether a field has whole numbers."""
    return name in RANGES and isinstance(0, TYPES[name])


def find_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a Problem, with the limits, for each mistake in sampling values; fields that are absent are not checked."""
    for name, value in values.items():
        if name in RANGES:
            yield from _check_number(name, value)
        elif name == "ignore_eos" and not isinstance(value, bool):
            yield Problem(name, f"must be true or false, is {show(value)}")
        elif name == "stop":
            yield from _check_stop(value)
        elif name == "stop_token_ids":
            if not _is_list_of(value, int) or any(i < 0 for i in value):
                yield Problem(name, f"must be a list of token ids (0 or more), is {show(value)}")
        elif name == "logit_bias":
            yield from _check_bias(value)
    min_tokens, max_tokens = values.get("min_tokens"), values.get("max_tokens")
    if isinstance(min_tokens, int) and isinstance(max_tokens, int) and min_tokens > max_tokens:
        yield Problem("min_tokens", f"must be at most max_tokens ({max_tokens}), is {min_tokens}")
    if values.get("structured") is not None and values.get("ignore_eos") is True:
        yield Problem("ignore_eos", "must be false with structured: a completion ends where it obeys")


def find_unknown_tokens(values: Mapping[str, Any], vocab_size: int) -> Iterator[Problem]:
    """Yield a Problem for each field that names token ids beyond the vocabulary.

    values: sampling values without other mistakes
    """
    for name in ("logit_bias", "stop_token_ids"):
        if outside := [token for token in values.get(name, ()) if token >= vocab_size]:
            yield Problem(name, f"the model's token ids end at {vocab_size - 1}; has {outside[:5]}")


def _check_number(name: str, value: Any) -> Iterator[Problem]:
    low, high = RANGES[name]
    if value is None and isinstance(None, TYPES[name]):
        return
    kind = "a whole number" if is_integer(name) else "a number"
    if isinstance(value, bool) or not isinstance(value, int if is_integer(name) else (int, float)):
        yield Problem(name, f"must be {kind}, is {show(value)}")
    elif (low is not None and value < low) or (high is not None and value > high) or not _is_finite(value):
        span = f"{low} or more" if high is None else f"between {low} and {high}"
        yield Problem(name, f"must be {kind}, {span}, is {show(value)}")
    elif name == "top_p" and value == 0:
        yield Problem(name, "must be above 0 (use temperature 0 for greedy), is 0")


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _check_stop(value: Any) -> Iterator[Problem]:
    if not _is_list_of(value, str) or "" in value:
        yield Problem("stop", f"must be a list of strings that are not empty, is {show(value)}")
    elif len(value) > MAX_STOP_STRINGS:
        yield Problem("stop", f"must have at most {MAX_STOP_STRINGS} strings, has {len(value)}")


def _check_bias(value: Any) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        yield Problem("logit_bias", f"must map token ids to numbers, is {show(value)}")
        return
    for token, bias in value.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            yield Problem("logit_bias", f"token id must be a whole number, 0 or more, is {show(token)}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            yield Problem("logit_bias", f"bias of token {token} must be between -100 and 100, is {show(bias)}")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
