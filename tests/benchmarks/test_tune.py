"""Tests of the tiles that benchmarks/tune.py tries."""

import pytest
import torch
import triton_device  # noqa: F401  # before the kernels
from tune import candidates

from moray.kernels.gpu.aot import GPUS
from moray.kernels.gpu.tuning import MAX_STAGES, Key, default_tile


@pytest.mark.parametrize("target", GPUS)
def test_what_is_tried_can_run_and_includes_the_rules_blocks(target: int) -> None:
    gpu, key = GPUS[target], Key(6144, 4096, torch.bfloat16)
    tried = {m: candidates(key, m, gpu) for m in (1, 32, 256, 4096)}
    for m, tiles in tried.items():
        assert default_tile(key, m, gpu).block_m in {tile.block_m for tile in tiles}, m
        assert all(key.shared_bytes(tile) <= gpu.shared_memory for tile in tiles)
    assert max(tile.num_stages for tile in tried[1]) == MAX_STAGES
    widest = max((tile.block_m, tile.block_n) for tile in tried[4096])
    assert widest == ((256, 128) if gpu.shared_memory > 150_000 else (128, 128))
