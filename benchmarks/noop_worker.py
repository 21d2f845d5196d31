"""A worker whose model takes no time: every sample gets the same eight tokens in its first step."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from batch.stages.worker import Worker
from engine.config import EngineConfig
from engine.metrics import Metrics
from engine.request import Completion, Output, Request

TOKENS = (5, 6, 7, 8, 9, 10, 11, 12)


class NoopEngine:
    """What EngineThread and Worker ask of an Engine."""

    device_name = "none"
    dtype = torch.bfloat16

    def __init__(self, max_num_seqs: int) -> None:
        self.limits = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.metrics = Metrics()
        blocks = SimpleNamespace(num_free=1, num_blocks=1)
        self.scheduler = SimpleNamespace(num_waiting=0, block_manager=blocks)
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.metrics.prompt_tokens += len(request.prompt_token_ids)

    def step(self) -> list[Output]:
        outputs = [
            Output(name, sample, TOKENS, Completion(TOKENS, "length", len(request.prompt_token_ids)))
            for name, request in self._requests.items()
            for sample in range(request.num_samples)
        ]
        self._requests.clear()
        self.metrics.steps += 1
        self.metrics.generated_tokens += len(TOKENS) * len(outputs)
        return outputs

    def cached_prefix(self, request: Request) -> Callable[[], int]:
        return lambda: 0

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def expert_tokens(self) -> torch.Tensor:
        return torch.zeros(1, 1, dtype=torch.int64)


class NoopWorker(Worker):
    def _load(self, model_path: str, config: EngineConfig) -> Any:
        return NoopEngine(config.max_num_seqs or 256)
