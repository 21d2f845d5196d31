"""Write the inputs of a step into the memory that a GPU gets in one copy: one compiled pass over the sequences."""

from typing import Any, NamedTuple

import numpy as np
from numba import uint64
from numpy.typing import NDArray
from torch import Tensor

from moray.kernels.cpu.numba_intrinsics import array_at, compiled


class StepLayout(NamedTuple):
    """States how large a step's inputs are, and at which byte of the memory each of them begins.

    num_tokens, num_seqs:  that there is room for
    width:                 blocks in a row of the block tables
    input_ids, positions, rope_sets, slots:  of each token, int64
    pending_tokens, pending_rows:            int64, room for num_seqs of each
    total:                                   one int32
    query_starts, context_lens, tables:      of each sequence, int32; query_starts has one more
    """

    num_tokens: int
    num_seqs: int
    width: int
    input_ids: int
    positions: int
    rope_sets: int
    slots: int
    pending_tokens: int
    pending_rows: int
    total: int
    query_starts: int
    context_lens: int
    tables: int


def write_step(
    memory: Tensor,
    layout: StepLayout,
    block_size: int,
    input_ids: NDArray[Any],
    seqs: NDArray[Any],
    blocks: NDArray[Any],
) -> int:
    """Write a step and the padding after it, and return how many of its tokens are pending.

    What is not written, nothing reads: block tables after a sequence's blocks, and pending tokens beyond their number.
    A token of padding has the slot -1, and a sequence of padding no tokens and no keys.

    memory:     uint8, contiguous, on the host
    input_ids:  [tokens of the step] int64
    seqs:       [sequences of the step, 5] int64: tokens in the step, keys, rope set, number of blocks, and the pending
                row of the last token or -1
    blocks:     int32, of all sequences one after the other
    """
    num_pending: int = _write(memory.data_ptr(), layout, block_size, input_ids, seqs, blocks)
    return num_pending


@compiled
def _write(memory: int, layout: StepLayout, block_size: int, ids: Any, seqs: Any, blocks: Any) -> int:
    room, num_seqs = layout.num_tokens, layout.num_seqs
    input_ids = array_at(uint64(memory + layout.input_ids), (room,), np.int64)
    positions = array_at(uint64(memory + layout.positions), (room,), np.int64)
    rope_sets = array_at(uint64(memory + layout.rope_sets), (room,), np.int64)
    slots = array_at(uint64(memory + layout.slots), (room,), np.int64)
    pending_tokens = array_at(uint64(memory + layout.pending_tokens), (num_seqs,), np.int64)
    pending_rows = array_at(uint64(memory + layout.pending_rows), (num_seqs,), np.int64)
    total = array_at(uint64(memory + layout.total), (1,), np.int32)
    query_starts = array_at(uint64(memory + layout.query_starts), (num_seqs + 1,), np.int32)
    context_lens = array_at(uint64(memory + layout.context_lens), (num_seqs,), np.int32)
    tables = array_at(uint64(memory + layout.tables), (num_seqs, layout.width), np.int32)
    token = first_block = num_pending = 0
    for i in range(len(seqs)):
        query_len, context_len, rope_set, num_blocks, row = seqs[i, 0], seqs[i, 1], seqs[i, 2], seqs[i, 3], seqs[i, 4]
        query_starts[i], context_lens[i] = token, context_len
        table = blocks[first_block : first_block + num_blocks]
        for j in range(num_blocks):
            tables[i, j] = table[j]
        for position in range(context_len - query_len, context_len):
            input_ids[token], positions[token], rope_sets[token] = ids[token], position, rope_set
            slots[token] = np.int64(table[position // block_size]) * block_size + position % block_size
            token += 1
        if row >= 0:
            pending_tokens[num_pending], pending_rows[num_pending] = token - 1, row
            num_pending += 1
        first_block += num_blocks
    total[0] = token
    for i in range(len(seqs), num_seqs):
        query_starts[i], context_lens[i] = token, 0
    query_starts[num_seqs] = token
    for t in range(token, room):
        input_ids[t], positions[t], rope_sets[t], slots[t] = 0, 0, 0, -1
    return num_pending
