"""Check the whole engine: against itself in other batches and without CUDA graphs, and against the CPU in fp32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gpu.checks_kernels import Check, run_checks
from gpu.features import available_features
from gpu.models import NAMES, folder, random_model
from gpu.ours import Ours
from gpu.setup import Row, Setup
from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request

NUM_PROMPTS, DRY_PROMPTS = 64, 6
LITTLE_BYTES = 64 << 20  # for steps: a step of 2,048 tokens of these layers needs some 300 MB
DRY_TOKENS = 40  # of a step that has memory in a dry run
LAYERS = 3  # of the full-size model: tiles are chosen by the shapes of a layer


Engines = Callable[..., Engine]  # makes an engine with these settings
Together = Callable[[], dict[int, Completion]]  # returns the completions that all others have to equal


def run(setup: Setup) -> Iterator[Row]:
    yield from run_checks(setup, _checks(setup))


def _checks(setup: Setup) -> Iterator[Check]:
    for name in NAMES:
        yield f"{name}, tiny, fp32: share of tokens unlike the CPU's", partial(_unlike_the_cpu, name, setup), 0
    ours = Ours(NAMES[0], layers=None if setup.is_dry else LAYERS, is_dry=setup.is_dry)
    engines = partial(make_engine, ours)
    yield from of_engine(f"{NAMES[0]}, tokens and logprobs", engines, setup)
    for feature, settings in available_features().items():
        of_feature = partial(make_engine, ours, **settings)
        yield from of_engine(f"{NAMES[0]} with {feature}, tokens and logprobs", of_feature, setup)
    yield f"{NAMES[0]}: the same after running out of memory", partial(_out_of_memory, engines, setup), 0


def of_engine(about: str, engines: Engines, setup: Setup) -> Iterator[Check]:
    """Yield the checks of an engine with itself; it is run once for all of them to compare with."""
    together = cache(partial(generate_together, engines, setup))
    for name, check in {
        "graphs equal eager steps": partial(eager, engines, setup, together),
        **{f"the same in batches of {n}": partial(batches, engines, setup, together, n) for n in (1, 7)},
        "the same without running steps ahead": partial(_waiting, engines, setup, together),
        "the same in another order": partial(_shuffled, engines, setup, together),
        "the same in chunks of 48": partial(_chunked, engines, setup, together),
    }.items():
        yield f"{about}: {name}", check, 0


def generate_together(engines: Engines, setup: Setup) -> dict[int, Completion]:
    return generate(engines(), all_prompts(setup))


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


def eager(engines: Engines, setup: Setup, together: Together) -> float:
    """Compare steps with and without CUDA graphs, those with prompts among them."""
    return share_unlike(generate(engines(cuda_graphs=False), all_prompts(setup)), together())


def _waiting(engines: Engines, setup: Setup, together: Together) -> float:
    return share_unlike(generate(engines(async_scheduling=False), all_prompts(setup)), together())


def batches(engines: Engines, setup: Setup, together: Together, size: int) -> float:
    wanted = together()
    engine, prompts = engines(), all_prompts(setup)
    found: dict[int, Completion] = {}
    for at in range(0, len(prompts), size):
        if size == 1 and at >= 8:
            break
        found |= generate(engine, dict(list(prompts.items())[at : at + size]))
    return share_unlike(found, wanted)


def _shuffled(engines: Engines, setup: Setup, together: Together) -> float:
    prompts = dict(reversed(all_prompts(setup).items()))
    return share_unlike(generate(engines(), prompts), together())


def _chunked(engines: Engines, setup: Setup, together: Together) -> float:
    chunks = {"max_num_batched_tokens": 48, "max_num_seqs": 48}
    return share_unlike(generate(engines(**chunks), all_prompts(setup)), together())


def _out_of_memory(engines: Engines, setup: Setup) -> float:
    """Compare with an engine that gets too little memory for its steps, and lowers its limits."""
    wanted = generate_together(engines, setup)
    engine = engines()
    before = engine.limits
    with little_memory(engine, setup):
        found = generate(engine, all_prompts(setup))
    assert engine.limits != before, "no step ran out of memory: nothing was checked"
    return share_unlike(found, wanted)


@contextmanager
def little_memory(engine: Engine, setup: Setup) -> Iterator[None]:
    """Leave PyTorch a few MiB beside what it holds; without a GPU, let large steps fail."""
    if not setup.is_dry:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + LITTLE_BYTES) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = engine.runner._forward

    def limited(inputs: ModelInputs) -> Tensor:
        if len(inputs.input_ids) > DRY_TOKENS:
            raise torch.OutOfMemoryError("made up for a dry run")
        return forward(inputs)

    engine.runner._forward = limited  # type: ignore[method-assign]
    yield


def make_engine(ours: Ours, **settings: Any) -> Engine:
    return ours.engine(**{"max_num_seqs": NUM_PROMPTS, "max_model_len": 512, "kv_cache_memory": 1 << 30} | settings)


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
