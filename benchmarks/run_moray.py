"""Run the contender moray: this project's engine with its defaults, all requests added at once.

run_moray.py MODEL THREADS [int8|int4|fp8] [--ranks N] [--expert-parallel]
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from contender import Work, anonymous_bytes, serve

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.layers.moe import SparseMoe
from moray.engine.params import SamplingParams
from moray.engine.quantization.scheme import OnLoadKind
from moray.engine.request import Request

if TYPE_CHECKING:  # torch is loaded by the engine, which settles OpenMP's waiting first
    from torch import Tensor, nn

KV_CACHE_BYTES = 128 << 20  # 16,384 tokens; 64 requests of 224 need 14,336


class ExpertClock:
    """Measures the time in the experts of all layers, and counts the experts that are used.

    A call of Experts chooses the experts from the router's logits and runs them; the router's product comes before it
    and is not included, nor are MLPs that all tokens go through. The hooks cost a few microseconds a layer. Steps that
    are replayed from graphs call nothing, and are not seen.
    """

    def __init__(self, model: "nn.Module") -> None:
        self.layers = [m.experts for m in model.modules() if isinstance(m, SparseMoe)]
        self.clear()
        for layer in self.layers:
            layer.register_forward_pre_hook(self._start)
            layer.register_forward_hook(self._stop)

    def clear(self) -> None:
        self.seconds = 0.0
        self.routed: list[tuple[Tensor, int]] = []  # router logits, and how many experts of a token

    def mean_hit(self, num_tokens: int) -> float | None:
        """Return how many experts a layer used on average, over the steps of num_tokens tokens; None without any."""
        steps = [(logits, top_k) for logits, top_k in self.routed if len(logits) == num_tokens]
        chosen = [logits.topk(top_k).indices for logits, top_k in steps]
        counts = [len(set(ids.flatten().tolist())) for ids in chosen]
        return sum(counts) / len(counts) if counts else None

    @property
    def steps(self) -> int:
        """Return how many steps were seen."""
        return len(self.routed) // len(self.layers)

    def _start(self, module: "nn.Module", args: Any) -> None:
        self.routed.append((args[1], args[2].top_k))
        self._started = time.perf_counter()

    def _stop(self, module: "nn.Module", args: Any, output: "Tensor") -> None:
        self.seconds += time.perf_counter() - self._started


class Moray:
    """Runs requests on an Engine; see contender.Runner."""

    def __init__(
        self, folder: str, threads: int, quantization: OnLoadKind | None, ranks: int, expert_parallel: bool
    ) -> None:
        before = anonymous_bytes()
        config = EngineConfig(
            num_threads=threads,
            kv_cache_memory=KV_CACHE_BYTES,
            quantization=quantization,
            tensor_parallel=ranks,
            expert_parallel=expert_parallel,
        )
        self.num_parts = ranks if expert_parallel else 1
        self.engine = Engine(folder, config)
        self.clock = ExpertClock(self.engine.runner.model)
        weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        self.info = {
            "torch": version("torch"),
            "anon_before": before,
            "weights_and_cache": weights + KV_CACHE_BYTES,
        }

    def run(self, work: list[Work]) -> list[list[int]]:
        self.clock.clear()
        self.started = (self.engine.metrics.steps, self.engine.metrics.busy_s)
        self.expert_tokens = self.engine.expert_tokens()
        self.num_requests = len(work)
        for i, w in enumerate(work):
            self.engine.add(Request(str(i), w.prompt, SamplingParams(max_tokens=w.max_tokens, ignore_eos=True)))
        tokens: list[list[int]] = [[] for _ in work]
        while self.engine.has_work:
            for output in self.engine.step():
                tokens[int(output.request_id)] += output.new_token_ids
        return tokens

    def facts(self) -> dict[str, Any]:
        before, busy_before = self.started
        steps = self.engine.metrics.steps - before
        share = self.clock.seconds / (self.engine.metrics.busy_s - busy_before)
        tokens = self.engine.expert_tokens() - self.expert_tokens
        rows = tokens.view(len(tokens), self.num_parts, -1).sum((0, 2))
        return {
            "rank_rows": [round(share, 4) for share in (rows / rows.sum()).tolist()],
            "steps": steps,
            "experts_share": share if self.clock.steps == steps else None,
            "experts": tokens.shape[1],
            "experts_hit": self.clock.mean_hit(self.num_requests),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("threads", type=int)
    parser.add_argument("quantization", nargs="?")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    args = parser.parse_args()
    kind = cast("OnLoadKind | None", args.quantization)
    serve(lambda: Moray(args.folder, args.threads, kind, args.ranks, args.expert_parallel))
