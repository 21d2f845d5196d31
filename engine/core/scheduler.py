"""Scheduler: chooses which tokens of which sequences run in the next step.

A step takes decodes first, then prefill chunks, then newly admitted sequences, each in order of priority and arrival,
within the limits of a step. A decode is the newest token, with those that a grammar forced after it. When blocks run
out, the last running sequences in that order are preempted: their blocks are freed, and they are recomputed later. A
request preempts requests of a lower priority when batch slots or blocks run out, and they pause while its prompt is
computed. A sequence whose next block is being computed by another one waits for it; later sequences may be admitted
meanwhile.

Attention takes longer the more keys come before a token, so a step takes fewer tokens of a prompt the longer that is
already. A prompt that takes many steps leaves a part of each to shorter prompts, and long prompts are computed one
after the other.

Prompts that nobody waits for may gather before they are admitted, so that fewer steps contain prompts; see Gathering.
"""

import math
from bisect import insort
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import NamedTuple

from moray.engine.core.block_manager import BlockManager
from moray.engine.core.gathering import AT_ONCE, Gathering
from moray.engine.core.limits import check_length, num_cached_tokens
from moray.engine.core.sequence import Sequence
from moray.engine.core.token_cost import TokenCost
from moray.engine.errors import RequestError

LONG_STEPS = 4  # a prompt that takes more whole steps is long
LONG_SHARE = 0.75  # share of a step's tokens for a long prompt, where shorter prompts can use the rest
EQUAL_COST = TokenCost(math.inf)


class Scheduled(NamedTuple):
    """Names the tokens of one sequence in a step: `num_tokens` of `seq`, starting at seq.num_computed_tokens."""

    seq: Sequence
    num_tokens: int


_SCHEDULED = partial(tuple.__new__, Scheduled)  # as Scheduled._make, without a call of Python's
_NUM_FORCED = attrgetter("num_forced")


def precedence(seq: Sequence) -> tuple[int, int]:
    """Return the sort key of a sequence: priority, then arrival. The smallest key runs first and is preempted last."""
    return seq.request.priority, seq.seq_id


def _is_prefill(seq: Sequence) -> bool:
    """Return whether a sequence has tokens to compute besides the last sampled one and those forced after it."""
    return seq.num_tokens - seq.num_computed_tokens > 1 + seq.num_forced


def _prefills_of(seqs: list[Sequence]) -> list[Sequence]:
    """Return those that _is_prefill() names, without a call for each: this runs over all sequences of a step."""
    return [seq for seq in seqs if seq.num_tokens - seq.num_computed_tokens > 1 + seq.num_forced]


@dataclass
class _Budget:
    """Counts the tokens that a step may still schedule; a token of a long prompt counts as several.

    tokens:              of all sequences
    low_priority_tokens: of prompts below the highest priority
    cost:                as how many tokens a prompt token counts
    """

    tokens: int
    low_priority_tokens: int
    cost: TokenCost

    def remaining(self, seq: Sequence) -> int:
        """Return how many prompt tokens of the sequence may still be scheduled."""
        return min(self.tokens, self.low_priority_tokens) if seq.request.priority > 0 else self.tokens

    def consume_decode(self, seq: Sequence, num_others: int) -> int:
        """Schedule the newest token of a sequence, with those that were forced after it, and return how many.

        num_others: running sequences that come after it: forced tokens leave each of them a token
        """
        num_tokens = seq.num_tokens - seq.num_computed_tokens
        if num_tokens != 1 or not self.tokens:
            num_tokens = min(num_tokens, self.tokens, max(1, self.tokens - num_others))
        self.tokens -= num_tokens
        return num_tokens

    def consume(self, seq: Sequence, *, num_scheduled: int = 0, share: float = 1.0) -> int:
        """Schedule as many more tokens of the sequence as a share of the budget allows, and return how many.

        num_scheduled:  tokens of the sequence that the step has already
        """
        num_left = seq.num_uncomputed_tokens - num_scheduled
        if not _is_prefill(seq):
            num_tokens = used = min(num_left, self.tokens)
        else:
            available = math.ceil(share * self.remaining(seq))
            cost = self.cost.at(seq.num_computed_tokens + num_scheduled)
            least = 0 if num_scheduled else min(available, 1)
            num_tokens = min(num_left, max(int(available / cost), least))
            used = min(available, math.ceil(num_tokens * cost))
            if seq.request.priority > 0:
                self.low_priority_tokens -= used
        self.tokens -= used
        return num_tokens


