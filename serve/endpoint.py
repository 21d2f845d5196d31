"""Endpoint: the model as the routes see it, and Generation: the samples of one HTTP request while they are computed."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

from prometheus_client import Histogram

from moray.engine.async_engine import AsyncEngine
from moray.engine.errors import CheckpointError, EngineError, Problem, RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Output, Request
from moray.engine.structured.constraint import Structured
from moray.engine.text.tokenizer import NO_VARIABLES, Tokenizer
from moray.serve.admission import AdmissionController
from moray.serve.args import EndpointArgs
from moray.serve.errors import ApiError
from moray.serve.grammar_compiler import Constraint, GrammarCompiler
from moray.serve.metrics import EndpointMetrics

INTERACTIVE, BULK = 0, 1  # priorities of engine requests; the smaller goes first
LONG_TEXT = (
    10_000  # characters that are encoded in the event loop at most: about 3 ms during which it does nothing else
)

_Input = TypeVar("_Input")


@dataclass(frozen=True)
class Caller:
    """Says for whom a request runs, and by which rules.

    key:   name of the key whose limits hold; None = the line of a batch, for which no limit and no timeout holds, and
           whose priority is BULK
    seed:  text that the samples of a request without a seed follow from; None = they are random
    """

    key: str | None
    seed: str | None = None

    @property
    def is_batch(self) -> bool:
        return self.key is None


class Endpoint:
    """Holds an engine, its tokenizer and the limits on their use. The routes call it.

    Raises CheckpointError where the model has no tokenizer.
    """

    def __init__(self, args: EndpointArgs, engine: AsyncEngine) -> None:
        if engine.tokenizer is None:
            raise CheckpointError(f"{args.model}: no tokenizer; an endpoint reads and writes text")
        self.args = args
        self.engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self.max_model_len = engine.limits.max_model_len
        self.vocab_size = engine.model_config.vocab_size
        max_samples = engine.limits.max_num_seqs + args.max_waiting
        self.admission = AdmissionController(
            max_samples,
            args.max_concurrent_per_key,
            args.max_requests_per_minute_per_key,
        )
        self.metrics = EndpointMetrics(engine)
        self.created = int(time.time())
        self._request_numbers = itertools.count()
        # One thread: threads that encode must not share a tokenizer.
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizing")
        self._grammars = GrammarCompiler(engine, max_samples)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a name that is not the model's. None, where the request names no model, passes."""
        if name is not None and name != self.args.model_name:
            known = self.args.model_name
            raise ApiError(
                404, "model_not_found", f"the model {name!r} is not here; this endpoint has {known!r}", param="model"
            )

    async def encode_prompts(self, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[list[int]]:
        """Encode prompts as a batch job encodes its rows; token ids stay as they are. Raises ApiError about `param`."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        try:
            encoded = iter(await self._encode(self.tokenizer.encode_prompt, texts, sum(map(len, texts))))
        except RequestError as error:
            raise ApiError.from_request_error(error, param) from None
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def encode_chats(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        param: str = "messages",
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> list[list[int]]:
        """Encode chats as a batch job encodes rows of messages. Raises ApiError about `param`.

        variables: further variables that the chat template gets
        """
        size = sum(len(message["content"]) for messages in chats for message in messages) + len(str(variables))
        try:
            return await self._encode(partial(self.tokenizer.encode_chat, variables=variables), chats, size)
        except RequestError as error:
            raise ApiError.from_request_error(error, param) from None

    async def _encode(
        self, encode: Callable[[_Input], list[int]], inputs: Sequence[_Input], size: int
    ) -> list[list[int]]:
        """Encode `inputs`, of `size` characters in all: long text in the tokenizer's thread, so that the event loop
        stays free for other requests."""

        def encode_all() -> list[list[int]]:
            return [encode(one) for one in inputs]

        if size <= LONG_TEXT:
            return encode_all()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, encode_all)

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raise ApiError for an id that the model does not have."""
        size = self.vocab_size
        if bad := [i for i in token_ids if not 0 <= i < size]:
            message = f"token id {bad[0]}: this model has ids from 0 to {size - 1}"
            raise ApiError(400, "bad_token_id", message, param="tokens")

    def default_max_tokens(self, num_prompt_tokens: int) -> int:
        """Return what the context leaves after a prompt, or the cap where that is less; 1 where nothing is left."""
        left = max(1, self.max_model_len - num_prompt_tokens)
        cap = self.args.max_tokens_cap
        return left if cap is None else min(left, cap)

    async def compile(self, constraint: Constraint | None, caller: Caller) -> Structured | None:
        """Compile what the text of a request must obey, if anything. Raises ApiError."""
        if constraint is None:
            return None
        return await self._grammars.compile(constraint, is_limited=not caller.is_batch)

    def make_params(self, names: Mapping[str, str], **values: Any) -> SamplingParams:
        """Make SamplingParams of `values`. Raises ApiError that names the field of the request that is out of range.

        names: field of SamplingParams -> the request's name for it, where they differ
        """
        cap = self.args.max_tokens_cap
        try:
            params = SamplingParams(**values)
        except RequestError as error:
            raise _invalid_parameters(error.problems, names) from None
        if cap is not None and params.max_tokens > cap:
            problem = Problem("max_tokens", f"is {params.max_tokens:,}; this endpoint gives at most {cap:,}")
            raise _invalid_parameters([problem], names)
        return params

    def generate(
        self,
        caller: Caller,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        param: str,
        names: Mapping[str, str],
        seed: int | None,
        priority: int = INTERACTIVE,
    ) -> "Generation":
        """Start to generate the samples of all prompts. Raises ApiError where they are not admitted.

        caller: for whom; the lines of batches are always admitted
        param: the field of the request that holds the prompts, for errors about them
        names: field of SamplingParams -> the request's name for it, where they differ
        """
        seed_text = caller.seed if seed is None else str(seed)
        if caller.is_batch:
            priority = BULK
        requests = [
            Request(str(next(self._request_numbers)), prompt, params, _stream_key(seed_text, index), priority=priority)
            for index, prompt in enumerate(prompts)
        ]
        resources = ExitStack()
        if caller.key is not None:
            resources.enter_context(self.admission.admit(caller.key, len(prompts) * params.n))
        timeout_s = None if caller.is_batch else self.args.request_timeout_s
        first_token = None if caller.is_batch else self.metrics.first_token
        try:
            return Generation(self.engine, requests, param, names, timeout_s, first_token, resources)
        except BaseException:
            resources.close()
            raise


class Generation:
    """Yields the outputs of one HTTP request's samples. Close it in the end: samples that still run are aborted.

    The index of a sample is the number of its prompt * n + its number among the samples of that prompt.

    timeout_s:   seconds that the request may run; None = as long as it takes
    first_token: where the seconds until the first token are counted; None = nowhere
    resources:   what close() releases: the places of the request and, once submitted, its stream in the engine
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Sequence[Request],
        param: str,
        names: Mapping[str, str],
        timeout_s: float | None,
        first_token: Histogram | None,
        resources: ExitStack,
    ) -> None:
        self.requests = requests
        self.params = requests[0].params
        self._param = param
        self._names = names
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self._resources = resources
        self._arrived_s = time.monotonic()
        self._first_token = first_token
        self._prompt_numbers = {request.request_id: number for number, request in enumerate(requests)}
        try:
            self._stream = resources.enter_context(engine.submit(requests))
        except EngineError as error:
            raise _unavailable(error) from None

    def close(self) -> None:
        """Abort what still runs and give the request's places back."""
        self._resources.close()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_samples(self) -> int:
        return len(self.requests) * self.params.n

    def index(self, output: Output) -> int:
        """Return the index of the sample that an output belongs to."""
        return self._prompt_numbers[output.request_id] * self.params.n + output.sample

    def request(self, index: int) -> Request:
        """Return the engine's request of the sample with this index."""
        return self.requests[index // self.params.n]

    async def next(self) -> list[Output]:
        """Wait for outputs and return those since the last call; an empty list when all samples are done.

        Raises ApiError.
        """
        try:
            async with asyncio.timeout_at(self._deadline_s):
                outputs: list[Output] = await anext(self._stream, [])
        except TimeoutError:
            message = f"the request did not finish within {self._timeout_s:g} s, this endpoint's limit; it was aborted"
            raise ApiError(504, "timeout", message) from None
        except RequestError as error:
            if error.problems:
                raise _invalid_parameters(error.problems, self._names) from None
            field = error.field
            param = self._param if field is None else self._names.get(field, field)
            raise ApiError.from_request_error(error, param) from None
        except EngineError as error:
            raise _unavailable(error) from None
        if outputs and self._first_token is not None:
            self._first_token.observe(time.monotonic() - self._arrived_s)
            self._first_token = None
        for output in outputs:
            if output.completion is not None and output.completion.error is not None:
                raise self._failed(*output.completion.error)
        return outputs

    def _failed(self, code: str, message: str) -> ApiError:
        """Return the error of a sample that failed: the request's mistake where its grammar is the cause."""
        if not code.startswith("grammar_"):
            return ApiError(500, code, message)
        param = self._names.get("structured", "structured")
        return ApiError(400, code, f"{param}: {message}", param=param)

    async def completions(self, outputs: Sequence[Output] = ()) -> list[Completion]:
        """Wait for all samples and return them in order of their index. Raises ApiError.

        outputs: what next() has returned already
        """
        done: dict[int, Completion] = {}
        new_outputs = list(outputs) or await self.next()
        while new_outputs:
            done |= {self.index(one): one.completion for one in new_outputs if one.completion is not None}
            new_outputs = await self.next()
        return [done[index] for index in sorted(done)]


def _invalid_parameters(problems: Sequence[Problem], names: Mapping[str, str]) -> ApiError:
    """Return the error of sampling parameters that are wrong, under the request's names for them."""
    named = [Problem(names.get(problem.path, problem.path), problem.message) for problem in problems]
    return ApiError(400, "invalid_parameter", "; ".join(dict.fromkeys(map(str, named))), param=named[0].path)


def _unavailable(error: EngineError) -> ApiError:
    return ApiError(503, "unavailable", f"{error}; try again", headers={"Retry-After": "5"})


def _stream_key(seed: str | None, prompt: int) -> int:
    """Return the 64-bit key of a prompt's random stream: the same for the same seed, a random one without a seed."""
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(blake2b(f"{seed}\0{prompt}".encode(), digest_size=8).digest(), "big")
