"""Engine: requests in, tokens out. The hosts (batch worker, endpoint) call it from one thread."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.block_manager import BlockManager
from engine.checkpoint.model_config import read_model_config
from engine.config import EngineConfig, ModelConfig
from engine.device import Device, choose_device
from engine.environment import check_environment
from engine.errors import RequestError
from engine.give_way import GiveWay, StepGivenUp
from engine.layers.attention import attention_layers
from engine.limits import BLOCK_SIZE, Limits, choose_limits, choose_step_limits
from engine.loader import TORCH_DTYPES, load_model
from engine.metrics import Metrics
from engine.model_runner import ModelRunner
from engine.models import CausalLM
from engine.prompt_logprobs import gather_prompt_logprobs
from engine.remote import ModelFolder
from engine.request import Output, Request, TokenLogprobs
from engine.sample import Sample
from engine.sampler import Sampled, Sampler
from engine.scheduler import Scheduled, Scheduler
from engine.sequence import Sequence
from engine.text import TextStream
from engine.tokenizer import Tokenizer, has_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Launched:
    """A step whose tokens have not been read yet. samples: those that got one."""

    samples: list[Sample]
    sampled: Sampled


class Engine:
    """A loaded model that runs requests by continuous batching.

    add() queues a request, step() runs one step and says what came of it, has_work tells whether another is wanted,
    abort() forgets a request. Not thread-safe.

    With async_scheduling a step is scheduled and launched before the tokens of the one before it are read: they come
    out one step late, and a sequence that a token ended has run one step for nothing.
    """

    def __init__(
        self, model_path: str, config: EngineConfig | None = None, *, load: Callable[..., CausalLM] = load_model
    ) -> None:
        """Load `model_path` (folder, s3://, gs://, hf://). Raises CheckpointError where it cannot be run as asked.

        load: makes the model, as load_model does; benchmarks of large models give one that needs no weights on disk
        """
        check_environment()
        config = config or EngineConfig()
        device = choose_device(config.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.folder: Path = ModelFolder(model_path).download()
        self.model_config = read_model_config(self.folder)
        self.dtype = TORCH_DTYPES[self.model_config.dtype if config.dtype == "auto" else config.dtype]
        self.tokenizer = _load_tokenizer(self.folder, self.model_config)
        model = load(self.folder, self.model_config, self.dtype, device)
        self.runner = ModelRunner(model, self.model_config, self.dtype, block_size=BLOCK_SIZE, device=device)
        self.device_name = device.name
        self.limits = self._settle_limits(config, device)
        original = self.model_config.rope.original_max_position_embeddings
        self.scheduler = Scheduler(
            BlockManager(self.limits.num_blocks, self.limits.block_size),
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            max_num_bulk_tokens=self.limits.max_num_bulk_tokens,
            max_model_len=self.limits.max_model_len,
            original_max_position_embeddings=original,
            static_long=config.longrope == "static" and original is not None and self.limits.max_model_len > original,
        )
        eos = self.model_config.eos_token_ids if self.tokenizer is None else self.tokenizer.stop_token_ids
        self.sampler = _make_sampler(self.model_config.vocab_size, eos, device)
        self.metrics = Metrics()
        self._samples: dict[str, dict[int, Sample]] = {}  # request_id -> sample number -> those not ended
        self._give_way = GiveWay(attention_layers(model)) if device.torch.type == "cpu" else None
        self._is_async = config.async_scheduling if config.async_scheduling is not None else device.is_async
        self._launched: _Launched | None = None
        self._next_seq_id = 0
        logger.info("%s in %s on %s, %s", self.model_config.architecture, self.dtype, device.torch, self.limits)

    def _settle_limits(self, config: EngineConfig, device: Device) -> Limits:
        """Choose the limits and take the memory they ask for: what is left beside the largest step."""
        steps = choose_step_limits(config, device.torch.type)
        peak = self.runner.measure_peak(*steps) if device.torch.type == "cuda" else 0
        limits = choose_limits(
            config,
            self.model_config,
            itemsize=self.dtype.itemsize,
            available_bytes=device.available_bytes - peak,
            device=device.torch.type,
        )
        self.runner.allocate_cache(limits.num_blocks)
        if device.torch.type == "cuda" and config.cuda_graphs:
            self.runner.capture_graphs(limits.max_num_seqs, limits.max_model_len)
        if device.backend == "torch":
            self.runner.warm_up()
        self.runner.expert_load.reset()  # of what was run until now
        return limits

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._launched is not None

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises RequestError when it can never run: "too_long", "no_cache_room", "empty_prompt", "bad_token_id",
        "bad_params", "duplicate_id".
        """
        if request.request_id in self._samples:
            raise RequestError("duplicate_id", f"request {request.request_id!r} is already in the engine.")
        self._check_token_ids(request)
        samples = {n: self._new_sample(request, n) for n in range(request.num_samples)}
        try:
            for sample in samples.values():
                self.scheduler.add(sample.seq)
        except RequestError:
            self.scheduler.abort(request.request_id)
            raise
        self._samples[request.request_id] = samples
        self.metrics.prompt_tokens += len(request.prompt_token_ids) + sum(map(len, request.continuations))

    def cached_prefix(self, request: Request) -> Callable[[], int]:
        """For a request that may be added later: how many leading tokens of its prompt the prefix cache holds, as it is
        when called."""
        return partial(self.scheduler.num_cached_tokens, Sequence(0, request))

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; one that is not there (or done) is no mistake."""
        self.scheduler.abort(request_id)
        for sample in self._samples.pop(request_id, {}).values():
            self._leave(sample)

    def expert_tokens(self) -> Tensor:
        """Tokens each expert was given since the engine started: [num_layers, num_experts] int64, on the host. A GPU is
        waited for: ask seldom."""
        return self.runner.expert_load.read()

    def give_way(self, priority: int) -> None:
        """A request of this priority is to be added: a step with lower ones may be given up. From any thread."""
        if self._give_way is not None:
            self._give_way.ask(priority)

    def step(self) -> list[Output]:
        """Run one step. Returns what came of it, or of the one before, per sample that got a token or ended."""
        started = time.perf_counter()
        scheduled = self.scheduler.schedule()
        try:
            launched = self._launch(scheduled) if scheduled else None
        except StepGivenUp:
            self.metrics.busy_s += time.perf_counter() - started
            return []
        ended = list(self._end_prompts(scheduled))
        outputs = self._read()
        self._launched = launched
        for row, sample in enumerate(launched.samples if launched else ()):
            if sample.is_live:
                sample.seq.unread = row
        if not self._is_async:
            outputs = self._read()
        self._count(scheduled, time.perf_counter() - started)
        return ended + outputs

    def _check_token_ids(self, request: Request) -> None:
        if request.continuations and not request.prompt_token_ids:
            raise RequestError("empty_prompt", "the prompt has no tokens; to score continuations it needs at least 1.")
        size = self.model_config.vocab_size
        if bad := [i for ids in (request.prompt_token_ids, *request.continuations) for i in ids if not 0 <= i < size]:
            raise RequestError(
                "bad_token_id", f"the prompt has token id {bad[0]}; this model's go from 0 to {size - 1}."
            )

    def _new_sample(self, request: Request, n: int) -> Sample:
        self._next_seq_id += 1
        seq = Sequence(self._next_seq_id, request, n)
        row = self.sampler.new_row(request.params, tuple(seq.token_ids), request.stream_key, n)
        text = None
        if request.params.stop:
            if self.tokenizer is None:
                raise RequestError("no_tokenizer", "stop strings need a tokenizer; the model folder has none.")
            text = TextStream(self.tokenizer, request.params.stop, request.params.min_tokens)
        return Sample(seq, row, text)

    def _launch(self, scheduled: list[Scheduled]) -> _Launched | None:
        """Start a step: run the tokens and sample the sequences whose tokens are all computed then."""
        lowest = max(item.seq.request.priority for item in scheduled)
        with nullcontext() if self._give_way is None else self._give_way.step(lowest):
            last_token_ids = None if self._launched is None else self._launched.sampled.token_ids
            hidden_states = self.runner.run(scheduled, last_token_ids)
        self._count_cached(scheduled)
        gather_prompt_logprobs(scheduled, hidden_states, self.runner.compute_logits)
        self.scheduler.advance(scheduled)
        ready: list[Sample] = []
        rows: list[int] = []
        end = 0
        for item in scheduled:
            end += item.num_tokens
            if item.seq.num_uncomputed_tokens == 0 and item.seq.request.params.max_tokens > 0:
                ready.append(self._samples[item.seq.request.request_id][item.seq.sample])
                rows.append(end - 1)
        if not ready:
            return None
        logits = self.runner.compute_logits(hidden_states, rows)
        return _Launched(ready, self.sampler.launch(logits, [sample.row for sample in ready]))

    def _read(self) -> list[Output]:
        """Wait for the tokens of the launched step and give them out; those that ended meanwhile want none."""
        launched, self._launched = self._launched, None
        if launched is None:
            return []
        result = launched.sampled.read()
        given = zip(launched.samples, result.token_ids, result.logprobs, strict=True)
        return [self._take(sample, token_id, logprobs) for sample, token_id, logprobs in given if sample.is_live]

    def _take(self, sample: Sample, token_id: int, logprobs: TokenLogprobs | None) -> Output:
        output = sample.take(token_id, logprobs)
        self.metrics.generated_tokens += len(output.new_token_ids)
        if output.completion is not None:
            self._end(sample)
        return output

    def _end_prompts(self, scheduled: list[Scheduled]) -> Iterator[Output]:
        """End the samples that were to run their prompt alone, and have."""
        for seq in (item.seq for item in scheduled):
            if seq.request.params.max_tokens == 0 and seq.num_uncomputed_tokens == 0:
                sample = self._samples[seq.request.request_id][seq.sample]
                self._end(sample)
                yield sample.end_prompt()

    def _end(self, sample: Sample) -> None:
        request_id = sample.seq.request.request_id
        self.scheduler.finish(sample.seq)
        self._leave(sample)
        of_request = self._samples[request_id]
        del of_request[sample.seq.sample]
        if not of_request:
            del self._samples[request_id]

    def _leave(self, sample: Sample) -> None:
        sample.is_live = False
        self.sampler.forget(sample.row)

    def _count_cached(self, scheduled: list[Scheduled]) -> None:
        just_admitted = [i.seq for i in scheduled if i.seq.num_computed_tokens == i.seq.num_cached_tokens]
        self.metrics.cached_tokens += sum(seq.num_cached_tokens for seq in just_admitted)

    def _count(self, scheduled: list[Scheduled], seconds: float) -> None:
        self.metrics.steps += 1
        self.metrics.busy_s += seconds
        self.metrics.computed_tokens += sum(item.num_tokens for item in scheduled)
        self.metrics.preemptions = self.scheduler.num_preemptions


def _make_sampler(vocab_size: int, eos_token_ids: tuple[int, ...], device: Device) -> Sampler:
    if device.backend == "torch":
        return Sampler(vocab_size, eos_token_ids)
    from engine.device_sampler import DeviceSampler

    return DeviceSampler(vocab_size, eos_token_ids, device.torch)


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    """None where the folder has none: token ids in and out need none."""
    if not has_tokenizer(folder):
        return None
    return Tokenizer(folder, config.eos_token_ids, config.generation_eos_token_ids)
