"""NoopWorker: a worker whose model takes no time. Every sample gets the same eight tokens in its first step."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from moray.batch.runtime.worker_actor import WorkerActor
from moray.engine.config import EngineConfig
from moray.engine.metrics import EngineStats, Metrics
from moray.engine.request import Completion, Output, Request

TOKENS = (5, 6, 7, 8, 9, 10, 11, 12)


class NoopEngine:
    """Replaces Engine, with the attributes and methods that EngineLoop, ShardExecutor and WorkerActor use."""

    device_name = "none"
    products = ""
    dtype = torch.bfloat16
    model_config = SimpleNamespace(kv_cache=None)

    def __init__(self, max_num_seqs: int) -> None:
        self.limits = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.metrics = Metrics()
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.metrics.prompt_tokens += len(request.prompt_token_ids)

    def interrupt_step(self, priority: int) -> None:
        pass

    def step(self) -> list[Output]:
        started = time.perf_counter()
        outputs = [
            Output(name, sample, TOKENS, Completion(TOKENS, "length", len(request.prompt_token_ids)))
            for name, request in self._requests.items()
            for sample in range(request.num_samples)
        ]
        self._requests.clear()
        self.metrics.steps += 1
        self.metrics.generated_tokens += len(TOKENS) * len(outputs)
        self.metrics.busy_s += time.perf_counter() - started
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(0, 1, 1, replace(self.metrics), self.limits.max_num_seqs, self.limits.max_num_seqs)

    def cached_prefix(self, request: Request) -> Callable[[], int]:
        return lambda: 0

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def expert_tokens(self) -> torch.Tensor:
        return torch.zeros(1, 1, dtype=torch.int64)


class NoopWorker(WorkerActor):
    """Runs a NoopEngine in place of an Engine."""

    def _load(self, model_path: str, config: EngineConfig) -> Any:
        return NoopEngine(config.max_num_seqs or 256)
