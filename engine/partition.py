"""Partition: which part of a model one rank of tensor parallelism holds. Pure.

Every linear layer is split by its outputs, and nothing is ever added up across ranks: each number is one rank's whole
sum over all inputs, in the order in which one rank alone would add them. So the bits do not depend on the number of
ranks (decision 25).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """

    rank: int = 0
    size: int = 1

    def split(self, *totals: int) -> Rows:
        """Return the rank's equal share of each of several weights that are stacked. `totals` are their rows."""
        held, begin = [], 0
        for total in totals:
            share = total // self.size
            held.append(slice(begin + self.rank * share, begin + (self.rank + 1) * share))
            begin += total
        return Rows(begin, tuple(held))

    def split_if_even(self, total: int) -> Rows:
        """Return the rank's equal share, or all rows if they cannot be divided equally."""
        return Rows.all(total) if total % self.size else self.split(total)

    def split_qkv(self, config: ModelConfig) -> Rows:
        """Return the rows of the stacked q, k and v of the rank's heads; ranks may share a head of k and v."""
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        first = self.rank * config.num_kv_heads // self.size * config.head_dim
        width = self.num_kv_heads(config) * config.head_dim
        heads = self.split(q).held[0]
        return Rows(q + 2 * kv, (heads, *(slice(at + first, at + first + width) for at in (q, q + kv))))

    def num_heads(self, config: ModelConfig) -> int:
        """Return how many heads of q the rank has."""
        return config.num_heads // self.size

    def num_kv_heads(self, config: ModelConfig) -> int:
        """Return how many heads of k and v the rank has: at least one."""
        return max(1, config.num_kv_heads // self.size)


WHOLE = Partition()


def find_split_problems(model: ModelConfig, size: int) -> Iterator[Problem]:
    """Yield a Problem for each number of the model that cannot be divided by the number of ranks."""
    numbers: Sequence[tuple[str, int]] = (
        ("attention heads (num_attention_heads)", model.num_heads),
        ("hidden_size", model.hidden_size),
        ("intermediate_size", model.intermediate_size),
        ("the intermediate_size of dense layers", model.dense_intermediate_size),
        ("shared_expert_intermediate_size", model.shared_intermediate_size),
    )
    uneven = [f"{name} {number:,}" for name, number in numbers if number % size]
    if model.num_kv_heads % size and size % model.num_kv_heads:
        uneven.append(f"key-value heads (num_key_value_heads) {model.num_kv_heads:,}")
    if uneven:
        fitting = [n for n in SIZES if n < size and not list(find_split_problems(model, n))]
        message = f"is {size}, which does not divide this model's {' and '.join(uneven)}; use {fitting[-1]}"
        yield Problem("engine.tensor_parallel", message)
