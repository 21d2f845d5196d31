"""Scheduler: which tokens of which sequences run in the next step.

Decodes first, then prefill chunks, then admissions, each in order of priority and arrival, within the limits of a
step. When blocks run out, the last in that order are preempted: their blocks go back, and they are computed again
later. A request is admitted at the cost of those of a lower priority: they make way where seats or blocks are lacking,
and stand aside while its prompt is computed. Who begins with what another is just computing waits for it.
"""

from bisect import insort
from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.errors import RequestError
from engine.limits import num_cached_tokens
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens to run in this step: `num_tokens` of `seq`, starting at seq.num_computed_tokens."""

    seq: Sequence
    num_tokens: int


def precedence(seq: Sequence) -> tuple[int, int]:
    """Sort key of who goes first and who is preempted last: priority, then order of arrival."""
    return seq.request.priority, seq.seq_id


def _is_prefill(seq: Sequence) -> bool:
    return seq.num_uncomputed_tokens > 1


@dataclass
class _Budget:
    """Tokens that a step may still take. bulk: of prompts below the highest priority."""

    tokens: int
    bulk: int

    def left(self, seq: Sequence) -> int:
        return min(self.tokens, self.bulk) if seq.request.priority > 0 else self.tokens

    def take(self, seq: Sequence) -> int:
        """What the sequence gets."""
        is_prefill = _is_prefill(seq)
        num_tokens = min(seq.num_uncomputed_tokens, self.left(seq) if is_prefill else self.tokens)
        self.tokens -= num_tokens
        if is_prefill and seq.request.priority > 0:
            self.bulk -= num_tokens
        return num_tokens


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute.

    max_num_seqs:            most sequences in a step, at most max_num_batched_tokens of them
    max_num_batched_tokens:  most tokens in a step
    max_model_len:           longest prompt + completion
    original_max_position_embeddings:  LongRoPE: a sequence longer than this uses the long factors; None = no LongRoPE
    static_long:             LongRoPE: the long factors for all
    max_num_bulk_tokens:     most tokens that a step computes of prompts below the highest priority, which is 0: who
                             comes meanwhile waits for the step's end. None = no such limit

    A running sequence has blocks for all its tokens, so a prefill never stops half way for lack of room. The first in
    precedence always runs and gets what it needs from the others, so every sequence ends. Between schedule() and
    advance() call nothing else.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        original_max_position_embeddings: int | None,
        static_long: bool = False,
        max_num_bulk_tokens: int | None = None,
    ) -> None:
        self.max_num_bulk_tokens = max_num_batched_tokens if max_num_bulk_tokens is None else max_num_bulk_tokens
        limits = (max_num_seqs, max_num_batched_tokens, self.max_num_bulk_tokens)
        assert min(limits) > 0, f"{max_num_seqs=}, {max_num_batched_tokens=}, {max_num_bulk_tokens=}"
        self.block_manager = block_manager
        # Each gets a token: with more sequences than tokens, decodes could keep a prefill before them waiting.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.original_max_position_embeddings = original_max_position_embeddings
        self.static_long = static_long
        self.num_preemptions = 0
        self.waiting: list[Sequence] = []  # both in order of precedence
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises RequestError when it can never run: "empty_prompt"; "too_long" for max_model_len; "no_cache_room" when
        the whole KV cache is too small for it.
        """
        prompt, max_tokens = seq.num_prompt_tokens, seq.request.params.max_tokens
        if prompt == 0:
            raise RequestError("empty_prompt", "the prompt has no tokens; it needs at least 1.")
        if prompt + max_tokens > self.max_model_len:
            raise RequestError(
                "too_long",
                f"needs {prompt + max_tokens:,} tokens (prompt {prompt:,} + max_tokens {max_tokens:,}); "
                f"this engine holds {self.max_model_len:,}. Shorten it or raise max_model_len.",
            )
        blocks = self.block_manager
        num_blocks = blocks.blocks_for(num_cached_tokens(prompt, max_tokens))
        if num_blocks > blocks.num_blocks:
            raise RequestError(
                "no_cache_room",
                f"needs {num_blocks:,} cache blocks of {blocks.block_size} tokens (prompt {prompt:,} + max_tokens "
                f"{max_tokens:,}); the KV cache has {blocks.num_blocks:,}. Shorten it or raise engine.kv_cache_memory.",
            )
        insort(self.waiting, seq, key=precedence)

    def num_cached_tokens(self, seq: Sequence) -> int:
        """How many of its leading tokens a sequence would find in the prefix cache, if it was admitted now."""
        self._settle_rope_set(seq)
        return self.block_manager.num_cached_tokens(seq)

    def schedule(self) -> list[Scheduled]:
        """Choose the tokens of the next step, and give their sequences blocks.

        Not empty while has_work, unless all that is left has its last token sampled.
        """
        self._make_room()
        self._admit_urgent()
        budget = _Budget(self.max_num_batched_tokens, self.max_num_bulk_tokens)
        wanting = [seq for seq in self.running if not seq.is_complete]
        prefills = [seq for seq in wanting if _is_prefill(seq)]
        lowest = prefills[0].request.priority if prefills else None
        running = [seq for seq in wanting if lowest is None or seq.request.priority <= lowest]
        scheduled = []
        for seq in sorted(running, key=_is_prefill):
            num_tokens = budget.take(seq)
            if num_tokens == 0:
                break
            scheduled.append(Scheduled(seq, num_tokens))
        return scheduled + self._admit(budget, lowest)

    def advance(self, scheduled: list[Scheduled]) -> None:
        """Record that the step ran."""
        for item in scheduled:
            item.seq.num_computed_tokens += item.num_tokens
            self.block_manager.register(item.seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence and free its blocks."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.block_manager.register(seq)  # its last tokens may have been read since they were computed
        self.block_manager.free(seq)

    def abort(self, request_id: str) -> list[Sequence]:
        """Remove all sequences of a request and free their blocks; returns those that were still there."""
        removed = [seq for seq in [*self.running, *self.waiting] if seq.request.request_id == request_id]
        for seq in removed:
            self.finish(seq)
        return removed

    def _make_room(self) -> None:
        """Give each running sequence blocks for all its tokens, preempting from the end where there are too few."""
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if seq.is_complete:
                index += 1
                continue
            if seq.rope_set != self._rope_set(seq):
                self.num_preemptions += 1
                self.block_manager.free(seq)
                self._start(seq)
            while index < len(self.running) and not self.block_manager.ensure(seq, len(seq)):
                self._preempt_last()
            index += 1

    def _preempt_last(self) -> None:
        seq = self.running.pop()
        self.num_preemptions += 1
        self.block_manager.free(seq)
        insort(self.waiting, seq, key=precedence)

    def _admit_urgent(self) -> None:
        """Admit what goes before some that run, as far as there are tokens for it, preempting those it needs to."""
        index = 0
        while index < len(self.waiting) and self._is_urgent(self.waiting[index]):
            seq = self.waiting[index]
            equals = [other for other in self.running if other.request.priority <= seq.request.priority]
            tokens = sum(other.num_uncomputed_tokens for other in equals if not other.is_complete)
            if tokens >= self.max_num_batched_tokens:
                return
            if seq.is_complete or not self._start_alone(seq):
                index += 1
                continue
            if len(self.running) == self.max_num_seqs:
                self._preempt_last()
            while not self.block_manager.ensure(seq, len(seq), spare=len(equals) // 2):
                if not self._is_urgent(seq):
                    self.block_manager.free(seq)
                    return
                self._preempt_last()
            del self.waiting[index]
            insort(self.running, seq, key=precedence)

    def _is_urgent(self, seq: Sequence) -> bool:
        """Whether some that run have a lower priority."""
        return bool(self.running) and self.running[-1].request.priority > seq.request.priority

    def _admit(self, budget: "_Budget", lowest: int | None) -> list[Scheduled]:
        """lowest: priority that may be admitted; None = any."""
        admitted: list[Scheduled] = []
        index = 0
        while index < len(self.waiting) and len(self.running) < self.max_num_seqs:
            seq = self.waiting[index]
            if not budget.left(seq) or (lowest is not None and seq.request.priority > lowest):
                break
            if seq.is_complete or not self._start_alone(seq):
                index += 1
                continue
            # Room for every second one to grow: a full cache would preempt the newcomer within a few steps.
            if not self.block_manager.ensure(seq, len(seq), spare=len(self.running) // 2):
                self.block_manager.free(seq)
                break
            del self.waiting[index]
            insort(self.running, seq, key=precedence)
            admitted.append(Scheduled(seq, budget.take(seq)))
            lowest = seq.request.priority
        return admitted

    def _start_alone(self, seq: Sequence) -> bool:
        """Start a waiting sequence, unless its next block is being computed by one that it does not go before."""
        self._start(seq)
        for other in self.running:
            is_before = _is_prefill(other) and other.request.priority <= seq.request.priority
            if is_before and self.block_manager.is_computed_by(other, seq):
                self.block_manager.free(seq)
                return False
        return True

    def _start(self, seq: Sequence) -> None:
        """Look up the prefix of a sequence without blocks."""
        self._settle_rope_set(seq)
        self.block_manager.match_prefix(seq)

    def _settle_rope_set(self, seq: Sequence) -> None:
        if seq.rope_set != (rope_set := self._rope_set(seq)):
            seq.rope_set = rope_set
            seq.block_hashes.clear()

    def _rope_set(self, seq: Sequence) -> int:
        original = self.original_max_position_embeddings
        return int(self.static_long or (original is not None and len(seq) > original))
