"""CudaAttentionMetadata: where the GPU's attention finds the keys and values of a step."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.platform.transfer import to_device


@dataclass(frozen=True)
class CudaAttentionMetadata:
    """Locates, for the GPU kernels, the keys and values of one step.

    block_tables: [num_seqs, max_blocks] int32, cache blocks of each sequence
    query_starts: [num_seqs + 1] int32, index of each sequence's first token in the step; the last entry is the number
                  of tokens
    context_lens: [num_seqs] int32, number of keys of each sequence, including those of this step
    slots:        [num_tokens] int64, where each token's key is written: block * block_size + position in the block;
                  -1 = it is not written
    """

    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    slots: Tensor

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
    ) -> "CudaAttentionMetadata":
        """Build the metadata of a step on the device; see Backend.build_attention_metadata."""
        widest = max(map(len, block_tables))
        # Arrays, because tables of long contexts would take longer to convert number by number than a step takes.
        flat_tables, padding = array("i"), array("i", bytes(4 * widest))
        slots: list[int] = []
        starts = [0]
        for num_queries, end, table in zip(query_lens, context_lens, block_tables, strict=True):
            flat_tables.extend(table)
            flat_tables += padding[len(table) :]
            slots += [table[p // block_size] * block_size + p % block_size for p in range(end - num_queries, end)]
            starts.append(starts[-1] + num_queries)
        return cls(
            to_device(flat_tables, torch.int32, device).view(len(block_tables), widest),
            to_device(starts, torch.int32, device),
            to_device(context_lens, torch.int32, device),
            to_device(slots, torch.int64, device),
        )
