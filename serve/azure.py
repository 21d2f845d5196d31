"""/score: text generation in Azure ML's schema, as its batch and online endpoints have it."""

from typing import Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import Request as HttpRequest

from serve.endpoint import Endpoint
from serve.openai.errors import ApiError
from serve.openai.schemas import Body

MAX_NEW_TOKENS = 64


class ScoreMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: str


class ScoreParameters(Body):
    """do_sample: false = greedy, whatever temperature and top_p say. return_full_text: the prompt in front of the text;
    true for prompts, and not possible for chats."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int = 0
    do_sample: bool = False
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    ignore_eos: bool = False
    return_full_text: bool | None = None


class ScoreInput(Body):
    """input_string: prompts, or chats, or one chat."""

    input_string: list[str] | list[list[ScoreMessage]] | list[ScoreMessage]
    parameters: ScoreParameters = ScoreParameters()


class ScoreBody(Body):
    input_data: ScoreInput


async def score(endpoint: Endpoint, body: ScoreBody, http: HttpRequest) -> Response:
    """One {"0": text} an input, in order."""
    wanted = body.input_data.parameters
    inputs: list[Any] = body.input_data.input_string
    if not inputs:
        raise ApiError(400, "empty_prompt", "input_data.input_string: the list is empty", param="input_string")
    if isinstance(inputs[0], ScoreMessage):
        inputs = [inputs]
    is_chat = not isinstance(inputs[0], str)
    if is_chat and wanted.return_full_text:
        message = "return_full_text: a chat has no text to put in front of the answer"
        raise ApiError(400, "invalid_parameter", message, param="return_full_text")
    params = endpoint.make_params(
        temperature=wanted.temperature if wanted.do_sample else 0.0,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
        max_tokens=wanted.max_new_tokens,
        min_tokens=wanted.min_new_tokens,
        stop=tuple(wanted.stop),
        ignore_eos=wanted.ignore_eos,
    )
    if is_chat:
        prompts = await endpoint.encode_chats([[message.model_dump() for message in chat] for chat in inputs])
    else:
        prompts = await endpoint.encode_prompts(inputs)
    run = endpoint.run(http, prompts, params, seed=wanted.seed)
    try:
        completions = await run.completions()
    finally:
        run.close()
    texts = [endpoint.tokenizer.decode(done.token_ids)[: done.text_length] for done in completions]
    if not is_chat and wanted.return_full_text is not False:
        texts = [prompt + text for prompt, text in zip(inputs, texts, strict=True)]
    return JSONResponse([{"0": text} for text in texts])
