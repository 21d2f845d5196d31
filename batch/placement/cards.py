"""How much memory GPUs have, by Ray's names for them: a model that fits into none of a name is refused early."""

from collections.abc import Collection
from dataclasses import dataclass

from batch.planning.model_facts import ModelFacts
from batch.spec import JobSpec
from engine.errors import Problem, SpecError

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """MiB as nvidia-smi tells, which is less than the data sheet's GB where memory with ECC has no chips of its own.

    mib:      of most cards of the name
    most_mib: of the largest that is sold under the name
    """

    mib: int
    most_mib: int

    @property
    def memory_bytes(self) -> int:
        return self.mib << 20

    @property
    def most_bytes(self) -> int:
        return self.most_mib << 20


def _card(mib: int, most_mib: int | None = None) -> Card:
    return Card(mib, most_mib or mib)


# Names that are not here are not checked. A name may stand for several sizes: A100 of 40 GB are A100-40G; H100 NVL has
# 94 GB (the 96 GB of a GH200 have a name of their own); there are H20 of 141 GB.
CARDS = {
    "K80": _card(11441), "P4": _card(7680), "P100": _card(16384), "V100": _card(16384, 32768), "T4": _card(15360),
    "L4": _card(23034), "A10G": _card(23028), "L40S": _card(46068),
    "A100": _card(81920), "A100-40G": _card(40960), "A100-80G": _card(81920),
    "H100": _card(81559, 95830), "H20": _card(97871, 143771), "H200": _card(143771), "B200": _card(183359),
}  # fmt: skip


def check_cards(spec: JobSpec, facts: ModelFacts, cards: Collection[str | None], gpus: float = 1.0) -> None:
    """Raises SpecError where weights and the KV cache of one sequence are more than a worker's share of each card.

    cards:  that it may get; one whose size is not known may take anything
    gpus:   a worker's share
    """
    if not cards or not all(card in CARDS for card in cards):
        return
    card = max(map(str, cards), key=lambda name: CARDS[name].most_mib)
    memory = int(CARDS[card].most_bytes * gpus)
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
