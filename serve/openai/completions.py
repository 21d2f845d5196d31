"""/v1/completions: continue prompts."""

from collections.abc import Sequence
from typing import Any

from moray.engine.request import Completion, Output, TokenLogprobs
from moray.engine.text.tokenizer import Tokenizer
from moray.serve.endpoint import Caller, Endpoint, Generation
from moray.serve.errors import ApiError
from moray.serve.openai.answer import ResponseBuilder
from moray.serve.openai.logprobs import CompletionLogprobs
from moray.serve.openai.parameters import priority, sampling_params
from moray.serve.openai.schemas import CompletionBody
from moray.serve.openai.structured import find_constraint

MAX_TOKENS = 16  # OpenAI's default
NAMES = {"prompt_logprobs": "logprobs"}


async def start_completion(endpoint: Endpoint, body: CompletionBody, caller: Caller) -> "CompletionResponseBuilder":
    """Start to continue prompts. Raises ApiError."""
    endpoint.check_model(body.model)
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "unsupported_parameter", "echo with logprobs is not supported in a stream", param="echo")
    if body.best_of not in (None, 1, body.n or 1):
        message = f"best_of: must be 1 or n ({body.n or 1}), is {body.best_of}; every sample is returned"
        raise ApiError(400, "unsupported_parameter", message, param="best_of")
    constraint = find_constraint(body)
    names = NAMES if constraint is None else NAMES | {"structured": constraint.param}
    params = sampling_params(
        endpoint,
        body,
        names,
        max_tokens=MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        structured=await endpoint.compile(constraint, caller),
    )
    prompts = list_prompts(body, endpoint.tokenizer)
    token_ids = await endpoint.encode_prompts(prompts)
    generation = endpoint.generate(
        caller, token_ids, params, param="prompt", names=names, seed=body.seed, priority=priority(body)
    )
    return CompletionResponseBuilder(endpoint, body, generation)


class CompletionResponseBuilder(ResponseBuilder):
    """Builds responses of completions."""

    id_prefix = "cmpl-"
    object = chunk_object = "text_completion"
    _body: CompletionBody

    def __init__(self, endpoint: Endpoint, body: CompletionBody, generation: Generation) -> None:
        super().__init__(endpoint, body, generation)
        prompts = list_prompts(body, self._tokenizer) if body.echo else []
        self._echoes = [prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt) for prompt in prompts]
        self._logprobs = [CompletionLogprobs(self._tokenizer) for _ in range(generation.num_samples)]

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            token_ids, entries = list(completion.token_ids), list[Any](completion.logprobs)
            if completion.prompt_logprobs is not None:
                token_ids = [*self.generation.request(index).prompt_token_ids, *token_ids]
                entries = [*completion.prompt_logprobs, *entries]
            logprobs = self._format_logprobs(index, token_ids, entries, completion)
        return {"text": self._echo(index) + text, "logprobs": logprobs}

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._format_logprobs(index, output.new_token_ids, output.new_logprobs, output.completion)
        return {"text": text, "logprobs": logprobs}

    def start_choices(self) -> list[dict[str, Any]]:
        size = self.generation.num_samples if self._body.echo else 0
        return [{"text": self._echo(index), "logprobs": None} for index in range(size)]

    def _format_logprobs(
        self,
        index: int,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        completion: Completion | None,
    ) -> dict[str, Any]:
        """Format the logprobs of a sample's next tokens.

        The stop token's come last, though it is not in the text: clients that score count on an entry for it.
        """
        if completion is not None and completion.stop_logprobs is not None:
            token_ids = [*token_ids, completion.stop_logprobs.token_id]
            entries = [*entries, completion.stop_logprobs]
        return self._logprobs[index].append(token_ids, entries)

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.generation.params.n] if self._body.echo else ""


def list_prompts(body: CompletionBody, tokenizer: Tokenizer) -> list[str | list[int]]:
    """Return the prompts of the request, each text or token ids. Raises ApiError where there is none."""
    prompt: Any = body.prompt
    if prompt is None:
        if tokenizer.first_id is None:
            message = "prompt: is required: this model has no beginning-of-sequence token"
            raise ApiError(400, "missing_required_parameter", message, param="prompt")
        return [[tokenizer.first_id]]
    if prompt == []:
        raise ApiError(400, "empty_prompt", "prompt: the list is empty", param="prompt")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
