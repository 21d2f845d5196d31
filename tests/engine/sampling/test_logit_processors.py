"""Tests of the order in which a sampler takes its steps."""

import pytest
from step_order import CASES, ORDER, VOCAB, Case, sampled_tokens, tokens_left

from moray.engine.sampling.logit_processors import Allowed, LogitBias, MinTokens, Penalties
from moray.engine.sampling.sampler import Sampler


def test_the_processors_are_in_the_documented_order() -> None:
    order = [type(processor) for processor in Sampler(VOCAB, []).processors]
    assert order == [LogitBias, Penalties, MinTokens, Allowed]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.first}, {case.second}")
def test_the_steps_are_taken_in_the_documented_order(case: Case) -> None:
    swapped = [{case.first: case.second, case.second: case.first}.get(step, step) for step in ORDER]
    assert tokens_left(case, ORDER) != tokens_left(case, swapped), "the case shows nothing"
    assert sampled_tokens(Sampler(VOCAB, []), case) == tokens_left(case, ORDER)