class Scheduler:
    """Schedules sequences by continuous batching, with chunked prefill and preemption by recomputation.

    max_num_seqs:            maximum sequences in a step; at most max_num_batched_tokens
    max_num_batched_tokens:  maximum tokens in a step
    max_model_len:           longest prompt + completion, in tokens
    original_max_position_embeddings:  LongRoPE: a sequence longer than this uses the long factors; None = no LongRoPE
    static_long:             LongRoPE: all sequences use the long factors
    max_num_bulk_tokens:     maximum prompt tokens in a step of requests below the highest priority, which is 0; it
                             bounds the length of such a step, whose end an urgent request must wait for. None = no
                             such limit
    token_cost:              how much longer a step takes for a prompt token at a later position
    gathering:               which prompts wait for others, and how many seats stay empty meanwhile

    A running sequence has blocks for all its tokens, so a prefill never stops half way because blocks are missing. The
    first sequence in precedence always runs, and preempts other sequences for what it needs, so every sequence ends.
    Between schedule() and advance() call nothing else; a step that was interrupted is scheduled again instead.
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
        token_cost: TokenCost = EQUAL_COST,
        gathering: Gathering = AT_ONCE,
    ) -> None:
        self.max_num_bulk_tokens = max_num_batched_tokens if max_num_bulk_tokens is None else max_num_bulk_tokens
        limits = (max_num_seqs, max_num_batched_tokens, self.max_num_bulk_tokens)
        assert min(limits) > 0, f"{max_num_seqs=}, {max_num_batched_tokens=}, {max_num_bulk_tokens=}"
        self.block_manager = block_manager
        # Each running sequence must get a token: with more sequences than tokens, decodes could starve a prefill that
        # precedes them.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.original_max_position_embeddings = original_max_position_embeddings
        self.static_long = static_long
        longest = math.inf if original_max_position_embeddings is None else original_max_position_embeddings
        self._last_short = 0 if static_long else longest  # a longer sequence uses the long factors
        self.token_cost = token_cost
        self.gathering = gathering
        self.num_preemptions = 0
        self.waiting: list[Sequence] = []  # waiting and running are both sorted by precedence
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Return whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Return the number of sequences that are not admitted."""
        return len(self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises RequestError when it can never run: "empty_prompt"; "too_long" if it exceeds max_model_len;
        "no_cache_room" if the whole KV cache is too small for it.
        """
        prompt, max_tokens = seq.num_prompt_tokens, seq.request.params.max_tokens
        if prompt == 0:
            raise RequestError("empty_prompt", "the prompt has no tokens; it needs at least 1.")
        check_length(prompt, max_tokens, self.max_model_len)
        blocks = self.block_manager
        num_blocks = blocks.blocks_for(num_cached_tokens(prompt, max_tokens))
        if num_blocks > blocks.num_blocks:
            raise RequestError(
                "no_cache_room",
                f"needs {num_blocks:,} cache blocks of {blocks.block_size} tokens (prompt {prompt:,} + max_tokens "
                f"{max_tokens:,}); the KV cache has {blocks.num_blocks:,}. Shorten it or raise engine.kv_cache_memory.",
                field="max_tokens" if blocks.blocks_for(num_cached_tokens(1, max_tokens)) > blocks.num_blocks else None,
            )
        insort(self.waiting, seq, key=precedence)

    def num_cached_tokens(self, seq: Sequence) -> int:
        """Return how many leading tokens of a sequence are in the prefix cache, if it were admitted now."""
        self._update_rope_set(seq)
        return self.block_manager.num_cached_tokens(seq)

    def schedule(self) -> list[Scheduled]:
        """Choose the tokens of the next step, and allocate blocks for them.

        While has_work is True the result is not empty, unless every sequence has its last token sampled already.
        """
        self._ensure_blocks()
        self._admit_by_priority()
        is_shared = len(self.running) + len(self.waiting) > 1  # else nobody waits for the end of the step
        cost = self.token_cost if is_shared else EQUAL_COST
        budget = _Budget(self.max_num_batched_tokens, self.max_num_bulk_tokens, cost)
        decodes, prefills = self._candidates()
        lowest = prefills[0].request.priority if prefills else None
        if lowest is not None:
            decodes, prefills = ([s for s in seqs if s.request.priority <= lowest] for seqs in (decodes, prefills))
        has_forced = any(map(_NUM_FORCED, decodes))
        scheduled = self._schedule_decodes(decodes, budget, len(prefills), has_forced=has_forced)
        num_single = 0 if has_forced else len(scheduled)
        for seq in prefills:
            num_tokens = budget.consume(seq, share=self._share(seq))
            if num_tokens == 0:
                break
            scheduled.append(Scheduled(seq, num_tokens))
        if lowest is not None or not scheduled or not self._waits_for_more(budget):
            scheduled += self._admit(budget, lowest)
        for i, item in enumerate(scheduled[num_single:], num_single):
            if item.num_tokens > 1 and budget.tokens:  # what a long prompt left and nobody took
                more = budget.consume(item.seq, num_scheduled=item.num_tokens)
                scheduled[i] = Scheduled(item.seq, item.num_tokens + more)
        return scheduled

    def advance(self, scheduled: list[Scheduled]) -> None:
        """Record that the step ran."""
        block_size, register = self.block_manager.block_size, self.block_manager.register
        for seq, num_tokens in scheduled:
            seq.num_computed_tokens = num_computed = seq.num_computed_tokens + num_tokens
            if num_computed >= (seq.num_registered + 1) * block_size:
                register(seq)

    def repeat_last(self, seq: Sequence) -> None:
        """Let the newest token of a sequence be computed again, because nothing was sampled after it."""
        seq.num_computed_tokens -= 1

    def lower(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Lower the limits of the steps to come; the last sequences beyond them are preempted."""
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_bulk_tokens = min(self.max_num_bulk_tokens, max_num_batched_tokens)
        old, self.max_num_seqs = self.max_num_seqs, min(max_num_seqs, max_num_batched_tokens)
        self.gathering = self.gathering.lower(
            old, self.max_num_seqs
        )  # else an empty engine might wait for more prompts
        while len(self.running) > self.max_num_seqs:
            self._preempt_last()

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence and free its blocks."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.block_manager.register(seq)  # its last tokens may have been read since they were computed
        self.block_manager.free(seq)

    def abort(self, request_id: str) -> list[Sequence]:
        """Remove all sequences of a request, free their blocks, and return the sequences that were removed."""
        removed = [seq for seq in [*self.running, *self.waiting] if seq.request.request_id == request_id]
        for seq in removed:
            self.finish(seq)
        return removed

    def _candidates(self) -> tuple[list[Sequence], list[Sequence]]:
        """Return the running sequences that have tokens to compute: the decodes, and the others."""
        seqs = [seq for seq in self.running if seq.num_tokens < seq.max_num_tokens or not seq.is_complete]
        prefills = _prefills_of(seqs)
        return ([seq for seq in seqs if not _is_prefill(seq)] if prefills else seqs), prefills

    def _schedule_decodes(
        self, decodes: list[Sequence], budget: _Budget, num_prefills: int, *, has_forced: bool
    ) -> list[Scheduled]:
        """Schedule the newest token of each sequence, with those that were forced after it.

        has_forced: whether some sequences have forced tokens
        """
        if not has_forced and len(decodes) <= budget.tokens:
            budget.tokens -= len(decodes)
            return list(map(_SCHEDULED, zip(decodes, repeat(1))))
        scheduled = []
        num_others = len(decodes) + num_prefills
        for seq in decodes:
            num_others -= 1
            num_tokens = budget.consume_decode(seq, num_others)
            if num_tokens == 0:
                break
            scheduled.append(Scheduled(seq, num_tokens))
        return scheduled

    def _ensure_blocks(self) -> None:
        """Allocate blocks for all tokens of each running sequence; preempt the last sequences if blocks run out."""
        block_size, last_short = self.block_manager.block_size, self._last_short
        needy = [  # few, since most steps fill no block
            index
            for index, seq in enumerate(self.running)
            if len(seq.block_table) * block_size < seq.num_tokens or seq.rope_set != (seq.num_tokens > last_short)
        ]
        for index in needy:
            if index >= len(self.running):
                return  # the rest has been preempted
            seq = self.running[index]
            if seq.is_complete:
                continue
            if seq.rope_set != self._rope_set(seq):
                self.num_preemptions += 1
                self.block_manager.free(seq)
                self._start(seq)
            while index < len(self.running) and not self.block_manager.ensure(seq, len(seq)):
                self._preempt_last()

    def _preempt_last(self) -> None:
        seq = self.running.pop()
        self.num_preemptions += 1
        self.block_manager.free(seq)
        insort(self.waiting, seq, key=precedence)

    def _admit_by_priority(self) -> None:
        """Admit waiting sequences of a higher priority than some running ones, preempting those where necessary.

        It stops when running sequences of the same or a higher priority already fill the step's tokens.
        """
        index = 0
        while index < len(self.waiting) and self._is_urgent(self.waiting[index]):
            seq = self.waiting[index]
            equals = [other for other in self.running if other.request.priority <= seq.request.priority]
            tokens = sum(self._max_tokens(other) for other in equals if not other.is_complete)
            if tokens >= self.max_num_batched_tokens:
                return
            if seq.is_complete or not self._start_unless_delayed(seq):
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
        """Return whether some running sequence has a lower priority."""
        return bool(self.running) and self.running[-1].request.priority > seq.request.priority

    def _waits_for_more(self, budget: _Budget) -> bool:
        """Return whether the waiting sequences leave the free seats empty in this step, which has decodes alone."""
        num_free = self.max_num_seqs - len(self.running)
        if not self.waiting or num_free == 0 or not self.gathering.may_wait(self.waiting[0], num_free):
            return False
        num_tokens = sum(seq.num_uncomputed_tokens for seq in self.waiting[:num_free])
        return num_tokens < budget.remaining(self.waiting[0])

    def _waits_for_next(self, seq: Sequence, budget: _Budget) -> bool:
        """Return whether a sequence leaves its seat empty in a step that has prompts, but no room for all of its own.

        The rest of its prompt would make the next step one with a prompt too.
        """
        is_cut = budget.remaining(seq) < seq.num_uncomputed_tokens <= self._max_prompt_tokens(seq)
        return is_cut and self.gathering.may_wait(seq, self.max_num_seqs - len(self.running))

    def _admit(self, budget: _Budget, lowest: int | None) -> list[Scheduled]:
        """Admit waiting sequences within the rest of the budget, and return their tokens.

        lowest: lowest priority (highest number) that may be admitted; None = any
        """
        admitted: list[Scheduled] = []
        index = 0
        while index < len(self.waiting) and len(self.running) < self.max_num_seqs:
            seq = self.waiting[index]
            if not budget.remaining(seq) or (lowest is not None and seq.request.priority > lowest):
                break
            if admitted and self._waits_for_next(seq, budget):
                break
            if seq.is_complete or not self._start_unless_delayed(seq):
                index += 1
                continue
            # Keep a free block for every second running sequence: in a full cache the new sequence would be preempted
            # within a few steps.
            if not self.block_manager.ensure(seq, len(seq), spare=len(self.running) // 2):
                self.block_manager.free(seq)
                break
            del self.waiting[index]
            insort(self.running, seq, key=precedence)
            admitted.append(Scheduled(seq, budget.consume(seq, share=self._share(seq))))
            lowest = seq.request.priority
        return admitted

    def _start_unless_delayed(self, seq: Sequence) -> bool:
        """Start a waiting sequence, unless it has to wait for a running prefill of the same or a higher priority.

        It waits for one that computes its next block, and a long one waits for another long one. Returns whether it was
        started.
        """
        self._start(seq)
        is_long = self._is_long(seq)
        for other in _prefills_of(self.running):
            may_wait_for = other.request.priority <= seq.request.priority
            if may_wait_for and ((is_long and self._is_long(other)) or self.block_manager.is_pending_in(other, seq)):
                self.block_manager.free(seq)
                return False
        return True

    def _is_long(self, seq: Sequence) -> bool:
        """Return whether the rest of the sequence's prompt takes many steps."""
        if not _is_prefill(seq):
            return False
        start = seq.num_computed_tokens
        cost = self.token_cost.total(start, start + seq.num_uncomputed_tokens)
        return cost > LONG_STEPS * self._max_prompt_tokens(seq)

    def _share(self, seq: Sequence) -> float:
        return LONG_SHARE if self._is_long(seq) else 1.0

    def _max_tokens(self, seq: Sequence) -> int:
        """Return how many tokens of a step the sequence takes at most, while others can use the rest."""
        return int(LONG_SHARE * self._max_prompt_tokens(seq)) if self._is_long(seq) else seq.num_uncomputed_tokens

    def _max_prompt_tokens(self, seq: Sequence) -> int:
        """Return the maximum prompt tokens of the sequence in a step."""
        bulk = self.max_num_bulk_tokens if seq.request.priority > 0 else self.max_num_batched_tokens
        return min(bulk, self.max_num_batched_tokens)

    def _start(self, seq: Sequence) -> None:
        """Attach the cached prefix to a sequence without blocks."""
        self._update_rope_set(seq)
        self.block_manager.match_prefix(seq)

    def _update_rope_set(self, seq: Sequence) -> None:
        if seq.rope_set != (rope_set := self._rope_set(seq)):
            seq.rope_set = rope_set
            seq.block_hashes.clear()

    def _rope_set(self, seq: Sequence) -> int:
        return int(seq.num_tokens > self._last_short)
