"""Measure the host's time for steps of the engine on a stand-in for a GPU, in this process: run_host.py STEPS

It reads kinds of steps, one a line, such as "mixed 256 eager", and prints a line of JSON for each. bench_host.py runs
it, also with the moray of another checkout.
"""

import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu.models import folder, random_model
from gpu.stand_in import Counts, use_stand_in, zeros

from moray.engine.backends import choose
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request

LAYERS, MORE_LAYERS = 2, 4  # of the model; how many more another one has, to find what a layer takes
PROMPTS, OUTPUTS = (341, 682), (170, 340)  # tokens, of bulk work whose outputs are half as long as its prompts
WARM_UP = 30  # steps
MODEL = "phi-3.5-moe"
STOP = ("###", "User:", "\n\n\n")
# What a step calls, and the part of it that the time belongs to. What it calls in turn is not counted twice. A checkout
# of another commit may lack some.
PARTS = (
    ("schedule", "moray.engine.core.scheduler", "Scheduler.schedule"),
    ("schedule", "moray.engine.core.scheduler", "Scheduler.advance"),
    ("plan", "moray.engine.runner.model_runner", "plan_step"),
    ("inputs", "moray.engine.runner.model_runner", "build_inputs"),  # until it became the backend's
    ("inputs", "moray.engine.backends.cuda.backend", "CudaBackend.build_inputs"),
    ("inputs", "moray.engine.backends.cuda.step_graphs", "CudaGraphs.build_inputs"),
    ("inputs", "moray.engine.backends.cuda.decode_graphs", "fill"),  # until step_graphs took its place
    ("launch", "moray.engine.runner.model_runner", "ModelRunner._forward"),
    ("launch", "gpu.stand_in", "_Graph.replay"),
    ("logits", "moray.engine.runner.model_runner", "ModelRunner._compute_logits"),
    ("sample", "moray.engine.backends.cuda.sampler", "CudaSampler.launch"),
    ("read", "moray.engine.backends.cuda.host_copy", "HostCopy.wait"),
    ("outputs", "moray.engine.engine", "Engine._collect_outputs"),
)


NAMES = tuple(dict.fromkeys(name for name, *_ in PARTS))


@dataclass(frozen=True)
class Row:
    """Describes a kind of step.

    mixed:    whether steps with prompts beside the decodes are measured, not decodes alone
    size:     sequences that run
    graphs:   whether steps are replayed from graphs where there are any
    stop:     stop strings of every request
    """

    mixed: bool
    size: int
    graphs: bool
    stop: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> "Row":
        kind, size, *options = name.split()
        return cls(kind == "mixed", int(size), "eager" not in options, STOP if "stops" in options else ())


@dataclass
class Clock:
    """Divides the CPU time of this thread among the parts of a step, while it is on: that takes time itself."""

    is_on: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[float] = field(default_factory=list)  # for each part that runs, the time in the parts that it called

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        self._stack.append(0.0)
        started = time.thread_time()
        try:
            yield
        finally:
            took = time.thread_time() - started
            self.seconds[part] = self.seconds.get(part, 0.0) + took - self._stack.pop()
            if self._stack:
                self._stack[-1] += took

    def wrap(self, part: str, module: str, path: str) -> None:
        """Time the calls of a function or method, if there is one of this name."""
        try:
            owner: Any = importlib.import_module(module)
        except ImportError:
            return
        *outer, name = path.split(".")
        for attribute in outer:
            owner = getattr(owner, attribute, None)
        if (function := getattr(owner, name, None)) is None:
            return

        def timed(*arguments: Any, **options: Any) -> Any:
            if not self.is_on:
                return function(*arguments, **options)
            with self.time(part):
                return function(*arguments, **options)

        setattr(owner, name, timed)


