"""Answers of an engine that runs alone, one prompt after the other: what a job's answers are compared with."""

from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
    """Return the completion of each prompt; no prompt shares a batch with another."""
    found = []
    for prompt in prompts:
        engine.add(Request("0", prompt, params))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        completion = outputs[-1].completion
        assert completion is not None
        found.append(completion)
    return found
