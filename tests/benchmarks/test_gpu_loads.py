"""What engines are asked, how their steps are timed, and how a peer's kernel is cut out of its file."""

import pytest
from gpu.cut_fused_moe import cut
from gpu.loads import Load, Steps, requests


def test_requests_are_the_same_for_every_engine() -> None:
    load = Load("mixed", 8, 100, 40)
    assert requests(load) == requests(load)
    made = requests(load)
    assert len(made) == 16
    assert {66 <= len(r.prompt) <= 133 and 26 <= r.max_tokens <= 53 for r in made} == {True}
    assert load.longest == max(len(r.prompt) + r.max_tokens for r in made)


def test_only_steps_that_give_every_sequence_a_token_are_timed() -> None:
    steps = Steps(Load("decode", 4, 10, 3))
    given = [1, 4, 2, 4, 4, 4]
    assert [steps.took(tokens) for tokens in given] == [False] * 5 + [True]
    answer = steps.answer()
    assert answer.output_tokens == 3 * 4
    assert answer.error is None and answer.ms >= 0
    # Before the three steps 7 tokens had been generated, 19 after them.
    assert answer.context == 10 + (7 + 19) / 2 / 4


def test_an_engine_that_never_runs_all_sequences_has_no_figure() -> None:
    steps = Steps(Load("decode", 4, 10, 3))
    assert not any(steps.took(3) for _ in range(9))
    assert steps.answer().error == "no two steps gave every sequence a token"


SOURCE = """import elsewhere
import triton

@triton.jit
def helper(x):
    return x

def other(x):
    return elsewhere.do(x)

@triton.jit
def kernel(x):
    return helper(x)

def foreign(x):
    return other(x)
"""


def test_a_function_is_cut_with_all_it_calls() -> None:
    assert (
        cut(SOURCE, "kernel")
        == "@triton.jit\ndef helper(x):\n    return x\n\n\n@triton.jit\ndef kernel(x):\n    return helper(x)\n"
    )


@pytest.mark.parametrize(("name", "message"), [("foreign", "uses elsewhere"), ("absent", "has no function absent")])
def test_what_cannot_be_cut_says_why(name: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cut(SOURCE, name)
