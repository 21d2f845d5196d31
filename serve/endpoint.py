"""Endpoint: the model as the routes see it, and Run: the samples of one HTTP request while they are computed."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import blake2b
from typing import Any, TypeVar

from prometheus_client import Histogram
from starlette.requests import Request as HttpRequest

from engine.async_engine import AsyncEngine
from engine.errors import CheckpointError, EngineError, RequestError
from engine.params import SamplingParams, find_problems, find_unknown_tokens
from engine.request import Completion, Output, Request
from engine.tokenizer import Tokenizer
from serve.args import EndpointArgs
from serve.limits import Admission
from serve.metrics import EndpointMetrics
from serve.openai.errors import ApiError

INTERACTIVE, BULK = 0, 1  # priorities
LONG_TEXT = 10_000  # characters: 3 ms

_Input = TypeVar("_Input")


class Endpoint:
    """An engine, its tokenizer and who may use them."""

    def __init__(self, args: EndpointArgs, engine: AsyncEngine) -> None:
        if engine.engine.tokenizer is None:
            raise CheckpointError(f"{args.model}: no tokenizer; the endpoint takes and gives text")
        self.args = args
        self.engine = engine
        self.tokenizer: Tokenizer = engine.engine.tokenizer
        self.max_model_len = engine.engine.limits.max_model_len
        self.vocab_size = engine.engine.model_config.vocab_size
        self.admission = Admission(
            engine.engine.limits.max_num_seqs + args.max_waiting,
            args.max_concurrent_per_key,
            args.max_requests_per_minute_per_key,
        )
        self.metrics = EndpointMetrics(engine)
        self.created = int(time.time())
        self._numbers = itertools.count()
        self._tokenizing = ThreadPoolExecutor(
            1, "tokenizing"
        )  # one: a tokenizer is not to be shared by threads that encode

    def check_model(self, name: str | None) -> None:
        """Raises ApiError unless it is the model's name; None is."""
        if name is not None and name != self.args.model_name:
            known = self.args.model_name
            raise ApiError(
                404, "model_not_found", f"the model {name!r} is not here; this endpoint has {known!r}", param="model"
            )

    async def encode_prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """As a batch job does prompt rows; token ids stay what they are. Raises ApiError."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        try:
            encoded = iter(await self._encode(self.tokenizer.encode_prompt, texts, sum(map(len, texts))))
        except RequestError as error:
            raise ApiError.of(error, "prompt") from None
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def encode_chats(self, chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        """As a batch job does rows of messages. Raises ApiError."""
        size = sum(len(message["content"]) for messages in chats for message in messages)
        try:
            return await self._encode(self.tokenizer.encode_chat, chats, size)
        except RequestError as error:
            raise ApiError.of(error, "messages") from None

    async def _encode(
        self, encode: Callable[[_Input], list[int]], inputs: Sequence[_Input], size: int
    ) -> list[list[int]]:
        """Much text (`size` in characters) in the thread that is there for it, so that it keeps nobody waiting."""

        def encode_all() -> list[list[int]]:
            return [encode(one) for one in inputs]

        if size <= LONG_TEXT:
            return encode_all()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode_all)

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raises ApiError for an id that the model does not have."""
        size = self.vocab_size
        if bad := [i for i in token_ids if not 0 <= i < size]:
            message = f"token id {bad[0]}: this model's go from 0 to {size - 1}"
            raise ApiError(400, "bad_token_id", message, param="tokens")

    def default_max_tokens(self, num_prompt_tokens: int) -> int:
        """What the context leaves after a prompt, or the cap where that is less; 1 where nothing is left."""
        left = max(1, self.max_model_len - num_prompt_tokens)
        cap = self.args.max_tokens_cap
        return left if cap is None else min(left, cap)

    def make_params(self, **values: Any) -> SamplingParams:
        """Raises ApiError naming the field that is out of range."""
        cap = self.args.max_tokens_cap
        if cap is not None and values["max_tokens"] > cap:
            asked = values["max_tokens"]
            raise ApiError(
                400, "invalid_parameter", f"max_tokens is {asked:,}; this endpoint gives {cap:,}", param="max_tokens"
            )
        problems = list(find_problems(values)) or list(find_unknown_tokens(values, self.vocab_size))
        if problems:
            message = "; ".join(map(str, problems))
            raise ApiError(400, "invalid_parameter", message, param=problems[0].path)
        return SamplingParams(**values)

    def run(
        self,
        http: HttpRequest,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seed: int | None,
        priority: int = INTERACTIVE,
    ) -> "Run":
        """Start the samples of all prompts. Raises ApiError."""
        requests = [
            Request(str(next(self._numbers)), prompt, params, _stream_key(seed, index), priority=priority)
            for index, prompt in enumerate(prompts)
        ]
        hold = ExitStack()
        hold.enter_context(self.admission.admit(http.state.key, len(prompts) * params.n))
        try:
            return Run(self.engine, requests, self.args.request_timeout_s, self.metrics, hold)
        except BaseException:
            hold.close()
            raise


class Run:
    """The samples of one HTTP request. Close it, whatever happened; what still runs is aborted.

    index of a sample: prompt's number * n + its number among the prompt's
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Sequence[Request],
        timeout_s: float,
        metrics: EndpointMetrics,
        hold: ExitStack,
    ) -> None:
        self.requests = requests
        self.params = requests[0].params
        self._timeout_s = timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._hold = hold
        self._arrived_s = time.monotonic()
        self._first_token: Histogram | None = metrics.first_token
        self._places = {request.request_id: place for place, request in enumerate(requests)}
        try:
            self._stream = hold.enter_context(engine.submit(requests))
        except EngineError as error:
            raise _unavailable(error) from None

    def close(self) -> None:
        self._hold.close()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_samples(self) -> int:
        return len(self.requests) * self.params.n

    def index(self, output: Output) -> int:
        return self._places[output.request_id] * self.params.n + output.sample

    def request(self, index: int) -> Request:
        """The request that a sample is of."""
        return self.requests[index // self.params.n]

    async def next(self) -> list[Output]:
        """What came since the last call; nothing when all is done. Raises ApiError."""
        try:
            async with asyncio.timeout_at(self._deadline_s):
                outputs: list[Output] = await anext(self._stream, [])
        except TimeoutError:
            message = f"the request was not done within {self._timeout_s:g} s, the limit here; it was stopped"
            raise ApiError(504, "timeout", message) from None
        except RequestError as error:
            raise ApiError.of(error) from None
        except EngineError as error:
            raise _unavailable(error) from None
        if outputs and self._first_token is not None:
            self._first_token.observe(time.monotonic() - self._arrived_s)
            self._first_token = None
        for output in outputs:
            if output.completion is not None and output.completion.error is not None:
                raise ApiError(500, output.completion.error[0], output.completion.error[1])
        return outputs

    async def completions(self, outputs: Sequence[Output] = ()) -> list[Completion]:
        """All samples, in order of their index; `outputs` are those that came already."""
        done: dict[int, Completion] = {}
        came = list(outputs) or await self.next()
        while came:
            done |= {self.index(output): output.completion for output in came if output.completion is not None}
            came = await self.next()
        return [done[index] for index in sorted(done)]


def _unavailable(error: EngineError) -> ApiError:
    return ApiError(503, "unavailable", f"{error}; try again", headers={"Retry-After": "5"})


def _stream_key(seed: int | None, prompt: int) -> int:
    """64-bit key of a prompt's random stream: the same for the same seed, any for none."""
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(blake2b(f"{seed}\0{prompt}".encode(), digest_size=8).digest(), "big")
