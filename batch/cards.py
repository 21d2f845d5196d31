"""How much memory GPUs have, by Ray's names for them: a model that fits into none of a name is refused early."""

from collections.abc import Collection

from batch.model_facts import ModelFacts
from batch.spec import JobSpec
from engine.errors import Problem, SpecError

GIB = 1 << 30
# The largest that is sold under the name (NVIDIA's data sheets). Names that are not here are not checked.
MEMORY_GIB = {
    "V100": 32, "P100": 16, "T4": 16, "P4": 8, "K80": 12, "A10G": 24, "L4": 24, "L40S": 48, "A100": 80,
    "A100-40G": 40, "A100-80G": 80, "H100": 96, "H200": 141, "H20": 141, "B200": 192,
}  # fmt: skip


def check_cards(spec: JobSpec, facts: ModelFacts, cards: Collection[str | None], gpus: float = 1.0) -> None:
    """Raises SpecError where weights and the KV cache of one sequence are more than a worker's share of each card.

    cards:  that it may get; one whose size is not known may take anything
    gpus:   a worker's share
    """
    if not cards or not all(card in MEMORY_GIB for card in cards):
        return
    card = max(map(str, cards), key=lambda name: MEMORY_GIB[name])
    memory = int(MEMORY_GIB[card] * GIB * gpus)
    longest = spec.model.max_model_len or facts.max_position_embeddings
    cache = facts.cache_token_bytes * longest
    if facts.weights_bytes + cache <= memory:
        return
    share = "" if gpus == 1 else f"{gpus:g} of "
    needed = f"{facts.weights_bytes / GIB:.1f} GiB of weights and {cache / GIB:.1f} GiB of KV cache for one sequence"
    limit = f"{share}a card of type {card}, {memory / GIB:.0f} GiB at most"
    fix = "lower model.max_model_len" if facts.weights_bytes < memory else "take a larger card or a smaller model"
    message = f"{needed} of {longest:,} tokens do not fit into {limit}; {fix}"
    raise SpecError([Problem("workers.accelerator", message)])
