"""Partition: which part of a model one rank of tensor parallelism holds. Pure.

Every linear layer is split by its outputs, and nothing is ever added up across ranks: each number is one rank's whole
sum over all inputs, in the order in which one rank alone would add them. So the bits do not depend on the number of
ranks (decision 25). Experts are split by their outputs too, or each rank has some of them whole (decision 28).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moray.engine.config import ModelConfig
from moray.engine.errors import Problem

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Rows:
    """The rows of a weight, which are its outputs, that a rank holds.

    total: rows of the whole weight
    held:  those that the rank holds, in the order in which they lie in its own weight
    """

    total: int
    held: tuple[slice, ...]

    @classmethod
    def all(cls, total: int) -> "Rows":
        """Return all rows."""
        return cls(total, (slice(0, total),))

    def __len__(self) -> int:
        """Return how many rows the rank holds."""
        return sum(part.stop - part.start for part in self.held)

    @property
    def is_whole(self) -> bool:
        """Return whether the rank holds every row, in order."""
        bounds = [0, *(bound for part in self.held for bound in (part.start, part.stop)), self.total]
        return bounds[::2] == bounds[1::2]

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Yield which of the rows start .. stop - 1 the rank has, counted from `start`, and where in its own weight."""
        begin = 0
        for part in self.held:
            first, end = max(start, part.start), min(stop, part.stop)
            if first < end:
                at = begin + first - part.start
                yield slice(first - start, end - start), slice(at, at + end - first)
            begin += part.stop - part.start


@dataclass(frozen=True)
class Partition:
    """The place of a rank among the ranks.

    rank: 0 .. size - 1
    size: number of ranks, one of SIZES
    expert_parallel: whether each rank has some experts whole, not a part of every expert
    """

    rank: int = 0
    size: int = 1
    expert_parallel: bool = False

    def split(self, *totals: int) -> Rows:
        """Return the rank's equal share of each of several weights that are stacked. `totals` are their rows."""
        held, begin = [], 0
        for total in totals:
            share = total // self.size
            held.append(slice(begin + self.rank * share, begin + (self.rank + 1) * share))
            begin += total
        return Rows(begin, tuple(held))

    def split_experts(self, num_experts: int) -> range:
        """Return the experts of which the rank has something: all, or its share of them."""
        if not self.expert_parallel:
            return range(num_experts)
        share = num_experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def split_in_expert(self, *totals: int) -> Rows:
        """Return the rows that the rank has of a weight of its experts; see split."""
        return Rows.all(sum(totals)) if self.expert_parallel else self.split(*totals)

    def split_if_even(self, total: int) -> Rows:
        """Return the rank's equal share, or all rows if they cannot be divided equally."""
        return Rows.all(total) if total % self.size else self.split(total)

    def split_qkv(self, config: ModelConfig) -> Rows:
        """Return the rows of the stacked q, k and v of the rank's heads; ranks may share a head of k and v."""
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        of_rank = self.kv_heads(config)
        first, end = of_rank.start * config.head_dim, of_rank.stop * config.head_dim
        heads = self.split(q).held[0]
        return Rows(q + 2 * kv, (heads, *(slice(at + first, at + end) for at in (q, q + kv))))

    def num_heads(self, config: ModelConfig) -> int:
        """Return how many heads of q the rank has."""
        return config.num_heads // self.size

    def kv_heads(self, config: ModelConfig) -> slice:
        """Return which heads of k and v the rank has."""
        first = self.rank * config.num_kv_heads // self.size
        return slice(first, first + self.num_kv_heads(config))

    def num_kv_heads(self, config: ModelConfig) -> int:
        """Return how many heads of k and v the rank has: at least one."""
        return max(1, config.num_kv_heads // self.size)


WHOLE = Partition()


def find_split_problems(model: ModelConfig, size: int, *, expert_parallel: bool = False) -> Iterator[Problem]:
    """Yield a Problem for numbers of the model that cannot be divided by the number of ranks.

    expert_parallel: see Partition; without several ranks it is a Problem too
    """
    if expert_parallel and size == 1:
        message = f"is true, and there is one rank; set engine.tensor_parallel to {', '.join(map(str, SIZES[1:]))}"
        yield Problem("engine.expert_parallel", message)
    if expert_parallel and model.dense_intermediate_size + model.shared_intermediate_size > 0:
        message = (
            "is true, and this model has MLPs that all tokens go through, of which each rank has a part; leave it out"
        )
        yield Problem("engine.expert_parallel", message)
    if uneven := _find_uneven(model, size, expert_parallel):
        fitting = [n for n in SIZES if n < size and not _find_uneven(model, n, expert_parallel)][-1]
        fix = f"use {fitting}"
        if expert_parallel and not _find_uneven(model, size, False):
            fix = "leave out engine.expert_parallel"
        elif expert_parallel and fitting == 1:
            fix = "use 1, and leave out engine.expert_parallel"
        message = f"is {size}, which does not divide this model's {' and '.join(uneven)}; {fix}"
        yield Problem("engine.tensor_parallel", message)


def _find_uneven(model: ModelConfig, size: int, expert_parallel: bool) -> list[str]:
    """Return the numbers of the model that cannot be divided by the number of ranks."""
    numbers: Sequence[tuple[str, int]] = (
        ("attention heads (num_attention_heads)", model.num_heads),
        ("hidden_size", model.hidden_size),
        ("experts", model.num_experts) if expert_parallel else ("intermediate_size", model.intermediate_size),
        ("the intermediate_size of dense layers", model.dense_intermediate_size),
        ("shared_expert_intermediate_size", model.shared_intermediate_size),
    )
    uneven = [f"{name} {number:,}" for name, number in numbers if number % size]
    if model.num_kv_heads % size and size % model.num_kv_heads:
        uneven.append(f"key-value heads (num_key_value_heads) {model.num_kv_heads:,}")
    return uneven


def find_gpu_mistake(num_gpus: float, tensor_parallel: int | Literal["auto"]) -> str | None:
    """Return why a worker with these GPUs cannot have these ranks, as words that begin with the key of the latter.

    Each rank has a GPU of its own, and may share it with other workers where it is the only rank. Without GPUs the
    ranks are processes on the CPU, of any number.
    """
    if num_gpus == 0 or tensor_parallel in ("auto", max(1, num_gpus)):
        return None
    return f"tensor_parallel is {tensor_parallel}: each rank has a GPU of its own; set both to the same number"
