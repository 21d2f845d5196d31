"""Tests of all families on the Triton kernels against the CPU's models, in chunks and batches."""

from array import array
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import FAMILIES, PHIMOE
from torch import Tensor
from triton_backend import TRITON

from moray.engine.backends.base import Backend
from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner

ORIGINAL = PHIMOE["original_max_position_embeddings"]
BLOCK_SIZE, NUM_BLOCKS = 16, 24


def run(
    folder: Path, backend: Backend, dtype: torch.dtype, prompts: list[list[int]], chunks: list[int]
) -> list[Tensor]:
    """Return the logits of all tokens of each prompt; in each step every prompt continues with its own chunk."""
    config = read_model_config(folder)
    model = load_model(folder, config, dtype, backend)
    runner = ModelRunner(model, config, dtype, block_size=BLOCK_SIZE, backend=backend)
    runner.allocate_cache(NUM_BLOCKS)
    sequences, first_block = [], 0
    for n, prompt in enumerate(prompts):
        seq = Sequence(n, Request(str(n), prompt, SamplingParams()))
        original = config.rope.original_max_position_embeddings
        seq.rope_set = int(original is not None and len(prompt) > original)
        num_blocks = -(-len(prompt) // BLOCK_SIZE)
        seq.block_table = array("i", range(first_block + num_blocks - 1, first_block - 1, -1))
        first_block += num_blocks
        sequences.append(seq)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    while any(seq.num_uncomputed_tokens for seq in sequences):
        steps = zip(sequences, chunks, strict=True)
        step = [Scheduled(s, min(chunk, s.num_uncomputed_tokens)) for s, chunk in steps if s.num_uncomputed_tokens]
        hidden_states, end = runner.run(step), 0
        for item in step:
            rows = range(end, end := end + item.num_tokens)
            logits[item.seq.seq_id].append(runner.compute_logits(hidden_states, rows).float().cpu())
            item.seq.num_computed_tokens += item.num_tokens
    return [torch.cat(parts) for parts in logits]


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, 160, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_equal_the_cpus(checkpoints: dict[str, Path], architecture: str) -> None:
    # The others take the interpreter longer, because a token has more experts, and have no other rope in long texts.
    lengths, chunks = ((1, 19, ORIGINAL + 3), [1, 19, 20]) if architecture == "phimoe" else ((1, 3), [1, 2])
    texts = prompts(*lengths)
    ours = run(checkpoints[architecture], TRITON, torch.float32, texts, chunks)
    want = run(checkpoints[architecture], CPU, torch.float32, texts, chunks)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "architecture", ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "phimoe")]
)
def test_bf16_rows_do_not_depend_on_chunks_or_company(
    checkpoints: dict[str, Path], one_layer: dict[str, Path], architecture: str
) -> None:
    folder = (checkpoints | one_layer)[architecture]
    texts = prompts(5, 23, 40)
    together = run(folder, TRITON, torch.bfloat16, texts, [5, 7, 33])
    for text, in_company in zip(texts, together, strict=True):
        (alone,) = run(folder, TRITON, torch.bfloat16, [text], [len(text)])
        assert torch.equal(alone, in_company)
