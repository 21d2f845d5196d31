"""Tests of SamplingParams: all mistakes are reported at once, with the limits."""

import pickle
from typing import Any

import pytest

from moray.engine.errors import RequestError
from moray.engine.params import RANGES, SamplingParams, find_problems, is_integer


def problems(**values: Any) -> list[str]:
    return [str(problem) for problem in find_problems(values)]


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_every_range(name: str) -> None:
    low, high = RANGES[name]
    is_whole = is_integer(name)
    step = 1 if is_whole else 0.001
    for end, outside in ((low, -step), (high, step)):
        if end is not None:
            assert problems(**{name: end + outside}), name
            if (name, end) != ("top_p", 0.0):
                assert problems(**{name: int(end) if is_whole else end}) == [], name
    for wrong in ("1", True, [], float("nan"), float("inf"), -float("inf")):
        assert problems(**{name: wrong}), (name, wrong)
    if is_whole:
        assert problems(**{name: 1.5})
    assert (problems(**{name: None}) == []) == (name in ("logprobs", "prompt_logprobs"))


def test_a_number_too_large_for_a_float() -> None:
    assert problems(seed=10**400) == [
        f"seed: must be a whole number, between {-(2**63)} and {2**63 - 1}, is 1{'0' * 76}..."
    ]  # fmt: skip
    assert problems(max_tokens=10**400) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0}, "top_p: must be above 0 (use temperature 0 for greedy), is 0"),
        ({"temperature": None}, "temperature: must be a number, is null"),
        ({"top_p": True}, "top_p: must be a number, is true"),
        ({"temperature": 12}, "temperature: must be a number, between 0.0 and 10.0, is 12"),
        ({"max_tokens": -1}, "max_tokens: must be a whole number, 0 or more, is -1"),
        ({"stop": "x"}, "stop: must be a list of strings that are not empty, is 'x'"),
        ({"stop": ["a", ""]}, "stop: must be a list of strings that are not empty, is ['a', '']"),
        ({"stop": ["a"] * 65}, "stop: must have at most 64 strings, has 65"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: must be a list of token ids (0 or more), is [-1]"),
        ({"logit_bias": [1]}, "logit_bias: must map token ids to numbers, is [1]"),
        ({"logit_bias": {"5": 1}}, "logit_bias: token id must be a whole number, 0 or more, is '5'"),
        ({"logit_bias": {5: 101}}, "logit_bias: bias of token 5 must be between -100 and 100, is 101"),
        ({"ignore_eos": 1}, "ignore_eos: must be true or false, is 1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: must be at most max_tokens (4), is 5"),
    ],
)
def test_messages(values: dict[str, Any], message: str) -> None:
    assert problems(**values) == [message]


def test_construction_names_every_mistake() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=-1, top_p=2.0, stop=("",))
    assert caught.value.code == "bad_params"
    assert all(name in caught.value.message for name in ("max_tokens", "top_p", "stop"))
    assert [problem.path for problem in caught.value.problems] == ["max_tokens", "top_p", "stop", "min_tokens"]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.code, copy.message, copy.problems) == ("bad_params", caught.value.message, caught.value.problems)
