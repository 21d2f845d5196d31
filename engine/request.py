"""What goes into the engine and what comes out of it."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.params import SamplingParams


class Request(NamedTuple):
    """One prompt to run.

    request_id:  unique among the requests in the engine
    stream_key:  64-bit key of the request's random stream; sample i draws from (stream_key, i). The same key and
                 prompt give the same samples, whatever runs beside them.
    continuations:  token ids that may follow the prompt. Where there are some, each makes a sample and params.n none;
                    the sample's prompt is both together, its prompt logprobs are the continuation's alone.
    priority:    lower goes first, and takes seats and cache blocks from higher; among equals the first come
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    stream_key: int = 0
    continuations: Sequence[Sequence[int]] = ()
    priority: int = 0

    @property
    def num_samples(self) -> int:
        return len(self.continuations) or self.params.n


class TokenLogprobs(NamedTuple):
    """Log-probability of one token and of the best ones at its place, best first: in the order in which greedy sampling
    prefers them (by logit, lowest id first on ties)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Completion(NamedTuple):
    """One finished sample.

    token_ids:        generated tokens up to, without, the stop token
    finish_reason:    "stop" (a stop token or string), "length" or "error"
    text_length:      characters of the decoded token_ids that belong to the text, where a stop string cut it
    stop_logprobs:    those of the stop token that ended it, where the request asked for logprobs
    prompt_logprobs:  one entry a prompt token, None for the first and for those before a continuation
    error:            (code, message) where finish_reason is "error"
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    text_length: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: tuple[str, str] | None = None
    stop_logprobs: TokenLogprobs | None = None


class Output(NamedTuple):
    """What one step gave one sample of one request; `completion` is set with the last one.

    new_logprobs: of the new tokens, where the request asked for logprobs
    """

    request_id: str
    sample: int
    new_token_ids: tuple[int, ...]
    completion: Completion | None = None
    new_logprobs: tuple[TokenLogprobs, ...] = ()
