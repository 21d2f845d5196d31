"""Cases in which the order of a sampler's steps decides which tokens can be sampled, and the steps in plain Python."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from made_samples import make_sample, sample_next

from moray.engine.params import SamplingParams
from moray.engine.sampling.sampler import Sampler

ORDER = ("logit_bias", "penalties", "min_tokens", "structured", "temperature", "top_k", "top_p", "min_p")
VOCAB = 40
PROMPT, FIRST, STOP = 0, 1, 5  # the prompt's token, the token that is generated first, and a stop token
FORBIDDEN = -1000.0  # logit of the tokens that a case does not name
NUM_STREAMS = 16


class Case(NamedTuple):
    """Logits and parameters with which two steps would leave other tokens if they were taken in the other order."""

    first: str
    second: str
    logits: dict[int, float]
    params: SamplingParams
    allowed: set[int] | None = None


def case(first: str, second: str, logits: dict[int, float], allowed: set[int] | None = None, **params: object) -> Case:
    values = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 8} | params
    return Case(first, second, logits, SamplingParams(**values), allowed)  # type: ignore[arg-type]


CASES = [
    case("logit_bias", "penalties", {0: 1.0, 2: 2.5}, logit_bias={0: 3.0}, repetition_penalty=2.0, top_k=1),
    case("logit_bias", "temperature", {0: 0.0, 2: 1.0}, logit_bias={0: 2.0}, temperature=4.0, top_p=0.6),
    case("penalties", "temperature", {1: 1.3, 2: 0.0}, presence_penalty=1.0, temperature=4.0, top_p=0.6),
    case("min_tokens", "top_k", {2: 0.0, STOP: 3.0}, min_tokens=3, stop_token_ids=(STOP,), top_k=1),
    case("structured", "top_k", {0: 2.0, 2: 1.0, 3: 0.0}, {FIRST, 2, 3}, top_k=1),
    case("structured", "top_p", {0: 2.0, 2: 1.9, 3: 1.8}, {FIRST, 2, 3}, top_p=0.6),
    case("temperature", "top_p", {0: 2.0, 2: 0.0}, temperature=4.0, top_p=0.7),
    case("top_k", "top_p", {0: 1.0, 2: 0.9, 3: 0.8, 4: 0.7}, top_k=2, top_p=0.5),
    case("top_p", "min_p", {0: 2.0, 2: 1.9} | dict.fromkeys(range(10, 18), 0.0), top_p=0.5, min_p=0.3),
]


class Steps:
    """The second token of a case, after FIRST: a method for each step, and the tokens that are left."""

    def __init__(self, case: Case) -> None:
        self.params, self.allowed = case.params, case.allowed
        self.logits = [case.logits.get(token, FORBIDDEN) for token in range(VOCAB)]
        self.kept = set(range(VOCAB))

    def logit_bias(self) -> None:
        for token, bias in self.params.logit_bias.items():
            self.logits[token] += bias

    def penalties(self) -> None:
        for token in (PROMPT, FIRST):
            factor = self.params.repetition_penalty
            self.logits[token] *= factor if self.logits[token] < 0 else 1 / factor
        self.logits[FIRST] -= self.params.presence_penalty + self.params.frequency_penalty

    def min_tokens(self) -> None:
        if self.params.min_tokens > 1:
            self.kept -= set(self.params.stop_token_ids)

    def structured(self) -> None:
        if self.allowed is not None:
            self.kept &= self.allowed

    def temperature(self) -> None:
        self.logits = [logit / self.params.temperature for logit in self.logits]

    def top_k(self) -> None:
        if self.params.top_k > 0:
            self.kept &= set(self._best_first()[: self.params.top_k])

    def top_p(self) -> None:
        weights, nucleus, sum_before = self.weights(), set(), 0.0
        for token in self._best_first():
            if sum_before < self.params.top_p * sum(weights.values()):
                nucleus.add(token)
            sum_before += weights[token]
        self.kept = nucleus

    def min_p(self) -> None:
        self.kept = {token for token, weight in self.weights().items() if weight >= self.params.min_p}

    def weights(self) -> dict[int, float]:
        """Return the weight of each token that is left, as a share of the largest one."""
        best = max((self.logits[token] for token in self.kept), default=0.0)
        return {token: math.exp(self.logits[token] - best) for token in self.kept}

    def _best_first(self) -> list[int]:
        return sorted(self.kept, key=lambda token: (-self.logits[token], token))


def tokens_left(case: Case, order: Sequence[str]) -> set[int]:
    """Return the tokens that can be sampled after FIRST, if the steps are taken in this order."""
    steps = Steps(case)
    for step in order:
        getattr(steps, step)()
    return {token for token, weight in steps.weights().items() if weight > 1e-9}


def sampled_tokens(sampler: Sampler, case: Case, device: str = "cpu") -> set[int]:
    """Return the tokens that a sampler chooses after FIRST, in NUM_STREAMS random streams."""
    samples = [
        make_sample(sampler, case.params, [PROMPT], stream_key, allowed=case.allowed)
        for stream_key in range(NUM_STREAMS)
    ]
    logits = torch.full((NUM_STREAMS, VOCAB), FORBIDDEN)
    logits[:, FIRST] = 0.0
    assert set(sample_next(sampler, logits.to(device), samples).token_ids) == {FIRST}
    logits[:, FIRST] = FORBIDDEN
    logits[:, list(case.logits)] = torch.tensor(list(case.logits.values()))
    return set(sample_next(sampler, logits.to(device), samples).token_ids)
