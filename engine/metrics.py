"""What the engine counts. The names are the same in a job's status and at the endpoint's /metrics."""

from dataclasses import dataclass


@dataclass
class Metrics:
    """Totals since the engine started.

    prompt_tokens:     tokens of the prompts taken, however they were computed
    cached_tokens:     tokens found in the prefix cache at admission, after a preemption too
    generated_tokens:  sampled tokens that became part of a completion
    computed_tokens:   tokens that went through the model, recomputed ones included
    preemptions:       sequences that lost their cache and were recomputed
    steps, busy_s:     engine steps and the seconds spent in them
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy_s: float = 0.0
