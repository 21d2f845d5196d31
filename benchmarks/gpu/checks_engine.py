"""Check the whole engine: against itself in other batches and without CUDA graphs, and against the CPU in fp32."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.checks_kernels import checked
from gpu.models import NAMES, folder, random_model
from gpu.ours import Ours
from gpu.setup import Row, Setup
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request

NUM_PROMPTS, DRY_PROMPTS = 64, 6
LAYERS = 3  # of the full-size model: tiles are chosen by the shapes of a layer


def run(setup: Setup) -> Iterator[Row]:
    for name in NAMES:
        yield checked(f"{name}, tiny, fp32: share of tokens unlike the CPU's", partial(_unlike_the_cpu, name, setup), 0)
    ours = Ours(NAMES[0], layers=None if setup.is_dry else LAYERS, is_dry=setup.is_dry)
    together: dict[int, Completion] = {}
    for name, check in {
        "graphs equal eager steps": partial(eager, ours, setup, together),
        **{f"the same in batches of {n}": partial(batches, ours, setup, together, n) for n in (1, 7)},
        "the same without running steps ahead": partial(_waiting, ours, setup, together),
        "the same in another order": partial(_shuffled, ours, setup, together),
        "the same in chunks of 48": partial(_chunked, ours, setup, together),
    }.items():
        yield checked(f"{NAMES[0]}, tokens and logprobs: {name}", check, 0)


def _unlike_the_cpu(name: str, setup: Setup) -> float:
    path = str(folder(name, is_tiny=True))
    config = EngineConfig(dtype="float32", device="cpu", max_num_seqs=8, max_model_len=256, kv_cache_memory=1 << 22)
    prompts = _prompts(5, 150)
    reference = Engine(path, config, load=partial(random_model, fill=_fill_on_the_cpu))
    wanted = generate(reference, prompts, logprobs=False)
    if setup.is_dry:
        return share_unlike(wanted, wanted)
    config = EngineConfig(dtype="float32", device="cuda", max_num_seqs=8, max_model_len=256, kv_cache_memory=1 << 22)
    ours = Engine(path, config, load=partial(random_model, fill=_fill_on_the_cpu))
    return share_unlike(generate(ours, prompts, logprobs=False), wanted)


def _fill_on_the_cpu(tensor: Tensor) -> None:
    """Fill a tensor of any device with the CPU's random numbers, large enough that no two logits nearly tie."""
    std = 0.1 if tensor.dim() == 1 else 1.5 / tensor.shape[-1] ** 0.5
    tensor.copy_(torch.randn(tensor.shape, device="cpu") * std)


def eager(ours: Ours, setup: Setup, together: dict[int, Completion]) -> float:
    """Compare steps with and without CUDA graphs. Fills `together`, with which the other checks compare."""
    prompts = all_prompts(setup)
    together.update(generate(_engine(ours), prompts))
    return share_unlike(generate(_engine(ours, cuda_graphs=False), prompts), together)


def _waiting(ours: Ours, setup: Setup, together: dict[int, Completion]) -> float:
    return share_unlike(generate(_engine(ours, async_scheduling=False), all_prompts(setup)), together)


def batches(ours: Ours, setup: Setup, together: dict[int, Completion], size: int) -> float:
    engine, prompts = _engine(ours), all_prompts(setup)
    found: dict[int, Completion] = {}
    for at in range(0, len(prompts), size):
        if size == 1 and at >= 8:
            break
        found |= generate(engine, dict(list(prompts.items())[at : at + size]))
    return share_unlike(found, together)


def _shuffled(ours: Ours, setup: Setup, together: dict[int, Completion]) -> float:
    prompts = dict(reversed(all_prompts(setup).items()))
    return share_unlike(generate(_engine(ours), prompts), together)


def _chunked(ours: Ours, setup: Setup, together: dict[int, Completion]) -> float:
    return share_unlike(generate(_engine(ours, max_num_batched_tokens=48), all_prompts(setup)), together)


def _engine(ours: Ours, **settings: Any) -> Engine:
    few = {"max_num_seqs": 48} if "max_num_batched_tokens" in settings else {"max_num_seqs": NUM_PROMPTS}
    return ours.engine(max_model_len=512, kv_cache_memory=1 << 30, **few, **settings)


def all_prompts(setup: Setup) -> dict[int, list[int]]:
    return _prompts(DRY_PROMPTS if setup.is_dry else NUM_PROMPTS, 150 if setup.is_dry else 32000)


def _prompts(count: int, vocab: int) -> dict[int, list[int]]:
    """Make prompts of 1 to 300 tokens."""
    generator = torch.Generator().manual_seed(count)
    lengths = [1 + 37 * i % 300 for i in range(count)]
    return {i: torch.randint(3, vocab, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


def generate(engine: Engine, prompts: dict[int, list[int]], *, logprobs: bool = True) -> dict[int, Completion]:
    """Generate every second one greedily, and draw the others."""
    for i, prompt in prompts.items():
        params = SamplingParams(
            max_tokens=12, ignore_eos=True, temperature=float(i % 2), top_p=0.95, logprobs=4 if logprobs else None
        )
        engine.add(Request(str(i), prompt, params, stream_key=i))
    done = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                done[int(output.request_id)] = output.completion
    return done


def share_unlike(found: dict[int, Completion], wanted: dict[int, Completion]) -> float:
    """Return the share of the prompts that have another completion, logprobs included to the last bit."""
    assert found and all(completion.error is None for completion in found.values()), "nothing, or NaN, was generated"
    return sum(found[i] != wanted[i] for i in found) / len(found)
