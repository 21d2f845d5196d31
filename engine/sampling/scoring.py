"""Scores: how likely given tokens are under a model.

A job with task score writes them. A client of the endpoint can sum them up from the same prompt logprobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moray.engine.params import SamplingParams
from moray.engine.request import TokenLogprobs


@dataclass(frozen=True)
class Score:
    """States how likely a continuation is.

    logprob:    natural logarithm of the probability of all its tokens, in their order
    is_greedy:  whether greedy sampling would have chosen each of its tokens
    """

    logprob: float
    is_greedy: bool


def scoring_params(logprobs: int | None) -> SamplingParams:
    """Return the sampling parameters of a request for scores.

    logprobs: number of best tokens to return for each scored token, see SamplingParams
    """
    # is_greedy needs the best token.
    return SamplingParams(max_tokens=0, logprobs=logprobs, prompt_logprobs=max(1, logprobs or 0))


def score(tokens: Sequence[TokenLogprobs]) -> Score:
    """Return the score of consecutive tokens; each must come with the best token at its position."""
    logprob = 0.0
    for token in tokens:  # in double precision, one by one: from Python 3.12 on, sum() rounds differently
        logprob += token.logprob
    return Score(logprob, all(token.top[0][0] == token.token_id for token in tokens))
