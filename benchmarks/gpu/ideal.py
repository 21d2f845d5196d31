"""The bound of a whole mixed load: its requests run in steps, each of which takes as long as the card must.

As an engine would run them: decodes first, then prompts in order of arrival, up to a number of tokens a step. Beginning
and end, with fewer sequences, are in it; so it is the bound of what is measured, not of a steady state.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gpu.loads import Request
from gpu.roofline import DENSE, Ceilings, Step, Weights, seconds, step
from moray.engine.config import ModelConfig

MOST_TOKENS = 2048  # in a step; from some 1,500 on, experts take longer to multiply than to be read


@dataclass
class _Running:
    context: int
    left: int


def load_seconds(
    ceilings: Ceilings,
    config: ModelConfig,
    requests: Sequence[Request],
    num_sequences: int,
    hit: float | None = None,
    weights: Weights = DENSE,
) -> float:
    """hit: experts that a layer uses in a full step; None: expected for equally likely ones"""
    waiting = deque((len(request.prompt), request.max_tokens) for request in requests)
    mean_prompt = sum(prompt for prompt, _ in waiting) // len(waiting)
    running: list[_Running] = []
    done, total = 0, 0.0  # done: tokens of the first waiting prompt
    while waiting or running:
        room = MOST_TOKENS - len(running)
        begun: list[_Running] = []
        prefilled = 0
        while waiting and room > 0 and len(running) + len(begun) < num_sequences:
            prompt, output = waiting[0]
            chunk = min(room, prompt - done)
            room, prefilled, done = room - chunk, prefilled + chunk, done + chunk
            if done == prompt:
                waiting.popleft()
                begun.append(_Running(prompt + 1, output - 1))
                done = 0
        context = sum(one.context for one in running) / max(1, len(running))
        is_full = len(running) == num_sequences
        of = Step(len(running), context, prefilled, mean_prompt, hit if is_full else None)
        total += seconds(ceilings, step(config, of, weights))
        for one in running:
            one.context, one.left = one.context + 1, one.left - 1
        running = [one for one in running + begun if one.left > 0]
    return total
