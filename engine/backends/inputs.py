"""StepPlan and ModelInputs: a step as numbers on the host, which all ranks get, and as tensors on a device."""

from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer[Any]]


def integers(values: "list[int]") -> Integers:
    """Return numbers as an int64 array. By way of an array of Python's it takes a third of the time of np.array."""
    return np.frombuffer(array("q", values), np.int64) if values else np.zeros(0, np.int64)


@dataclass(frozen=True)
class StepPlan:
    """Describes the scheduled tokens of each sequence, one sequence after the other.

    input_ids:       [num_tokens] int64; 0 in place of a token that the host has not read
    query_lens:      [num_seqs] int64, tokens of each sequence
    context_lens:    [num_seqs] int64, keys of each sequence, including those of this step
    rope_sets:       [num_seqs] int64, LongRoPE factors of each sequence
    blocks:          int32, the cache blocks of all sequences in order of position, one sequence after the other
    num_blocks:      [num_seqs] int64, how many of the blocks each sequence has
    pending_tokens:  int64, the tokens of this step that the last step sampled and the host has not read
    pending_rows:    int64, the row of each of them among the tokens that the last step sampled
    """

    input_ids: Integers
    query_lens: Integers
    context_lens: Integers
    rope_sets: Integers
    blocks: Integers
    num_blocks: Integers
    pending_tokens: Integers
    pending_rows: Integers

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the step computes."""
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        """Return how many sequences have tokens in the step."""
        return len(self.query_lens)

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

    def write_tables(self, tables: Integers) -> None:
        """Write the blocks of each sequence into a row of [num_seqs or more, max_blocks or more].

        Entries after a sequence's blocks stay as they are: nothing reads them.
        """
        starts = self.num_blocks.cumsum() - self.num_blocks
        width = tables.shape[1]
        places = np.arange(len(self.blocks)) + (np.arange(self.num_seqs) * width - starts).repeat(self.num_blocks)
        tables.reshape(-1)[places] = self.blocks

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
