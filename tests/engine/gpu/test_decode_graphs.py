"""Decode steps in the fixed shapes of graphs: padding changes nothing, and replaying a graph gives the same bits."""

from pathlib import Path

import pytest
import torch
from triton_device import DEVICE

from engine.checkpoint.model_config import read_model_config
from engine.config import EngineConfig
from engine.decode_graphs import fill, graph_sizes, padding, round_up, table_widths
from engine.device import Device
from engine.engine import Engine
from engine.inputs import build_inputs
from engine.layers.attention import attention_layers
from engine.loader import load_model
from engine.model_runner import ModelRunner
from engine.params import SamplingParams
from engine.request import Request
from engine.scheduler import Scheduled
from engine.sequence import Sequence

TRITON = Device(torch.device(DEVICE), "triton")


def test_sizes_and_widths_cover_all() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert graph_sizes(41)[-2:] == [40, 41]
    for most in (3, 64, 100, 256, 512, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(n <= round_up(n, sizes) <= max(n + 7, n * 5 / 4) for n in range(1, most + 1))
    assert table_widths(5) == [5]
    assert table_widths(64) == [64]
    assert table_widths(65) == [64, 65]
    assert table_widths(8192) == [64, 256, 1024, 4096, 8192]


def decoding(runner: ModelRunner, lengths: list[int]) -> list[Scheduled]:
    """Sequences whose prompts have been run, about to decode."""
    generator, first_block, prompts = torch.Generator().manual_seed(0), 0, []
    for n, length in enumerate(lengths):
        seq = Sequence(
            n, Request(str(n), torch.randint(0, 160, (length,), generator=generator).tolist(), SamplingParams())
        )
        num_blocks = length // runner.block_size + 1
        seq.block_table = list(range(first_block, first_block + num_blocks))
        first_block += num_blocks
        prompts.append(Scheduled(seq, length))
    runner.run(prompts)
    for item in prompts:
        item.seq.num_computed_tokens = item.num_tokens
        item.seq.append(7 + item.num_tokens % 100)
    return [Scheduled(item.seq, 1) for item in prompts]


# What attention leaves in rows of padding is undefined, and NumPy, which interprets the kernels, minds large numbers.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "phi-msft"])
def test_padding_changes_no_bit(checkpoints: dict[str, Path], architecture: str) -> None:
    config = read_model_config(checkpoints[architecture])
    model = load_model(checkpoints[architecture], config, torch.bfloat16, TRITON)
    runner = ModelRunner(model, config, torch.bfloat16, block_size=16, device=TRITON)
    runner.allocate_cache(16)
    step = decoding(runner, [3, 20, 16])
    inputs = build_inputs(step, 16, TRITON)
    runner.expert_load.reset()
    with torch.inference_mode():
        exact = model(inputs).clone()
        counted = runner.expert_load.read()
        caches = [cache.clone() for layer in attention_layers(model) for cache in (layer.k_cache, layer.v_cache)]
        for size, width in ((3, 2), (8, 4)):
            fixed = padding(size, width, TRITON.torch)
            fill(fixed, build_inputs(step[:1], 16, TRITON))
            fill(fixed, inputs)  # over another step, as when a graph is used again
            runner.expert_load.reset()
            assert torch.equal(model(fixed)[:3], exact)
            assert torch.equal(runner.expert_load.read(), counted) and counted.sum() == 2 * 2 * 3
            fill(fixed, build_inputs(step[1:], 16, TRITON))
            assert torch.equal(model(fixed)[:2], exact[1:])
        now = [cache for layer in attention_layers(model) for cache in (layer.k_cache, layer.v_cache)]
        assert all(torch.equal(a, b) for a, b in zip(caches, now, strict=True)), "padding writes no key"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "phi-msft"])
def test_graphs_give_the_same_bits_as_launching(checkpoints: dict[str, Path], architecture: str) -> None:
    def completions(cuda_graphs: bool) -> tuple[dict[str, object], object]:
        config = EngineConfig(
            device="cuda", dtype="bfloat16", max_num_seqs=11, kv_cache_memory=2**24, cuda_graphs=cuda_graphs
        )
        engine = Engine(str(checkpoints[architecture]), config)
        params = SamplingParams(max_tokens=40, temperature=1.0, logprobs=3, ignore_eos=True)
        for n in range(20):
            prompt = torch.randint(0, 160, (1 + 7 * n,), generator=torch.Generator().manual_seed(n)).tolist()
            engine.add(Request(str(n), prompt, params, stream_key=n))
        done: dict[str, object] = {}
        while engine.has_work:
            done |= {output.request_id: output.completion for output in engine.step() if output.completion}
        return done, engine.expert_tokens().tolist()

    assert completions(True) == completions(False)
