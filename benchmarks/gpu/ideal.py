"""Compute the bound of a whole mixed load: the sum of the bounds of the steps in which an engine would run it.

A step has the decodes first, then prompts in order of arrival, up to a number of tokens. The beginning and the end,
with fewer sequences, are included, as they are in what is measured.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gpu.loads import Request
from gpu.roofline import DENSE, ITEM, Ceilings, Step, Weights, seconds, step
from moray.engine.config import ModelConfig

MAX_TOKENS = 2048  # tokens of a step; from about 1,500 on, multiplying by experts takes longer than reading them


@dataclass
class _Running:
    """Holds the keys of a decoding sequence, and how many tokens it has left to generate."""

    context: int
    left: int


def load_seconds(
    ceilings: Ceilings,
    config: ModelConfig,
    requests: Sequence[Request],
    num_sequences: int,
    hit: float | None = None,
    weights: Weights = DENSE,
    cache_item: float = ITEM,
) -> float:
    """Return the seconds that the load takes at least.

    hit:         experts that a layer uses in a full step; None = the expected number if all are equally likely
    cache_item:  bytes of a number in the KV cache
    """
    waiting = deque((len(request.prompt), request.max_tokens) for request in requests)
    mean_prompt = sum(prompt for prompt, _ in waiting) // len(waiting)
    running: list[_Running] = []
    done, total = 0, 0.0  # done: tokens of the first waiting prompt
    while waiting or running:
        room = MAX_TOKENS - len(running)
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
        total += seconds(ceilings, step(config, of, weights, cache_item))
        for one in running:
            one.context, one.left = one.context + 1, one.left - 1
        running = [one for one in running + begun if one.left > 0]
    return total
