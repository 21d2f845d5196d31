"""A loaded checkpoint that runs one text at a time, without an engine."""

from array import array
from pathlib import Path

import torch
from torch import Tensor

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner


class Model:
    """A loaded checkpoint, which runs one sequence at a time in chunks of any size."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, num_blocks: int = 16) -> None:
        self.config = read_model_config(folder)
        model = load_model(folder, self.config, dtype)
        self.runner = ModelRunner(model, self.config, dtype, block_size=16)
        self.num_blocks = num_blocks
        self.runner.allocate_cache(num_blocks)

    def logits(self, token_ids: list[int], chunk: int = 10**6, rope_set: int | None = None) -> Tensor:
        seq = Sequence(0, Request("r", token_ids, SamplingParams()))
        original = self.config.rope.original_max_position_embeddings
        seq.rope_set = int(original is not None and len(token_ids) > original) if rope_set is None else rope_set
        # The blocks are not in their natural order.
        seq.block_table = array("i", range(self.num_blocks - 1, -1, -1))
        parts = []
        while seq.num_uncomputed_tokens:
            n = min(chunk, seq.num_uncomputed_tokens)
            hidden_states = self.runner.run([Scheduled(seq, n)])
            parts.append(self.runner.compute_logits(hidden_states, range(n)).float())
            seq.num_computed_tokens += n
        return torch.cat(parts)


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 160, (n,), generator=torch.Generator().manual_seed(1000 * seed + n)).tolist()
