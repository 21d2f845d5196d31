"""Metrics and EngineStats: what an engine reports. A job's status and the endpoint's /metrics use the same names."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Metrics:
    """Counts totals since the engine started.

    prompt_tokens:     tokens of the prompts added, computed or found in the prefix cache
    cached_tokens:     tokens found in the prefix cache at admission, also at an admission after a preemption
    generated_tokens:  tokens that became part of a completion, sampled or forced by a grammar
    computed_tokens:   tokens that went through the model, recomputed tokens included
    preemptions:       number of times a sequence lost its cache blocks and had to be recomputed
    lowered_limits:    number of times that the limits of a step were lowered because memory ran out
    steps, busy_s:     engine steps and the seconds spent in them
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    lowered_limits: int = 0
    steps: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """Holds a snapshot of an engine.

    waiting_seqs:  samples in the engine that the scheduler has not admitted yet
    free_blocks:   free blocks of the KV cache; they may still hold cached prefixes
    blocks:        all blocks of the KV cache
    totals:        a copy of the counters; its busy_s includes the step that is running
    max_num_seqs, max_num_batched_tokens:  the limits of a step, as they are now
    """

    waiting_seqs: int
    free_blocks: int
    blocks: int
    totals: Metrics
    max_num_seqs: int
    max_num_batched_tokens: int


# What Prometheus' counter of each field of Metrics counts, in words for its HELP text.
COUNTED: Mapping[str, str] = {
    "prompt_tokens": "Tokens of prompts that were added, computed or found in the prefix cache.",
    "cached_tokens": "Prompt tokens that were found in the prefix cache, also after a preemption.",
    "generated_tokens": "Tokens that became part of a completion, sampled or forced by a grammar.",
    "computed_tokens": "Tokens that went through the model, including tokens that were computed again.",
    "preemptions": "Times that a sequence lost its cache blocks and had to be computed again.",
    "lowered_limits": "Times that the limits of a step were lowered because memory ran out.",
    "steps": "Steps of the engine.",
    "busy_s": "Seconds that the engine spent in steps.",
}


def prometheus_name(name: str) -> str:
    """Return Prometheus' name of a field: it begins with `moray_`, and a unit is spelled out.

    Exporters add `_total` to the names of counters.
    """
    return f"moray_{name.removesuffix('_s')}_seconds" if name.endswith("_s") else f"moray_{name}"
