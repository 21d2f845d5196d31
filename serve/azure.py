"""/score: text generation in the schema of Azure ML's batch and online endpoints."""

from typing import Annotated, Any, ClassVar, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import Field, Tag

from moray.engine.params import FIELDS
from moray.serve.endpoint import Caller, Endpoint
from moray.serve.errors import ApiError
from moray.serve.openai import refusals
from moray.serve.request_body import Int, RequestBody, TopK, choose_by

MAX_NEW_TOKENS = 64  # by default
INPUT, PARAMETERS = "input_data.input_string", "input_data.parameters"
NAMES = {name: f"{PARAMETERS}.{name}" for name in FIELDS} | {
    "max_tokens": f"{PARAMETERS}.max_new_tokens",
    "min_tokens": f"{PARAMETERS}.min_new_tokens",
}


class ScoreMessage(RequestBody):
    """Describes one message of a chat."""

    refused: ClassVar = refusals.SCORE_MESSAGE
    refused_values: ClassVar = {"role": refusals.SCORE_ROLES}

    role: Literal["system", "user", "assistant"]
    content: str


class ScoreParameters(RequestBody):
    """Lists sampling parameters under the names of Hugging Face's text generation.

    do_sample:         false = greedy, and temperature and top_p have no effect
    return_full_text:  put the prompt in front of the text; true by default for prompts, refused for chats
    """

    refused: ClassVar = refusals.SCORE

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: TopK = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: Int = MAX_NEW_TOKENS
    min_new_tokens: Int = 0
    do_sample: bool = False
    seed: Int | None = None
    stop: list[str] = Field(default_factory=list)
    ignore_eos: bool = False
    return_full_text: bool | None = None


def _input(value: Any) -> str | None:
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "<prompts>" if isinstance(first, str) else "<chats>" if isinstance(first, list) else "<chat>"


Input = Annotated[
    Annotated[list[str], Tag("<prompts>")]
    | Annotated[list[list[ScoreMessage]], Tag("<chats>")]
    | Annotated[list[ScoreMessage], Tag("<chat>")],
    choose_by(_input, "a list of prompts, a list of chats, or one chat: a list of messages"),
]


class ScoreInput(RequestBody):
    """Holds the inputs of a request and their parameters.

    input_string:  a list of prompts, a list of chats, or one chat
    """

    input_string: Input
    parameters: ScoreParameters = ScoreParameters()


class ScoreBody(RequestBody):
    """Describes the body of a request to /score."""

    input_data: ScoreInput


async def score(endpoint: Endpoint, body: ScoreBody, caller: Caller) -> Response:
    """Answer a request with one {"0": text} for each input, in order. Raises ApiError."""
    parameters = body.input_data.parameters
    inputs: list[Any] = body.input_data.input_string
    if not inputs:
        raise ApiError(400, "empty_prompt", f"{INPUT}: the list is empty", param=INPUT)
    if isinstance(inputs[0], ScoreMessage):
        inputs = [inputs]
    is_chat = not isinstance(inputs[0], str)
    if is_chat and parameters.return_full_text:
        param = f"{PARAMETERS}.return_full_text"
        message = f"{param}: a chat has no text to put in front of the answer"
        raise ApiError(400, "invalid_parameter", message, param=param)
    params = endpoint.make_params(
        NAMES,
        temperature=parameters.temperature if parameters.do_sample else 0.0,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty,
        max_tokens=parameters.max_new_tokens,
        min_tokens=parameters.min_new_tokens,
        stop=tuple(parameters.stop),
        ignore_eos=parameters.ignore_eos,
    )
    if is_chat:
        chats = [[message.model_dump() for message in chat] for chat in inputs]
        prompts = await endpoint.encode_chats(chats, param=INPUT)
    else:
        prompts = await endpoint.encode_prompts(inputs, param=INPUT)
    generation = endpoint.generate(caller, prompts, params, param=INPUT, names=NAMES, seed=parameters.seed)
    try:
        completions = await generation.completions()
    finally:
        generation.close()
    texts = [endpoint.tokenizer.decode(one.token_ids)[: one.text_length] for one in completions]
    if not is_chat and parameters.return_full_text is not False:
        texts = [prompt + text for prompt, text in zip(inputs, texts, strict=True)]
    return JSONResponse([{"0": text} for text in texts])
