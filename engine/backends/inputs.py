"""StepPlan and ModelInputs: a step as numbers on the host, which all ranks get, and as tensors on a device."""

from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer[Any]]


def integers(values: "list[int]") -> Integers:
    """Return numbers as an int64 array. By way of an array of Python's it takes a third of the time of np.array."""
    return np.frombuffer(array("q", values), np.int64) if values else np.zeros(0, np.int64)


NOT_PENDING = -1  # in place of a pending row
COLUMNS = ("query_lens", "context_lens", "rope_sets", "num_blocks", "pending_rows")
QUERY_LENS, CONTEXT_LENS, ROPE_SETS, NUM_BLOCKS, PENDING_ROWS = range(len(COLUMNS))


@dataclass(frozen=True)
class StepPlan:
    """Describes the scheduled tokens of each sequence, one sequence after the other.

    input_ids:  [num_tokens] int64; 0 in place of a token that the host has not read
    seqs:       [num_seqs, 5] int64, for each sequence: how many tokens it has in the step; its keys, including those of
                this step; its LongRoPE factors; its cache blocks; and, if the last step sampled its last token here and
                the host has not read that, the row among the tokens that the last step sampled, else NOT_PENDING
    blocks:     int32, the cache blocks of all sequences in order of position, one sequence after the other
    """

    input_ids: Integers
    seqs: Integers
    blocks: Integers

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the step computes."""
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        """Return how many sequences have tokens in the step."""
        return len(self.seqs)

    @property
    def query_lens(self) -> Integers:
        """Return how many tokens each sequence has in the step."""
        return self.seqs[:, QUERY_LENS]

    @property
    def context_lens(self) -> Integers:
        """Return how many keys each sequence has, including those of this step."""
        return self.seqs[:, CONTEXT_LENS]

    @property
    def rope_sets(self) -> Integers:
        """Return the LongRoPE factors of each sequence."""
        return self.seqs[:, ROPE_SETS]

    @property
    def num_blocks(self) -> Integers:
        """Return how many cache blocks each sequence has."""
        return self.seqs[:, NUM_BLOCKS]

    @cached_property
    def num_pending(self) -> int:
        """Return how many tokens of the step the host has not read."""
        return int(np.count_nonzero(self.seqs[:, PENDING_ROWS] != NOT_PENDING))

    def pending(self) -> tuple[Integers, Integers]:
        """Return the tokens that the host has not read, and the row of each of them in the last step's tokens."""
        rows = self.seqs[:, PENDING_ROWS]
        is_pending = rows != NOT_PENDING
        return self.query_ends[is_pending] - 1, rows[is_pending]

    def write_pending(self, input_ids: Tensor, last_token_ids: Tensor | None) -> None:
        """Write the tokens that the host has not read into the step's; see Backend.build_inputs."""
        if last_token_ids is not None and self.num_pending:
            tokens, rows = map(torch.from_numpy, self.pending())
            input_ids[tokens] = last_token_ids[rows].clamp(min=0)

    @cached_property
    def is_decode(self) -> bool:
        """Return whether each sequence has one token."""
        return self.num_tokens == self.num_seqs

    @cached_property
    def max_blocks(self) -> int:
        """Return how many blocks the longest sequence has."""
        return int(self.num_blocks.max())

    @cached_property
    def query_ends(self) -> Integers:
        """Return where the tokens of each sequence end in the step."""
        return self.query_lens.cumsum()

    @cached_property
    def positions(self) -> Integers:
        """Return the position of each token in its sequence."""
        if self.is_decode:
            return self.context_lens - 1
        return np.arange(self.num_tokens) + self.of_tokens(self.context_lens - self.query_ends)

    def of_tokens(self, of_seqs: Integers) -> Integers:
        """Return for each token what its sequence has."""
        return of_seqs if self.is_decode else of_seqs.repeat(self.query_lens)

    def slots(self, block_size: int) -> Integers:
        """Return where each token's key is written: block * block_size + position in the block."""
        first_blocks = self.of_tokens(self.num_blocks.cumsum() - self.num_blocks)
        blocks: Integers = self.blocks[first_blocks + self.positions // block_size].astype(np.int64)
        slots: Integers = blocks * block_size + self.positions % block_size
        return slots

    def as_lists(self) -> "tuple[list[int], list[int], list[array[int]]]":
        """Return query_lens, context_lens and the cache blocks of each sequence."""
        ends = self.num_blocks.cumsum().tolist()
        starts = [0, *ends[:-1]]
        tables = [array("i", self.blocks[i:end].tobytes()) for i, end in zip(starts, ends, strict=True)]
        return self.query_lens.tolist(), self.context_lens.tolist(), tables


@dataclass(frozen=True)
class ModelInputs:
    """Holds the tokens of all scheduled sequences, one sequence after the other.

    input_ids, positions, rope_sets:  [num_tokens] int64
    attention:   where this step's keys are written, and which keys each token attends to; each backend has a class of
                 its own for it, which models and layers only pass on
    num_tokens:  [1] int32, number of real tokens; the rows after them are padding. None = no padding
    """

    input_ids: Tensor
    positions: Tensor
    rope_sets: Tensor
    attention: Any
    num_tokens: Tensor | None = None
