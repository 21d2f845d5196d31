"""Engine: requests in, tokens out. The hosts (batch worker, endpoint) call it from one thread."""

import logging
import math
import time
from collections.abc import Callable
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
from engine.request import Completion, Output, Request, TokenLogprobs
from engine.sampler import NO_TOKEN, Sampled, Sampler, SamplerRow
from engine.scheduler import Scheduled, Scheduler
from engine.sequence import Sequence
from engine.text import TextStream
from engine.tokenizer import Tokenizer, has_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class _Sample:
    """A sequence in the engine with what is needed beside its tokens to sample and end it."""

    seq: Sequence
    row: SamplerRow
    text: TextStream | None  # where there are stop strings to look for
    is_live: bool = True  # neither ended nor aborted


@dataclass(frozen=True)
class _Launched:
    """A step whose tokens have not been read yet. samples: those that got one."""

    samples: list[_Sample]
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
        self._samples: dict[str, dict[int, _Sample]] = {}  # request_id -> sample number -> those not ended
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
        self.runner.expert_load.reset()  # of what was run to measure
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
        ended = self._end_prompts(scheduled)
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

    def _new_sample(self, request: Request, n: int) -> _Sample:
        self._next_seq_id += 1
        seq = Sequence(self._next_seq_id, request, n)
        row = self.sampler.new_row(request.params, tuple(seq.token_ids), request.stream_key, n)
        text = None
        if request.params.stop:
            if self.tokenizer is None:
                raise RequestError("no_tokenizer", "stop strings need a tokenizer; the model folder has none.")
            text = TextStream(self.tokenizer, request.params.stop, request.params.min_tokens)
        return _Sample(seq, row, text)

    def _launch(self, scheduled: list[Scheduled]) -> _Launched | None:
        """Start a step: run the tokens and sample the sequences whose tokens are all computed then."""
        lowest = max(item.seq.request.priority for item in scheduled)
        with nullcontext() if self._give_way is None else self._give_way.step(lowest):
            last_token_ids = None if self._launched is None else self._launched.sampled.token_ids
            hidden_states = self.runner.run(scheduled, last_token_ids)
        self._count_cached(scheduled)
        gather_prompt_logprobs(scheduled, hidden_states, self.runner.compute_logits)
        self.scheduler.advance(scheduled)
        ready: list[_Sample] = []
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

    def _take(self, sample: _Sample, token_id: int, logprobs: TokenLogprobs | None) -> Output:
        """Give a sample its token, and end it where that is the end."""
        seq, params = sample.seq, sample.seq.request.params
        seq.unread = None
        if token_id == NO_TOKEN:
            return self._end(sample, (), "error", error=_not_finite(len(seq)))
        if token_id in sample.row.stop_token_ids:
            return self._end(sample, (), "stop", text_length=_final_length(sample), stop_logprobs=logprobs)
        seq.append(token_id)
        self.metrics.generated_tokens += 1
        if logprobs is not None:
            seq.logprobs.append(logprobs)
        is_last = seq.num_generated == params.max_tokens
        if sample.text is not None:
            sample.text.push(token_id)
            length = _final_length(sample) if is_last else sample.text.stopped_at
            if length is not None:
                return self._end(sample, (token_id,), "stop", text_length=length)
        if is_last:
            return self._end(sample, (token_id,), "length")
        return Output(seq.request.request_id, seq.sample, (token_id,), new_logprobs=tuple(seq.logprobs[-1:]))

    def _end_prompts(self, scheduled: list[Scheduled]) -> list[Output]:
        """End the samples that were to run their prompt alone, and have."""
        done = [i.seq for i in scheduled if i.seq.request.params.max_tokens == 0 and i.seq.num_uncomputed_tokens == 0]
        return [self._end_prompt(self._samples[seq.request.request_id][seq.sample]) for seq in done]

    def _end_prompt(self, sample: _Sample) -> Output:
        for position, entry in enumerate(sample.seq.prompt_logprobs):
            if entry is not None and math.isnan(entry.logprob):
                return self._end(sample, (), "error", error=_not_finite(position))
        return self._end(sample, (), "length")

    def _end(
        self,
        sample: _Sample,
        new_token_ids: tuple[int, ...],
        finish_reason: str,
        *,
        text_length: int | None = None,
        error: tuple[str, str] | None = None,
        stop_logprobs: TokenLogprobs | None = None,
    ) -> Output:
        seq, request = sample.seq, sample.seq.request
        self.scheduler.finish(seq)
        self._leave(sample)
        of_request = self._samples[request.request_id]
        del of_request[seq.sample]
        if not of_request:
            del self._samples[request.request_id]
        completion = Completion(
            token_ids=tuple(seq.generated_token_ids),
            finish_reason=finish_reason,
            num_prompt_tokens=seq.num_prompt_tokens,
            text_length=text_length,
            logprobs=None if request.params.logprobs is None else tuple(seq.logprobs),
            prompt_logprobs=None if request.params.prompt_logprobs is None else tuple(seq.prompt_logprobs),
            error=error,
            stop_logprobs=stop_logprobs,
        )
        new_logprobs = tuple(seq.logprobs[len(seq.logprobs) - len(new_token_ids) :]) if seq.logprobs else ()
        return Output(request.request_id, seq.sample, new_token_ids, completion, new_logprobs)

    def _leave(self, sample: _Sample) -> None:
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


def _not_finite(num_tokens: int) -> tuple[str, str]:
    return "nan_logits", f"the model's logits after token {num_tokens} are not finite numbers."


def _final_length(sample: _Sample) -> int | None:
    """Where a stop string cuts the text that is now complete: its last held back characters may be one's end."""
    if sample.text is None:
        return None
    sample.text.finish()
    return sample.text.stopped_at


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
