"""Request, Output and Completion: the input and the outputs of the engine."""

from collections.abc import Sequence
from typing import NamedTuple

from moray.engine.params import SamplingParams


class Request(NamedTuple):
    """Describes one prompt to run.

    request_id:        unique among the requests in the engine
    prompt_token_ids:  the prompt
    params:            how to sample
    stream_key:        64-bit key of the request's random stream; sample i draws from (stream_key, i). The same key and
                       prompt give the same samples, whatever other requests run at the same time.
    continuations:     lists of token ids that may follow the prompt, to be scored. If there are any, each makes one
                       sample and params.n is ignored. The prompt of such a sample is the prompt plus the continuation;
                       its prompt logprobs cover the continuation alone.
    priority:          a lower number runs first, and preempts higher numbers for batch slots and cache blocks; equal
                       priorities run in order of arrival
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    stream_key: int = 0
    continuations: Sequence[Sequence[int]] = ()
    priority: int = 0

    @property
    def num_samples(self) -> int:
        """Return the number of samples that the request makes."""
        return len(self.continuations) or self.params.n

    @property
    def num_input_tokens(self) -> int:
        """Return the number of tokens of the prompt and of all continuations."""
        return len(self.prompt_token_ids) + sum(map(len, self.continuations))


class TokenLogprobs(NamedTuple):
    """Holds the log-probability of one token and of the best tokens at its position.

    top: (token id, logprob), best first, in the order in which greedy sampling prefers them: by logit, lowest id first
         on ties
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Completion(NamedTuple):
    """Holds one finished sample.

    token_ids:         generated tokens, without the stop token
    finish_reason:     "stop" (a stop token or string, or a grammar after which nothing may follow), "length" or "error"
    num_prompt_tokens: tokens of the prompt, a continuation included
    text_length:       characters of the decoded token_ids that belong to the text, if a stop string cut it
    logprobs:          one entry per generated token, if the request asked for logprobs
    prompt_logprobs:   one entry per prompt token, None for the first token and for those before a continuation
    error:             (code, message) if finish_reason is "error"
    stop_logprobs:     logprobs of the stop token that ended the sample, if the request asked for logprobs
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
    """Holds the result of one step for one sample of a request.

    new_token_ids: tokens that the step added to the sample: the sampled one, and those that a grammar forced
    completion:    set with the last output of the sample
    new_logprobs:  logprobs of the new tokens, if the request asked for them
    """

    request_id: str
    sample: int
    new_token_ids: tuple[int, ...]
    completion: Completion | None = None
    new_logprobs: tuple[TokenLogprobs, ...] = ()
