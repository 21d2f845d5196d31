"""/v1/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from engine.request import Completion, Output, TokenLogprobs
from serve.endpoint import Endpoint, Run
from serve.openai.answer import Answer
from serve.openai.errors import ApiError
from serve.openai.logprobs import CompletionLogprobs
from serve.openai.parameters import priority, sampling_params
from serve.openai.schemas import CompletionBody
from serve.openai.streaming import respond

MAX_TOKENS = 16  # OpenAI's default


async def complete(endpoint: Endpoint, body: CompletionBody, http: HttpRequest) -> Response:
    endpoint.check_model(body.model)
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "unsupported_parameter", "echo with logprobs is not supported in a stream", param="echo")
    params = sampling_params(
        endpoint,
        body,
        max_tokens=MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    prompts = list_prompts(body)
    token_ids = await endpoint.encode_prompts(prompts)
    run = endpoint.run(http, token_ids, params, seed=body.seed, priority=priority(body))
    return await respond(run, CompletionAnswer(endpoint, body, run), is_stream=body.stream)


class CompletionAnswer(Answer):
    id_prefix = "cmpl-"
    object = chunk_object = "text_completion"
    _body: CompletionBody

    def __init__(self, endpoint: Endpoint, body: CompletionBody, run: Run) -> None:
        super().__init__(endpoint, body, run)
        prompts = list_prompts(body) if body.echo else []
        self._echoes = [prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt) for prompt in prompts]
        self._logprobs = [CompletionLogprobs(self._tokenizer) for _ in range(run.num_samples)]

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            token_ids, entries = list(completion.token_ids), list[Any](completion.logprobs)
            if completion.prompt_logprobs is not None:
                token_ids = [*self._run.request(index).prompt_token_ids, *token_ids]
                entries = [*completion.prompt_logprobs, *entries]
            logprobs = self._take_logprobs(index, token_ids, entries, completion)
        return {"text": self._echo(index) + text, "logprobs": logprobs}

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._take_logprobs(index, output.new_token_ids, output.new_logprobs, output.completion)
        return {"text": text, "logprobs": logprobs}

    def start_choices(self) -> list[dict[str, Any]]:
        size = self._run.num_samples if self._body.echo else 0
        return [{"text": self._echo(index), "logprobs": None} for index in range(size)]

    def _take_logprobs(
        self,
        index: int,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        completion: Completion | None,
    ) -> dict[str, Any]:
        """With the stop token's at the end, though it is not in the text: clients that score count on a token there."""
        if completion is not None and completion.stop_logprobs is not None:
            token_ids = [*token_ids, completion.stop_logprobs.token_id]
            entries = [*entries, completion.stop_logprobs]
        return self._logprobs[index].take(token_ids, entries)

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._run.params.n] if self._body.echo else ""


def list_prompts(body: CompletionBody) -> list[str | list[int]]:
    """Each prompt of the request: text or token ids. Raises ApiError where there is none."""
    prompt: Any = body.prompt
    if prompt == []:
        raise ApiError(400, "empty_prompt", "prompt: the list is empty", param="prompt")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
