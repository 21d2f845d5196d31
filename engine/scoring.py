"""Scores: how likely a model finds tokens that are given. What a job of task score writes, and, by the same prompt
logprobs, what a client of the endpoint sums up."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.params import SamplingParams
from engine.request import TokenLogprobs


@dataclass(frozen=True)
class Score:
    """
    logprob:    natural logarithm of the probability that all the tokens follow, in their order
    is_greedy:  whether greedy sampling would have taken each of them
    """

    logprob: float
    is_greedy: bool


def scoring_params(logprobs: int | None) -> SamplingParams:
    """What a request for scores asks the engine. logprobs: best tokens wanted beside each given one, as in
    SamplingParams."""
    # The best one tells is_greedy.
    return SamplingParams(max_tokens=0, logprobs=logprobs, prompt_logprobs=max(1, logprobs or 0))


def score(tokens: Sequence[TokenLogprobs]) -> Score:
    """The score of tokens that follow each other; each comes with the best one at its place."""
    logprob = 0.0
    for token in tokens:  # in double precision, one by one: sum() rounds otherwise from Python 3.12 on
        logprob += token.logprob
    return Score(logprob, all(token.top[0][0] == token.token_id for token in tokens))
