"""/v1/chat/completions: answer a conversation."""

from collections.abc import Mapping
from typing import Any

from moray.engine.settings.markers import PRESETS
from moray.engine.text.chat_template import find_variable_mistake
from moray.engine.text.reasoning import is_open
from moray.serve.endpoint import Caller, Endpoint
from moray.serve.errors import ApiError
from moray.serve.grammar_compiler import Constraint
from moray.serve.openai.chat_response import ChatResponseBuilder
from moray.serve.openai.messages import conversation
from moray.serve.openai.parameters import priority, sampling_params
from moray.serve.openai.schemas import ChatBody
from moray.serve.openai.structured import find_constraint
from moray.serve.openai.tools import find_tool_use
from moray.serve.request_body import UNKNOWN, UNSUPPORTED, UNSUPPORTED_VALUE

EFFORT = "reasoning_effort"
KWARGS, THINKING = "chat_template_kwargs", "enable_thinking"


async def start_chat(endpoint: Endpoint, body: ChatBody, caller: Caller) -> ChatResponseBuilder:
    """Start to generate the answer to a conversation. Raises ApiError."""
    endpoint.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "invalid_parameter", "top_logprobs: needs logprobs: true", param="top_logprobs")
    tool_use = find_tool_use(body, endpoint.tokenizer)
    constraint = find_constraint(body) if tool_use is None else tool_use.constraint
    variables = template_variables(endpoint, body.chat_template_kwargs or {}, body.reasoning_effort)
    if constraint is not None:
        variables |= _without_thoughts(endpoint, variables, constraint.param)
    messages = conversation(endpoint.tokenizer, body.messages)
    if tool_use is not None:
        messages = tool_use.add_to(messages)
        variables |= {"tools": tool_use.definitions} if tool_use.is_in_template else {}
    (token_ids,) = await endpoint.encode_chats([messages], variables=variables)
    if constraint is not None:
        token_ids = _begin_answer(endpoint, token_ids, constraint)
    names = {
        "logprobs": "top_logprobs",
        "max_tokens": "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    } | ({} if constraint is None else {"structured": constraint.param})
    params = sampling_params(
        endpoint,
        body,
        names,
        max_tokens=_max_tokens(endpoint, body, len(token_ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
        structured=await endpoint.compile(constraint, caller),
    )
    generation = endpoint.generate(
        caller, [token_ids], params, param="messages", names=names, seed=body.seed, priority=priority(body)
    )
    return ChatResponseBuilder(endpoint, body, generation, tool_use)


def template_variables(endpoint: Endpoint, given: Mapping[str, Any], effort: str | None = None) -> dict[str, Any]:
    """Return the variables that a request gives to the chat template.

    given:   its chat_template_kwargs
    effort:  its reasoning_effort

    Raises ApiError where the template does not read one of them.
    """
    variables = dict(given)
    if not variables and effort is None:
        return variables
    known = endpoint.tokenizer.chat_variables
    for name in variables:
        if (mistake := find_variable_mistake(name, known)) is not None:
            param = f"{KWARGS}.{name}"
            raise ApiError(400, UNKNOWN, f"{param}: {mistake}", param=param)
    if effort is None or (effort == "none" and EFFORT not in known):
        return variables
    if EFFORT not in known:
        message = f"{EFFORT}: is not supported: this model's chat template does not read it"
        raise ApiError(400, UNSUPPORTED, message, param=EFFORT)
    if variables.setdefault(EFFORT, effort) != effort:
        message = f"{EFFORT}: is {effort!r}, and {KWARGS} has {variables[EFFORT]!r}; give one"
        raise ApiError(400, "invalid_parameter", message, param=EFFORT)
    return variables


def _without_thoughts(endpoint: Endpoint, variables: Mapping[str, Any], param: str) -> dict[str, Any]:
    """Return the variable that keeps a model from thinking, where its template has one: a constrained text is all
    answer. Raises ApiError where the request asks for thoughts."""
    if THINKING not in endpoint.tokenizer.chat_variables:
        return {}
    if variables.get(THINKING):
        where = f"{KWARGS}.{THINKING}"
        message = f"{where}: true is not supported with {param}: the constrained text is all answer; leave it out"
        raise ApiError(400, UNSUPPORTED_VALUE, message, param=where)
    return {THINKING: False}


def _begin_answer(endpoint: Endpoint, token_ids: list[int], constraint: Constraint) -> list[int]:
    """Return the prompt of a constrained answer, which begins with the text's first token.

    Raises ApiError where the chat template has begun thoughts, which would be constrained instead of the answer.
    """
    tokenizer, markers = endpoint.tokenizer, endpoint.args.markers or PRESETS["think"]
    begins_open = is_open(markers, tokenizer, token_ids)
    if begins_open:
        message = (
            f"{constraint.param}: is not supported by this model: its chat template begins each answer with thoughts"
        )
        raise ApiError(400, UNSUPPORTED, message, param=constraint.param)
    if begins_open is None and markers.answer:
        (end,) = tokenizer.encode_texts([markers.answer], add_special_tokens=False)
        return [*token_ids, *end]
    return token_ids


def _max_tokens(endpoint: Endpoint, body: ChatBody, num_prompt_tokens: int) -> int:
    """Return how many tokens the request asks for; by default all that the context and the endpoint's cap leave."""
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in (None, requested):
        message = (
            f"max_tokens: is {body.max_tokens}, and max_completion_tokens, its newer name, is {requested}; give one"
        )
        raise ApiError(400, "invalid_parameter", message, param="max_tokens")
    return endpoint.default_max_tokens(num_prompt_tokens) if requested is None else requested
