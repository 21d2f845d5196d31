"""Run the loads on our engine, with a random model that is made once."""

import gc
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu.loads import TEMPERATURE, Answer, Load, Steps, requests
from gpu.model_formats import BF16, kind_of, with_format
from gpu.models import folder, random_model
from moray.engine.backends.base import Backend
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.engine import Engine
from moray.engine.layers.attention import attention_layers
from moray.engine.layers.moe import Experts
from moray.engine.models.base import CausalLM
from moray.engine.params import SamplingParams
from moray.engine.request import Request

SEEN_PROMPTS = 4  # of a load, whose experts are counted


class Ours:
    """Holds one model on the device, which one engine after the other runs."""

    def __init__(self, name: str, *, layers: int | None = None, is_dry: bool = False, weights: str = BF16) -> None:
        """weights: a name of model_formats.py"""
        self.folder: Path = folder(name, layers, is_tiny=is_dry)
        self.weights, kind = weights, kind_of(weights)
        self.config = EngineConfig(device="cpu" if is_dry else "cuda", quantization=kind)
        self.model_config = with_quantization(read_model_config(self.folder), kind, str(self.folder))
        self.model: CausalLM | None = None

    def engine(self, **settings: Any) -> Engine:
        """Return an engine for the model, which is made for the first engine.

        The cache of the engine before is freed: nothing may keep a reference to that engine.
        """
        if self.model is not None:
            for layer in attention_layers(self.model):
                for name in ("k_cache", "v_cache"):
                    vars(layer).pop(name, None)
                layer.kv_scales = None  # of a cache in fp8
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Engine(str(self.folder), replace(self.config, **settings), load=self._load)

    def _load(self, path: Path, config: ModelConfig, dtype: torch.dtype, backend: Backend) -> CausalLM:
        if self.model is None:
            self.model = random_model(path, config, dtype, with_format(backend, self.weights))
        return self.model


def run(engine: Engine, load: Load) -> tuple[Answer, dict[str, Any]]:
    """Run a load; return its figures, and how many experts were used."""
    before = engine.metrics.preemptions
    answer = decode(engine, load) if load.kind == "decode" else mixed(engine, load)
    preemptions = engine.metrics.preemptions - before
    return answer, {"experts_hit": experts_hit(engine, load), "preemptions": preemptions}


def decode(engine: Engine, load: Load) -> Answer:
    """Run a decode load."""
    for i in range(load.num_requests):
        add(engine, load, i)
    steps = Steps(load)
    while not steps.took(sum(len(output.new_token_ids) for output in engine.step())):
        if not engine.has_work:
            break
    answer = steps.answer()
    for i in range(load.num_requests):
        engine.abort(str(i))
    while engine.has_work:
        engine.step()
    return answer


def mixed(engine: Engine, load: Load) -> Answer:
    """Run a mixed load. The engine has at most num_sequences requests at once, even if its own limit is higher."""
    tokens, added, started = 0, load.num_sequences, time.perf_counter()
    for i in range(added):
        add(engine, load, i)
    while engine.has_work:
        for output in engine.step():
            tokens += len(output.new_token_ids)
            if output.completion is not None and added < load.num_requests:
                add(engine, load, added)
                added += 1
    return Answer(float("nan"), time.perf_counter() - started, tokens, float("nan"))


def add(engine: Engine, load: Load, i: int) -> None:
    request = requests(load)[i]
    params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True, temperature=TEMPERATURE)
    engine.add(Request(str(i), request.prompt, params, stream_key=i))


def experts_hit(engine: Engine, load: Load) -> float | None:
    """Return how many experts a layer uses for as many tokens as the load has sequences; see Hits.mean.

    Some prompts run once more for it, backwards, so that none is in the prefix cache.
    """
    hits, runner = Hits(engine.runner.model), engine.runner
    graphs, runner._graphs = runner._graphs, None  # a graph that is replayed shows nothing
    for i, request in enumerate(requests(load)[:SEEN_PROMPTS]):
        engine.add(Request(f"seen {i}", request.prompt[::-1], SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()
    runner._graphs = graphs
    hits.remove()
    return hits.mean(load.num_sequences)


class Hits:
    """Measures how many experts a layer uses in steps of a number of tokens, which run kernel by kernel."""

    def __init__(self, model: nn.Module) -> None:
        self._logits: deque[tuple[Tensor, int]] = deque(maxlen=256)  # of the router, and how many experts a token has
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in layers]

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._logits.append((args[1], args[2].top_k))

    def mean(self, num_tokens: int) -> float | None:
        """Return the mean over the steps with num_tokens or more tokens, of which num_tokens are chosen at random."""
        counts = []
        for logits, top_k in self._logits:
            if len(logits) >= num_tokens:
                drawn = torch.randperm(len(logits), device=logits.device)[:num_tokens]
                counts.append(len(set(logits[drawn].topk(top_k).indices.flatten().tolist())))
        return sum(counts) / len(counts) if counts else None

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