class Load:
    """Keeps an engine full of requests: of random prompts, so that none is in the prefix cache."""

    def __init__(self, row: Row, num_steps: int, layers: int) -> None:
        self._row, self._random, self._count = row, random.Random(0), 0
        # Decodes must not end while they are measured.
        self._max_tokens = OUTPUTS if row.mixed else (num_steps + 2000, num_steps + 2000)
        config = EngineConfig(
            device="cuda",
            cuda_graphs=row.graphs,
            max_num_seqs=row.size,
            max_num_batched_tokens=2048,
            max_num_bulk_tokens=2048,
            max_model_len=4096,
            kv_cache_memory=1 << 28,
        )
        self.engine = Engine(str(_model(row, layers)), config, load=partial(random_model, fill=zeros))
        self.add(row.size)

    def add(self, number: int) -> None:
        for _ in range(number):
            self._count += 1
            prompt = [self._random.randrange(3, 150) for _ in range(self._random.randint(*PROMPTS))]
            params = SamplingParams(
                max_tokens=self._random.randint(*self._max_tokens),
                temperature=0.8, top_p=0.95, ignore_eos=True, stop=self._row.stop,
            )  # fmt: skip
            self.engine.add(Request(str(self._count), prompt, params, stream_key=self._count))

    def step(self) -> tuple[float, int]:
        """Run a step, and replace the requests that ended; return its seconds, and how many tokens it ran in all."""
        before = self.engine.metrics.computed_tokens
        started = time.thread_time()
        outputs = self.engine.step()
        seconds = time.thread_time() - started
        num_tokens = self.engine.metrics.computed_tokens - before
        self.add(sum(output.completion is not None for output in outputs))
        return seconds, num_tokens


def _model(row: Row, layers: int) -> Path:
    made = folder(MODEL, layers, is_tiny=True)
    if row.stop and not (made / "tokenizer.json").exists():
        _write_tokenizer(made)
    return made


def _write_tokenizer(made: Path) -> None:
    """Write a tokenizer whose first tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[:160]
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def measure(row: Row, num_steps: int, clock: Clock, layers: int = LAYERS) -> dict[str, Any]:
    """Return the milliseconds of a step and of its parts: those of the tenth that other processes disturbed least.

    Parts are timed in every second step, and whole steps in the others, without the clocks of the parts.
    """
    load = Load(row, num_steps, layers)
    while load.engine.stats().waiting_seqs or load.engine.metrics.generated_tokens < row.size * WARM_UP:
        load.step()
    totals: list[float] = []
    divided: list[dict[str, float]] = []
    launched: list[tuple[int, int]] = []
    while len(divided) < num_steps:
        clock.is_on, clock.seconds = len(divided) < len(totals), {}
        before = Counts.kernels, Counts.replays
        total, num_tokens = load.step()
        if (num_tokens > row.size) != row.mixed:
            continue
        if clock.is_on:
            divided.append({"total": total, **clock.seconds})
        else:
            totals.append(total)
            launched.append((Counts.kernels - before[0], Counts.replays - before[1]))
    clock.is_on = False
    divided.sort(key=lambda step: step["total"])
    totals.sort()
    num_least = max(1, num_steps // 10)
    parts = {name: statistics.mean(step.get(name, 0.0) for step in divided[:num_least]) * 1e3 for name in NAMES}
    parts["total"] = statistics.mean(totals[:num_least]) * 1e3
    parts["rest"] = parts["total"] - sum(parts[name] for name in NAMES)
    return {
        "ms": {name: round(value, 4) for name, value in parts.items()},
        "median_ms": round(statistics.median(totals) * 1e3, 4),
        "kernels": statistics.median(kernels for kernels, _ in launched),
        "from_graph": round(statistics.mean(replays for _, replays in launched), 3),
    }


def main() -> None:
    num_steps = int(sys.argv[1])
    torch.set_num_threads(1)
    backend = use_stand_in()
    choose.DEVICES["cuda"] = choose.DEVICES["cuda"]._replace(open=lambda: backend)
    clock = Clock()
    for part in PARTS:
        clock.wrap(*part)
    for line in sys.stdin:
        row = Row.of(line)
        result = measure(row, num_steps, clock)
        if not row.graphs:
            more = measure(row, num_steps, clock, LAYERS + MORE_LAYERS)
            launch = (more["ms"]["launch"] - result["ms"]["launch"]) / MORE_LAYERS
            result["launch_us_a_layer"] = round(launch * 1e3, 1)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
