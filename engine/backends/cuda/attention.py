"""CudaAttentionMetadata: where the GPU's attention finds the keys and values of a step."""

from dataclasses import dataclass

from torch import Tensor


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
