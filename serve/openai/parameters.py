"""Convert a request's fields to SamplingParams."""

from collections.abc import Mapping

from moray.engine.errors import show
from moray.engine.params import FIELDS, SamplingParams
from moray.engine.structured.constraint import Structured
from moray.serve.endpoint import BULK, INTERACTIVE, Endpoint
from moray.serve.errors import ApiError
from moray.serve.openai.schemas import GenerationBody

DEFAULTS = {"temperature": 1.0}  # OpenAI's defaults where SamplingParams has others
CONVERTED = ("stop", "stop_token_ids", "logit_bias")  # fields that the API writes in another form
SAME_FORM = tuple(name for name in FIELDS if name in GenerationBody.model_fields and name not in CONVERTED)


def sampling_params(
    endpoint: Endpoint,
    body: GenerationBody,
    names: Mapping[str, str],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structured: Structured | None,
) -> SamplingParams:
    """Make the parameters of a request. Raises ApiError that names the field that is wrong.

    names: field of SamplingParams -> the request's name for it, where they differ
    """
    given = {name: value for name in SAME_FORM if (value := getattr(body, name)) is not None}
    return endpoint.make_params(
        names,
        **(DEFAULTS | given),
        max_tokens=max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=_logit_bias(body.logit_bias or {}),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured=structured,
    )


def priority(body: GenerationBody) -> int:
    """Return the priority of a request's samples in the engine."""
    return BULK if body.service_tier == "flex" else INTERACTIVE


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal()):
            message = f"logit_bias: keys are token ids, {show(key)} is not one"
            raise ApiError(400, "invalid_parameter", message, param="logit_bias")
    return {int(key): bias for key, bias in given.items()}
