"""Engine: runs requests on a model by continuous batching. A batch worker or the endpoint calls it from one thread."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from moray.engine.config import EngineConfig
from moray.engine.core.block_manager import BlockManager
from moray.engine.core.gathering import choose_gathering
from moray.engine.core.lower_limits import describe_change, lower_limits
from moray.engine.core.scheduler import Scheduled, Scheduler
from moray.engine.core.sequence import Sequence
from moray.engine.core.step_limits import DEFAULTS
from moray.engine.core.token_cost import token_cost
from moray.engine.errors import EngineError, RequestError
from moray.engine.layers.attention import attention_layers
from moray.engine.metrics import EngineStats, Metrics
from moray.engine.models.base import CausalLM
from moray.engine.params import SamplingParams
from moray.engine.request import Output, Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.open_model import open_model
from moray.engine.runner.ranks import Ranks
from moray.engine.runner.step_interrupt import StepInterrupted, StepInterrupter
from moray.engine.sampling.prompt_logprobs import PromptLogprobs
from moray.engine.sampling.running_sample import RunningSample
from moray.engine.sampling.sampler import PendingSamples
from moray.engine.structured.constraint import Structured
from moray.engine.text.grammar import Grammars
from moray.engine.text.stream import TextStream

logger = logging.getLogger(__name__)

_NEW_TOKEN_IDS = attrgetter("new_token_ids")


@dataclass(frozen=True)
class _LaunchedStep:
    """Holds a launched step whose results have not been read yet.

    samples:          the samples that get a token from this step
    pending:          their tokens, one a sample in the same order; None = there are none
    prompt_logprobs:  of the step's tokens
    prompt_only:      the samples with max_tokens 0 whose prompt is computed with this step
    """

    samples: list[RunningSample]
    pending: PendingSamples | None
    prompt_logprobs: PromptLogprobs
    prompt_only: list[RunningSample]


class Engine:
    """Runs requests on a loaded model by continuous batching.

    add() queues a request, step() runs one step and returns its outputs, has_work is True while another step is
    needed, and abort() removes a request. Not thread-safe.

    With async_scheduling, a step is scheduled and launched before the tokens of the previous step are read. Tokens
    are therefore returned one step late, and a sequence that its newest token ends has run one step for nothing.

    A sample that must obey a grammar gets a mask for each token, which follows from all tokens before. Where such a
    sample has an unread token, the model runs the next step first, then the tokens are read, then the next ones are
    sampled: the host makes the masks while the device runs the model.
    """

    def __init__(
        self,
        model_path: str,
        config: EngineConfig | None = None,
        *,
        load: Callable[..., CausalLM] = load_model,
        ranks: Ranks | None = None,
    ) -> None:
        """Load the model at `model_path`: a folder, s3://, gs:// or hf://.

        load: builds the model, with the signature of load_model; benchmarks of large models pass a function that
              needs no weights on disk
        ranks: processes that were started before, for the same tensor_parallel and expert_parallel; None = the engine
               starts its own, which end with it

        Raises CheckpointError when the model cannot be run with this config, and EngineError when a rank fails.
        """
        config = config or EngineConfig()
        opened = open_model(model_path, config, load=load, ranks=ranks)
        backend = opened.backend
        self.folder, self.tokenizer, self._ranks = opened.folder, opened.tokenizer, opened.ranks
        self.model_config, self.dtype, self.runner = opened.config, opened.dtype, opened.runner
        self.device_name = backend.device_name
        self.products = backend.products
        self.limits = opened.limits
        original = self.model_config.rope.original_max_position_embeddings
        self._scheduler = Scheduler(
            BlockManager(self.limits.num_blocks, self.limits.block_size),
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            max_num_bulk_tokens=self.limits.max_num_bulk_tokens,
            max_model_len=self.limits.max_model_len,
            original_max_position_embeddings=original,
            token_cost=token_cost(self.model_config),
            gathering=choose_gathering(
                self.limits.max_num_seqs, DEFAULTS[backend.name].empty_share, is_bulk=config.is_bulk
            ),
            static_long=config.longrope == "static" and original is not None and self.limits.max_model_len > original,
        )
        eos = self.model_config.eos_token_ids if self.tokenizer is None else self.tokenizer.stop_token_ids
        self.sampler = backend.make_sampler(self.model_config.vocab_size, eos)
        self._grammars = Grammars(self.tokenizer, self.model_config.vocab_size, sorted(self.sampler.eos_token_ids))
        self._jumps = True  # tests compare with an engine that samples each token
        self.metrics = Metrics()
        self._samples: dict[str, dict[int, RunningSample]] = {}  # request_id -> sample number -> unfinished sample
        self._num_grammars = 0  # of the unfinished samples
        self._samples_by_seq: dict[int, RunningSample] = {}  # the same ones by the id of their sequence
        layers = attention_layers(self.runner.model)
        self._interrupter = None if backend.is_async else StepInterrupter(layers, backend.call_in_step)
        self._is_async = config.async_scheduling if config.async_scheduling is not None else backend.is_async
        self._launched: _LaunchedStep | None = None
        self._current_step: tuple[float, float] | None = None  # the running step: its start, and busy_s before it
        self._next_seq_id = 0
        logger.info("%s in %s on %s, %s", self.model_config.architecture, self.dtype, backend.torch_device, self.limits)

    @property
    def rank_pids(self) -> list[int]:
        """The processes of the other ranks, if there are any."""
        return self._ranks.pids

    @property
    def has_work(self) -> bool:
        """Return whether another step is needed."""
        return self._scheduler.has_work or self._launched is not None

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises RequestError when the request can never run, with the code "too_long", "no_cache_room", "empty_prompt",
        "bad_token_id", "bad_params", "no_tokenizer", "duplicate_id", or those of compile().
        """
        if request.request_id in self._samples:
            raise RequestError("duplicate_id", f"request {request.request_id!r} is already in the engine.")
        self._check_token_ids(request)
        samples = self._make_samples(request)
        try:
            for sample in samples.values():
                self._scheduler.add(sample.seq)
        except RequestError:
            self._scheduler.abort(request.request_id)
            raise
        self._samples[request.request_id] = samples
        self._samples_by_seq.update((sample.seq.seq_id, sample) for sample in samples.values())
        self._num_grammars += sum(sample.grammar is not None for sample in samples.values())
        self.metrics.prompt_tokens += request.num_input_tokens

    def compile(self, structured: Structured) -> None:
        """Compile what completions must obey, which takes milliseconds, or a second if it is large; it is kept.

        May be called from any thread. Hosts call it before add(), which would compile it in the engine's thread, and
        check_apart before both where the grammar is a stranger's.

        Raises RequestError: "bad_grammar" if it cannot be followed; "no_tokenizer" and "no_grammar_tokenizer" if the
        model's folder has no tokenizer, or none that can be used for it.
        """
        self._grammars.compile(structured)

    def is_compiled(self, structured: Structured) -> bool:
        """Return whether compile() has nothing to do, without waiting. May be called from any thread."""
        return self._grammars.is_compiled(structured)

    def cached_prefix(self, request: Request) -> Callable[[], int]:
        """Return a function that counts the leading prompt tokens of `request` that the prefix cache holds when called.

        The request need not be in the engine: hosts use the count to choose which request to add next.
        """
        return partial(self._scheduler.num_cached_tokens, Sequence(0, request))

    def abort(self, request_id: str) -> None:
        """Remove a request and free its cache blocks. An unknown or finished request is ignored."""
        self._scheduler.abort(request_id)
        for sample in self._samples.pop(request_id, {}).values():
            self._release(sample)

    def stats(self) -> EngineStats:
        """Return the present statistics. May be called from any thread, also while a step runs."""
        totals = replace(self.metrics)
        step = self._current_step  # read after the totals, which may include the step already
        if step is not None and step[1] == totals.busy_s:
            totals.busy_s += time.perf_counter() - step[0]
        scheduler, blocks = self._scheduler, self._scheduler.block_manager
        limits = self.limits
        return EngineStats(
            scheduler.num_waiting,
            blocks.num_free,
            blocks.num_blocks,
            totals,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Call it while no request is in the engine."""
        self._scheduler.block_manager.reset()

    def expert_tokens(self) -> Tensor:
        """Return how many tokens were routed to each expert since the engine started.

        The result is [num_layers, num_experts] int64, on the host. On a GPU the call waits for all launched work, so
        call it rarely.
        """
        return self.runner.read_expert_load()

    def interrupt_step(self, priority: int) -> None:
        """Allow the running step to be interrupted for a request of `priority` that is about to be added.

        A step is interrupted only if it runs requests of a lower priority. May be called from any thread.
        """
        if self._interrupter is not None:
            self._interrupter.request(priority)

    def step(self) -> list[Output]:
        """Run one step and return an Output for each sample that got a token or finished.

        With async scheduling the tokens are those of the previous step. An interrupted step returns nothing.
        """
        started = time.perf_counter()
        self._current_step = started, self.metrics.busy_s
        try:
            return self._run_step()
        finally:
            self.metrics.busy_s += time.perf_counter() - started
            self._current_step = None

    def _run_step(self) -> list[Output]:
        scheduled = self._scheduler.schedule()
        starting = _find_starting(scheduled)
        prompt_logprobs = PromptLogprobs()
        try:
            hidden_states = self._run_model(scheduled, starting, prompt_logprobs) if scheduled else None
        except StepInterrupted:
            return []
        except torch.OutOfMemoryError as error:
            self._lower_limits(error, scheduled)
            prompt_logprobs.read()  # those that were launched before it; the others follow
            return []  # nothing has been advanced: the same tokens are scheduled again, fewer at once
        ready = self._find_ready(scheduled)
        outputs: list[Output] = []
        if self._num_grammars and any(
            sample.grammar is not None and sample.seq.pending_row is not None for sample in ready.values()
        ):
            outputs = self._collect_outputs()
            # Some have ended, and some have got tokens that are not sampled, which have to run first.
            ready = {row: s for row, s in ready.items() if s.is_live and s.seq.num_uncomputed_tokens == 0}
        pending = None
        if hidden_states is not None and ready:
            pending = self._launch_sampling_within_limits(hidden_states, ready, scheduled)
            if pending is None:  # their last tokens are computed again
                ready = {}
        prompt_only = self._find_prompt_only(starting)
        outputs += self._collect_outputs()
        if pending is not None or prompt_only or not prompt_logprobs.is_empty:
            self._launched = _LaunchedStep(list(ready.values()), pending, prompt_logprobs, prompt_only)
        for row, sample in enumerate(ready.values()):
            if sample.is_live:
                sample.seq.await_token(row)
        if not self._is_async:
            outputs += self._collect_outputs()
        self.metrics.steps += 1
        self.metrics.computed_tokens += 0 if hidden_states is None else hidden_states.shape[0]
        self.metrics.preemptions = self._scheduler.num_preemptions
        return outputs

    def _check_token_ids(self, request: Request) -> None:
        if request.continuations and not request.prompt_token_ids:
            raise RequestError("empty_prompt", "the prompt has no tokens; to score continuations it needs at least 1.")
        size = self.model_config.vocab_size
        if bad := [i for ids in (request.prompt_token_ids, *request.continuations) for i in ids if not 0 <= i < size]:
            raise RequestError(
                "bad_token_id", f"the prompt has token id {bad[0]}; this model's go from 0 to {size - 1}."
            )

    def _make_samples(self, request: Request) -> dict[int, RunningSample]:
        """Return the request's samples by their numbers. Raises RequestError for parameters that cannot be followed."""
        params, stop_token_ids = request.params, self.sampler.stop_token_ids(request.params)
        if params.stop and self.tokenizer is None:
            raise RequestError("no_tokenizer", "stop strings need a tokenizer; the model folder has none.")
        samples = {}
        for n in range(request.num_samples):
            self._next_seq_id += 1
            samples[n] = RunningSample(Sequence(self._next_seq_id, request, n), stop_token_ids)
            if params.stop and self.tokenizer is not None:
                samples[n].text = TextStream(self.tokenizer, params.stop, params.min_tokens)
            if params.structured is not None and params.max_tokens > 0:
                samples[n].grammar = self._grammars.matcher(params.structured)
                samples[n].jumps = self._jumps and _may_jump(params)
                samples[n].begin()
        return samples

    def _run_model(
        self, scheduled: list[Scheduled], starting: list[Sequence], prompt_logprobs: PromptLogprobs
    ) -> Tensor:
        """Run the scheduled tokens, launch their prompt logprobs, and return their hidden states.

        starting: from _find_starting()
        """
        runner = self.runner
        wants_logprobs = any(seq.request.params.prompt_logprobs is not None for seq in starting)
        load_before = runner.expert_load.copy() if wants_logprobs else None
        pending = None if self._launched is None else self._launched.pending
        last_token_ids = None if pending is None else pending.token_ids
        with self._interruptible(scheduled):
            hidden_states = runner.run(scheduled, last_token_ids)
        if load_before is not None:
            step = scheduled, hidden_states, runner.compute_logits, self.sampler, runner.backend.logprob_rows
            try:
                runner.retry_out_of_memory(lambda: prompt_logprobs.launch(*step))
            except torch.OutOfMemoryError:
                runner.expert_load.restore(load_before)  # the model has run, and runs again
                raise
        self._count_cached_tokens(starting)
        self._scheduler.advance(scheduled)
        return hidden_states

    def _interruptible(self, scheduled: list[Scheduled]) -> AbstractContextManager[None]:
        """Return a context in which the step may be interrupted, on a device where a step is."""
        if self._interrupter is None:
            return nullcontext()
        return self._interrupter.step(max(item.seq.request.priority for item in scheduled))

    def _find_ready(self, scheduled: list[Scheduled]) -> dict[int, RunningSample]:
        """Return the samples whose tokens are all computed and that need another one, by the row of the last token."""
        ready: dict[int, RunningSample] = {}
        last = -1
        for seq, num_tokens in scheduled:
            last += num_tokens
            if seq.num_computed_tokens == seq.num_tokens and seq.max_num_tokens > seq.num_prompt_tokens:
                ready[last] = self._samples_by_seq[seq.seq_id]
        return ready

    def _launch_sampling(self, hidden_states: Tensor, ready: dict[int, RunningSample]) -> PendingSamples:
        """Launch sampling of the next token of each sample; the samples are by their rows of the hidden states."""
        logits, samples = self.runner.compute_logits(hidden_states, list(ready)), list(ready.values())
        return self.runner.retry_out_of_memory(lambda: self.sampler.launch(logits, samples))

    def _find_prompt_only(self, starting: list[Sequence]) -> list[RunningSample]:
        """Return the samples with max_tokens 0 whose prompt is computed; their cache blocks are free from now on."""
        found = []
        for seq in starting:
            if seq.max_num_tokens == seq.num_prompt_tokens and seq.num_uncomputed_tokens == 0:
                self._scheduler.finish(seq)
                found.append(self._samples_by_seq[seq.seq_id])
        return found

    def _launch_sampling_within_limits(
        self, hidden_states: Tensor, ready: dict[int, RunningSample], scheduled: list[Scheduled]
    ) -> PendingSamples | None:
        """Launch sampling. None: that ran out of memory; fewer samples will have their last tokens computed again."""
        try:
            return self._launch_sampling(hidden_states, ready)
        except torch.OutOfMemoryError as error:
            for sample in ready.values():
                self._scheduler.repeat_last(sample.seq)
            self._lower_limits(error, scheduled, len(ready))
            return None

    def _lower_limits(
        self, error: torch.OutOfMemoryError, scheduled: list[Scheduled], num_sampled: int | None = None
    ) -> None:
        """Lower the limits after a step ran out of memory twice; see lower_limits.

        Raises the error where the step cannot be smaller, and EngineError where the model is split among ranks.
        """
        num_tokens, old, reason = sum(item.num_tokens for item in scheduled), self.limits, str(error).splitlines()[0]
        if self._ranks.size > 1:
            limits = f"max_num_batched_tokens ({old.max_num_batched_tokens:,}) or max_num_seqs ({old.max_num_seqs:,})"
            raise EngineError(
                f"{reason}; the step had {num_tokens:,} tokens of {len(scheduled):,} sequences. The other ranks have "
                f"run it, so that it cannot be repeated: lower engine.kv_cache_memory, or engine.{limits}."
            ) from error
        lowered = lower_limits(old, num_tokens, num_sampled)
        if lowered is None:
            raise error
        logger.warning(
            "%s, twice, in a step of %d tokens of %d sequences; it lowers %s. Nothing is lost: the step runs again in "
            "smaller ones. Set the keys, or a smaller engine.kv_cache_memory, to avoid it.",
            reason,
            num_tokens,
            len(scheduled),
            describe_change(old, lowered),
        )
        self.limits = lowered
        self._scheduler.lower(lowered.max_num_seqs, lowered.max_num_batched_tokens)
        self.metrics.lowered_limits += 1

    def _collect_outputs(self) -> list[Output]:
        """Wait for the results of the launched step and return its outputs, without samples that ended meanwhile."""
        launched, self._launched = self._launched, None
        if launched is None:
            return []
        launched.prompt_logprobs.read()
        outputs = []
        for sample in launched.prompt_only:
            if sample.is_live:
                self._forget(sample)
                outputs.append(sample.finish_prompt())
        if launched.pending is not None:
            result = launched.pending.read()
            for sample, token_id, logprobs in zip(launched.samples, result.token_ids, result.logprobs, strict=True):
                if sample.is_live:
                    output = sample.append_token(token_id, logprobs)
                    outputs.append(output)
                    if output.completion is not None:
                        self._finish(sample)
        self.metrics.generated_tokens += sum(map(len, map(_NEW_TOKEN_IDS, outputs)))
        return outputs

    def _finish(self, sample: RunningSample) -> None:
        self._scheduler.finish(sample.seq)
        self._forget(sample)

    def _forget(self, sample: RunningSample) -> None:
        """Remove a sample that the scheduler has finished."""
        request_id = sample.seq.request.request_id
        self._release(sample)
        running = self._samples[request_id]
        del running[sample.seq.sample]
        if not running:
            del self._samples[request_id]

    def _release(self, sample: RunningSample) -> None:
        sample.is_live = False
        self._num_grammars -= sample.grammar is not None
        del self._samples_by_seq[sample.seq.seq_id]
        self.sampler.release(sample)

    def _count_cached_tokens(self, starting: list[Sequence]) -> None:
        just_admitted = [seq for seq in starting if seq.num_computed_tokens == seq.num_cached_tokens]
        self.metrics.cached_tokens += sum(seq.num_cached_tokens for seq in just_admitted)


def _find_starting(scheduled: list[Scheduled]) -> list[Sequence]:
    """Return the sequences of a step that does not only decode them: in their prompts, or just admitted."""
    return [
        seq
        for seq, _ in scheduled
        if seq.num_computed_tokens < seq.num_prompt_tokens or seq.num_computed_tokens == seq.num_cached_tokens
    ]


def _may_jump(params: SamplingParams) -> bool:
    """Return whether tokens that a grammar forces need not be sampled: nobody wants their logprobs or counts them."""
    has_penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return params.logprobs is None and not has_penalties
