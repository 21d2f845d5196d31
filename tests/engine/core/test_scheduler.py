import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_oracle import KVOracle

from moray.engine.core.block_manager import BlockManager
from moray.engine.core.gathering import AT_ONCE, Gathering
from moray.engine.core.scheduler import EQUAL_COST, Scheduler, precedence
from moray.engine.core.sequence import Sequence
from moray.engine.core.token_cost import TokenCost
from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Request


class Driver:
    """A scheduler with a minimal engine around it, which samples the tokens 1000, 1001, ... for each sequence."""

    def __init__(self, *, num_blocks=64, block_size=4, cache=True, original=None, static_long=False, **limits):
        self.blocks = BlockManager(num_blocks, block_size, cache)
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 1000} | limits
        self.scheduler = Scheduler(
            self.blocks, original_max_position_embeddings=original, static_long=static_long, **limits
        )
        self.seqs = []

    def add(self, prompt, max_tokens=8, *, request_id=None, n=1, prompt_logprobs=None, continuations=(), priority=0):
        """Queue n samples and return the first."""
        prompt = list(prompt)
        params = SamplingParams(max_tokens=max_tokens, n=n, prompt_logprobs=prompt_logprobs)
        request = Request(
            request_id or f"r{len(self.seqs)}", prompt, params, continuations=continuations, priority=priority
        )
        added = [Sequence(len(self.seqs) + sample, request, sample) for sample in range(request.num_samples)]
        self.seqs += added
        for seq in added:
            self.scheduler.add(seq)
        return added[0]

    def step(self):
        """Run one step; return (seq_id, first position, tokens) of each sequence that ran."""
        scheduled = self.scheduler.schedule()
        ran = [(item.seq.seq_id, item.seq.num_computed_tokens, item.num_tokens) for item in scheduled]
        self.scheduler.advance(scheduled)
        for seq in [item.seq for item in scheduled if item.seq.num_uncomputed_tokens == 0]:
            if seq.request.params.max_tokens > 0:
                seq.append(1000 + seq.num_generated)
            if seq.num_generated == seq.request.params.max_tokens:
                self.scheduler.finish(seq)
        self.blocks.check(self.scheduler.waiting + self.scheduler.running)
        return ran

    @property
    def waiting(self):
        return [seq.seq_id for seq in self.scheduler.waiting]

    @property
    def running(self):
        return [seq.seq_id for seq in self.scheduler.running]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code", "message"),
    [
        (0, 8, "empty_prompt", "the prompt has no tokens; it needs at least 1."),
        (992, 8, None, ""),
        (
            993,
            8,
            "too_long",
            "needs 1,001 tokens (prompt 993 + max_tokens 8); this model holds 1,000. "
            "Shorten it or raise max_model_len.",
        ),
        (1, 2000, "too_long", "needs 2,001 tokens (prompt 1 + max_tokens 2,000); this model holds 1,000. "
         "Shorten it or raise max_model_len."),
    ],
)  # fmt: skip
def test_refuses_what_the_model_cannot_hold(prompt, max_tokens, code, message):
    driver = Driver(num_blocks=500)
    if code is None:
        driver.add(range(prompt), max_tokens)
        return
    with pytest.raises(RequestError) as caught:
        driver.add(range(prompt), max_tokens)
    assert (caught.value.code, caught.value.message) == (code, message)
    assert caught.value.field == ("max_tokens" if max_tokens >= 1000 else None)
    assert not driver.scheduler.has_work


def test_refuses_what_the_cache_cannot_hold():
    driver = Driver(num_blocks=5)
    seq = driver.add(range(13), 8)  # 20 tokens to run: the whole cache
    with pytest.raises(RequestError) as caught:
        driver.add(range(13), 9)
    assert caught.value.code == "no_cache_room"
    assert caught.value.message == (
        "needs 6 cache blocks of 4 tokens (prompt 13 + max_tokens 9); the KV cache has 5. "
        "Shorten it or raise engine.kv_cache_memory."
    )
    assert caught.value.field is None
    with pytest.raises(RequestError) as caught:
        driver.add(range(1), 21)  # no prompt is short enough
    assert (caught.value.code, caught.value.field) == ("no_cache_room", "max_tokens")
    while driver.scheduler.has_work:
        driver.step()
    assert seq.num_generated == 8 and driver.scheduler.num_preemptions == 0


def test_prefill_runs_in_chunks_of_the_budget():
    driver = Driver(max_num_batched_tokens=4)
    driver.add(range(10), 3)
    assert [driver.step() for _ in range(5)] == [
        [(0, 0, 4)],
        [(0, 4, 4)],
        [(0, 8, 2)],
        [(0, 10, 1)],
        [(0, 11, 1)],
    ]
    assert not driver.scheduler.has_work


def test_nothing_to_do():
    driver = Driver()
    assert not driver.scheduler.has_work and driver.scheduler.schedule() == []


def test_decodes_come_first_then_running_prefills_then_admissions():
    driver = Driver(max_num_batched_tokens=6)
    driver.add(range(10), 3)
    driver.add([50], 9)
    driver.add([60, 61], 9)
    assert driver.step() == [(0, 0, 6)]
    assert driver.step() == [(0, 6, 4), (1, 0, 1), (2, 0, 1)]
    assert driver.step() == [(0, 10, 1), (1, 1, 1), (2, 1, 1)]
    driver.add(range(70, 80), 3)
    driver.add([90], 3)
    assert driver.step() == [(0, 11, 1), (1, 2, 1), (2, 2, 1), (3, 0, 3)]
    assert driver.step() == [(1, 3, 1), (2, 3, 1), (3, 3, 4)]
    assert driver.step() == [(1, 4, 1), (2, 4, 1), (3, 7, 3), (4, 0, 1)]


def test_no_more_sequences_than_max_num_seqs_in_order_of_arrival():
    driver = Driver(max_num_seqs=2)
    for first in range(4):
        driver.add([first], 2)
    assert driver.step() == [(0, 0, 1), (1, 0, 1)]
    assert driver.step() == [(0, 1, 1), (1, 1, 1)]
    assert driver.step() == [(2, 0, 1), (3, 0, 1)]


def test_no_more_sequences_than_tokens_so_that_decodes_leave_the_first_prefill_one():
    driver = Driver(max_num_seqs=8, max_num_batched_tokens=2, original=4)
    driver.add(range(3), 5)
    for first in range(3):
        driver.add([first], 9)
    assert driver.scheduler.max_num_seqs == 2
    ran = [driver.step() for _ in range(5)]
    assert ran[:3] == [[(0, 0, 2)], [(0, 2, 1), (1, 0, 1)], [(0, 3, 1), (1, 1, 1)]]
    assert ran[3:] == [[(1, 2, 1), (0, 0, 1)], [(1, 3, 1), (0, 1, 1)]], "0 has outgrown the short factors"


def test_the_last_arrival_is_preempted_and_runs_again_first():
    driver = Driver(num_blocks=5, cache=False)
    for start in (10, 20):
        driver.add(range(start, start + 8), 9)
    driver.add([30], 1)
    assert driver.step() == [(0, 0, 8), (1, 0, 8)]
    assert driver.step() == [(0, 8, 1)], "one block is left, and it is the first one's"
    assert (driver.running, driver.waiting) == ([0], [1, 2]), "the order of arrival is kept"
    assert driver.scheduler.num_preemptions == 1
    assert not driver.seqs[1].block_table and driver.seqs[1].num_computed_tokens == 0
    ran = [driver.step() for _ in range(7)]
    assert all(step == [(0, 9 + i, 1)] for i, step in enumerate(ran)), "2 blocks are free, sequence 1 needs 3"
    assert driver.step() == [(1, 0, 9), (2, 0, 1)]
    while driver.scheduler.has_work:
        driver.step()
    assert [seq.num_generated for seq in driver.seqs] == [9, 9, 1]
    assert driver.scheduler.num_preemptions == 1


def test_an_older_one_takes_from_the_younger_even_while_that_prefills():
    driver = Driver(num_blocks=6, max_num_batched_tokens=9, cache=False)
    driver.add(range(8), 5)
    driver.add(range(20, 35), 2)
    assert driver.step() == [(0, 0, 8), (1, 0, 1)]
    assert driver.step() == [(0, 8, 1)]
    assert driver.waiting == [1] and driver.scheduler.num_preemptions == 1


def test_a_preempted_sequence_finds_its_blocks_again():
    driver = Driver(num_blocks=6)
    driver.add(range(10, 18), 5)
    late = driver.add(range(20, 32), 5)
    driver.step()
    driver.step()
    assert driver.waiting == [1]
    while 1 in driver.waiting:
        driver.step()
    assert late.num_cached_tokens == 12, "its prompt"
    assert late.token_ids[12:] == [1000, 1001], "what it had generated, and one more"


def test_admission_leaves_every_second_one_a_block_to_grow():
    driver = Driver(num_blocks=6, cache=False)
    for _ in range(5):
        driver.add(range(4), 4)
    driver.step()
    assert driver.running == [0, 1, 2, 3], "the fifth would leave 1 of 6; 4 running want 2"


def test_nothing_is_preempted_while_there_is_room():
    driver = Driver(num_blocks=24)
    for start in range(8):
        driver.add(range(start * 10, start * 10 + 6), 6)
    while driver.scheduler.has_work:
        driver.step()
    assert driver.scheduler.num_preemptions == 0 and driver.blocks.num_free == 24


def test_later_prompts_hit_the_prefix_of_earlier_ones():
    driver = Driver()
    driver.add(range(10), 2)
    driver.step()
    later = driver.add([*range(8), 70, 71], 2)
    assert driver.step() == [(0, 10, 1), (1, 8, 2)]
    assert later.num_cached_tokens == 8


def test_prompt_logprobs_compute_every_position():
    driver = Driver()
    driver.add(range(10), 2)
    driver.step()
    driver.add(range(10), 2, prompt_logprobs=1)
    assert driver.step() == [(0, 10, 1), (1, 0, 10)]


def test_continuations_share_their_prompt_and_compute_the_rest():
    """The first runs all tokens; the others find the prompt's full blocks, but run its last token for its logits."""
    driver = Driver()
    driver.add(range(9), 0, prompt_logprobs=1, continuations=[[50, 51], [60], [50, 51, 52, 53, 54]])
    assert driver.step() == [(0, 0, 11)]
    assert driver.step() == [(1, 8, 2), (2, 8, 6)]
    assert not driver.scheduler.has_work


@pytest.mark.parametrize(
    ("original", "static_long", "length", "want"),
    [(16, False, 16, 0), (16, False, 17, 1), (16, True, 3, 1), (16, True, 17, 1), (None, False, 100, 0)],
)
def test_rope_set_of_a_prompt_holds_from_its_first_chunk(original, static_long, length, want):
    driver = Driver(original=original, static_long=static_long, max_num_batched_tokens=4)
    seq = driver.add(range(length), 1)
    while driver.scheduler.has_work:
        scheduled = driver.scheduler.schedule()
        assert seq.rope_set == want
        driver.scheduler.advance(scheduled)
        if seq.num_uncomputed_tokens == 0:
            driver.scheduler.finish(seq)
    assert driver.scheduler.num_preemptions == 0


def test_a_sequence_that_outgrows_the_short_factors_starts_over_in_the_same_step():
    driver = Driver(original=8)
    seq = driver.add(range(7), 6)
    assert driver.step() == [(0, 0, 7)] and len(seq) == 8
    assert driver.step() == [(0, 7, 1)] and (len(seq), seq.rope_set) == (9, 0), "8 tokens are short"
    assert driver.step() == [(0, 0, 9)] and seq.rope_set == 1, "9 are long, all of them"
    assert driver.step() == [(0, 9, 1)]
    assert driver.scheduler.num_preemptions == 1
    short, long = driver.add(range(8), 1), driver.add([*seq.token_ids[:9], 5], 1)
    assert driver.step() == [(0, 10, 1), (1, 4, 4), (2, 8, 2)], "either set has its own prefixes"
    assert (short.rope_set, long.rope_set) == (0, 1)


def test_what_a_prompt_would_find_is_of_its_own_rope_set():
    driver = Driver(original=8)
    for length in (8, 12):
        driver.add(range(length), max_tokens=1)
    while driver.scheduler.has_work:
        driver.step()

    def found(*tokens):
        return driver.scheduler.num_cached_tokens(Sequence(99, Request("", tokens, SamplingParams())))

    assert found(*range(7)) == 4 and found(*range(6), 70) == 4, "short"
    assert found(*range(11)) == 8 and found(*range(12)) == 8 and found(*range(13)) == 12, "long"
    assert found(*range(3), *range(50, 60)) == found() == 0


def test_under_static_long_nothing_starts_over():
    driver = Driver(original=8, static_long=True)
    driver.add(range(7), 6)
    ran = [driver.step() for _ in range(6)]
    assert ran == [[(0, 0, 7)], *([(0, i, 1)] for i in range(7, 12))] and driver.scheduler.num_preemptions == 0


def test_starting_over_takes_its_blocks_from_the_younger():
    driver = Driver(num_blocks=4, original=8, cache=False)
    driver.add(range(8), 3)
    driver.add([20], 4)
    driver.add([30], 4)
    assert driver.step() == [(0, 0, 8), (1, 0, 1)]
    assert driver.step() == [(1, 1, 1), (0, 0, 9)]
    assert driver.waiting == [2] and driver.scheduler.num_preemptions == 1
    driver = Driver(num_blocks=3, original=8, cache=False)
    driver.add(range(8), 3)
    driver.add([20], 4)
    driver.step()
    assert driver.step() == [(0, 0, 9)]
    assert driver.waiting == [1] and driver.scheduler.num_preemptions == 2


def test_other_samples_wait_for_the_prompt_and_let_later_requests_pass():
    driver = Driver(max_num_batched_tokens=8)
    driver.add(range(10), 4, n=3)
    driver.add([50], 4)
    assert driver.step() == [(0, 0, 8)]
    assert driver.waiting == [1, 2, 3]
    assert driver.step() == [(0, 8, 2), (1, 8, 2), (2, 8, 2), (3, 0, 1)], "the blocks that they share are there"
    assert driver.seqs[0].block_table[:2] == driver.seqs[1].block_table[:2] == driver.seqs[2].block_table[:2]


def test_who_begins_alike_waits_until_it_is_computed_and_lets_others_pass():
    driver = Driver(max_num_batched_tokens=8)
    shared = range(10, 19)
    driver.add(shared, 4)
    driver.add([*shared, 1], 4)
    driver.add([*shared, 2], 4)
    driver.add([50], 4)
    driver.add([*shared[:4], 3], 4)
    assert driver.step() == [(0, 0, 8)]
    assert driver.step() == [(0, 8, 1), (1, 8, 2), (2, 8, 2), (3, 0, 1), (4, 4, 1)]
    driver.add(range(30, 50), 4)
    driver.add(range(30, 40), 4)
    driver.add([60], 4)
    assert driver.step() == [(0, 9, 1), (1, 10, 1), (2, 10, 1), (3, 1, 1), (4, 5, 1), (5, 0, 3)]
    assert driver.step()[5:] == [(5, 3, 3)]
    assert driver.waiting == [6, 7]


def test_nobody_waits_for_one_of_a_lower_priority():
    driver = Driver(max_num_batched_tokens=6)
    driver.add(range(10), 4, priority=1)
    assert driver.step() == [(0, 0, 6)]
    driver.add(range(10), 4)
    assert driver.step() == [(1, 4, 6)]


def test_other_samples_go_on_without_a_first_one():
    driver = Driver(max_num_batched_tokens=8)
    first = driver.add(range(10), 4, n=2)
    driver.step()
    driver.scheduler.finish(first)
    assert driver.step() == [(1, 8, 2)], "and what it had computed is cached"


def test_abort_removes_what_waits_and_what_runs():
    driver = Driver()
    driver.add(range(10), 4, request_id="gone", n=2)
    driver.add([50], 4, request_id="stays")
    driver.step()
    assert (driver.running, driver.waiting) == ([0, 2], [1])
    assert [seq.seq_id for seq in driver.scheduler.abort("gone")] == [0, 1]
    assert (driver.running, driver.waiting) == ([2], [])
    assert driver.scheduler.abort("gone") == []
    assert driver.blocks.num_free == 63
    again = driver.add(range(10), 4, request_id="gone")
    assert driver.step()[-1] == (again.seq_id, 8, 2)


def test_priorities_come_before_the_order_of_arrival():
    driver = Driver(max_num_seqs=1)
    for first, priority in enumerate([1, 1, 0, 2, 0]):
        driver.add([first], 1, priority=priority)
    assert [driver.step() for _ in range(5)] == [[(i, 0, 1)] for i in (2, 4, 0, 1, 3)]
    assert driver.scheduler.num_preemptions == 0


def test_a_full_house_makes_way_and_goes_on_from_its_cached_prefix():
    driver = Driver(max_num_seqs=2)
    for first in (10, 20):
        driver.add(range(first, first + 8), 20, priority=1)
    driver.step()
    driver.step()
    driver.add([50, 51], 2)
    assert driver.step() == [(2, 0, 2)], "the last arrival of the lower priority was preempted"
    assert (driver.running, driver.waiting) == ([2, 0], [1])
    assert driver.step() == [(2, 2, 1), (0, 9, 1)]
    assert driver.step() == [(0, 10, 1), (1, 8, 2)], "8 of its 10 tokens were still cached"


def test_blocks_are_taken_from_a_lower_priority_but_not_from_ones_own():
    driver = Driver(num_blocks=6, cache=False)
    driver.add(range(8), 9, priority=1)
    driver.add(range(20, 28), 9, priority=0)
    driver.step()
    driver.add(range(40, 48), 9)
    driver.step()
    assert (driver.running, driver.waiting) == ([1, 2], [0])
    driver = Driver(num_blocks=6, cache=False)
    for start in (0, 20, 40):
        driver.add(range(start, start + 8), 9)
    driver.step()
    assert (driver.running, driver.waiting) == ([0, 1], [2])


def test_lower_priorities_stand_aside_while_a_prompt_is_computed():
    driver = Driver(max_num_batched_tokens=8)
    driver.add([1], 20, priority=1)
    driver.add(range(10, 30), 4, priority=1)
    assert driver.step() == [(0, 0, 1), (1, 0, 7)]
    driver.add(range(50, 60), 4)
    driver.add([70], 4)
    assert driver.step() == [(2, 0, 8)], "the other one has to wait for tokens, so it is not admitted yet"
    assert driver.waiting == [3]
    assert driver.step() == [(3, 0, 1), (2, 8, 2)]
    assert driver.step() == [(2, 10, 1), (3, 1, 1), (0, 1, 1), (1, 7, 5)]


def test_forced_tokens_run_as_a_decode_that_nobody_pauses_for():
    driver = Driver(num_blocks=100)
    urgent, bulk = driver.add(range(1, 5), 40), driver.add(range(20, 24), 40, priority=1)
    driver.step()
    driver.step()
    for token in range(5):
        urgent.append(2000 + token, is_forced=True)
    assert driver.step() == [(urgent.seq_id, 5, 6), (bulk.seq_id, 4, 1)]
    assert driver.step() == [(urgent.seq_id, 11, 1), (bulk.seq_id, 5, 1)]
    assert urgent.num_forced == 0


def test_forced_tokens_beyond_the_steps_tokens_run_later():
    driver = Driver(num_blocks=100, max_num_batched_tokens=4, max_num_seqs=2)
    first, second = driver.add([1], 40), driver.add([2], 40)
    driver.step()
    for token in range(5):
        first.append(2000 + token, is_forced=True)
    assert driver.step() == [(first.seq_id, 1, 3), (second.seq_id, 1, 1)], "each one gets a token"
    assert driver.step() == [(first.seq_id, 4, 3), (second.seq_id, 2, 1)]


def test_forced_tokens_of_a_preempted_sequence_run_with_its_prompt():
    driver = Driver(num_blocks=100, max_num_batched_tokens=4)
    seq = driver.add([1, 2], 40)
    driver.step()
    for token in range(3):
        seq.append(2000 + token, is_forced=True)
    driver.scheduler._preempt_last()
    assert driver.step() == [(seq.seq_id, 0, 4)]
    assert driver.step() == [(seq.seq_id, 4, 2)]


def test_lower_priorities_are_not_admitted_beside_a_prompt():
    driver = Driver()
    driver.add(range(10), 4, priority=1)
    driver.add(range(20, 30), 4)
    assert driver.step() == [(1, 0, 10)]
    assert driver.step() == [(1, 10, 1), (0, 0, 10)]


def test_prompts_of_lower_priorities_leave_steps_short():
    driver = Driver(max_num_bulk_tokens=6)
    for first in (0, 20):
        driver.add(range(first, first + 10), 4, priority=1)
    assert driver.step() == [(0, 0, 6)]
    assert driver.step() == [(0, 6, 4), (1, 0, 2)]
    assert driver.step() == [(0, 10, 1), (1, 2, 6)], "decodes do not count"
    driver.add(range(40, 60), 4)
    assert driver.step() == [(2, 0, 20)]
    assert driver.step() == [(2, 20, 1), (0, 11, 1), (1, 8, 2)]


def test_nobody_is_preempted_for_one_without_tokens_to_run_on():
    driver = Driver(max_num_seqs=3, max_num_batched_tokens=4)
    for first in range(2):
        driver.add([first], 20, priority=1)
    driver.step()
    driver.add(range(10, 26), 4)
    driver.add([40], 4)
    driver.step()
    assert (driver.running, driver.waiting) == ([2, 0, 1], [3])


def test_a_long_prompt_leaves_a_quarter_of_each_step_to_short_ones():
    driver = Driver(max_num_batched_tokens=8, num_blocks=200)
    driver.add(range(100), 2)
    assert driver.step() == [(0, 0, 8)], "nobody else needs tokens"
    driver.add([200, 201, 202], 2)
    driver.add([300], 2)
    assert driver.step() == [(0, 8, 6), (1, 0, 2)]
    assert driver.step() == [(1, 2, 1), (0, 14, 6), (2, 0, 1)]
    assert driver.step() == [(1, 3, 1), (2, 1, 1), (0, 20, 6)], "what is left over is the long one's again"
    assert driver.step() == [(0, 26, 8)]


def test_a_prompt_of_few_steps_leaves_nothing():
    driver = Driver(max_num_batched_tokens=8)
    driver.add(range(32), 2)
    driver.add([50], 2)
    assert driver.step() == [(0, 0, 8)]


def test_long_prompts_are_computed_one_after_the_other_and_short_ones_pass():
    driver = Driver(max_num_batched_tokens=8, num_blocks=200)
    for first in (0, 100):
        driver.add(range(first, first + 50), 1)
    driver.add([300], 1)
    assert driver.step() == [(0, 0, 7), (2, 0, 1)]
    assert driver.waiting == [1]
    while driver.seqs[0].num_uncomputed_tokens > 32:
        assert [seq_id for seq_id, _, _ in driver.step()] == [0]
    assert driver.step() == [(0, 23, 8)] and driver.waiting == [1], "the first one fills the step"
    while driver.waiting:
        ran = driver.step()
    assert ran == [(0, 47, 3), (1, 0, 5)]


def test_a_bulk_prompt_is_long_by_the_tokens_that_bulk_prompts_have():
    driver = Driver(max_num_batched_tokens=64, max_num_bulk_tokens=4, num_blocks=200)
    driver.add(range(40), 1, priority=1)
    driver.add([100, 101], 1, priority=1)
    assert driver.step() == [(0, 0, 3), (1, 0, 1)]


def test_an_urgent_request_is_admitted_in_place_of_bulk_beside_a_long_prompt():
    driver = Driver(max_num_seqs=3, max_num_batched_tokens=8, num_blocks=200)
    for first in (200, 210):
        driver.add([first], 20, priority=1)
    driver.step()
    driver.add(range(100), 1)
    driver.step()
    driver.add([300], 1)
    assert driver.step() == [(3, 0, 1), (2, 8, 7)]
    assert driver.waiting == [1]


def test_tokens_far_into_a_prompt_count_as_several():
    driver = Driver(max_num_batched_tokens=8, num_blocks=200, token_cost=TokenCost(even_keys=8))
    driver.add([500], 50)
    driver.add(range(100), 1)
    chunks = [{seq_id: (first, n) for seq_id, first, n in driver.step()}[1] for _ in range(6)]
    assert chunks == [(0, 6), (6, 3), (9, 2), (11, 2), (13, 2), (15, 2)]
    while driver.seqs[1].num_computed_tokens < 60:
        driver.step()
    assert driver.step()[1][2] == 1, "at most 8 times as many, and at least one token a step"


def test_a_prompt_that_is_alone_takes_whole_steps():
    driver = Driver(max_num_batched_tokens=8, num_blocks=200, token_cost=TokenCost(even_keys=8))
    driver.add(range(40), 1)
    assert [driver.step() for _ in range(5)] == [[(0, first, 8)] for first in range(0, 40, 8)]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests over an alphabet of two tokens arrive, run and end, in any order, in a tiny pool.

    ahead:   a step's tokens are read when the next step has been launched
    forces:  some tokens force others after them, so they are read before the next ones are sampled
    """

    @initialize(
        num_blocks=st.integers(1, 10),
        block_size=st.integers(1, 3),
        cache=st.booleans(),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 10),
        max_num_bulk_tokens=st.none() | st.integers(1, 4),
        original=st.none() | st.integers(2, 8),
        static_long=st.booleans(),
        ahead=st.booleans(),
        forces=st.booleans(),
        token_cost=st.sampled_from([EQUAL_COST, TokenCost(even_keys=3)]),
        gathering=st.sampled_from([AT_ONCE, Gathering(1), Gathering(2, is_bulk=True), Gathering(9, is_bulk=True)]),
    )
    def start_up(self, original, static_long, ahead, forces, **limits):
        self.driver = Driver(
            original=original, static_long=static_long and original is not None, max_model_len=18, **limits
        )
        self.scheduler, self.blocks = self.driver.scheduler, self.driver.blocks
        self.oracle = KVOracle(self.blocks)
        self.ahead, self.forces = ahead, forces
        self.launched = {}  # sequence -> its sampled token, which has not been read

    @property
    def living(self):
        return self.scheduler.waiting + self.scheduler.running

    @rule(
        prompt=st.lists(st.integers(0, 1), max_size=10),
        max_tokens=st.integers(0, 8),
        n=st.integers(1, 3),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.integers(0, 2),
    )
    def add(self, prompt, max_tokens, n, prompt_logprobs, priority):
        num_tokens = len(prompt) + max_tokens
        capacity = self.blocks.num_blocks * self.blocks.block_size
        code = (
            "empty_prompt" if not prompt else "no_cache_room" if max(len(prompt), num_tokens - 1) > capacity else None
        )
        before = len(self.living)
        try:
            self.driver.add(prompt, max_tokens, n=n, prompt_logprobs=prompt_logprobs, priority=priority)
        except RequestError as error:
            assert error.code == code and len(self.living) == before
        else:
            assert code is None and len(self.living) == before + n

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        continuations=st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=3),
    )
    def score(self, prompt, continuations):
        capacity = self.blocks.num_blocks * self.blocks.block_size
        if max(len(prompt) + len(c) for c in continuations) <= capacity:
            self.driver.add(prompt, 0, prompt_logprobs=1, continuations=continuations)

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def step(self):
        scheduler = self.scheduler
        before, gathers = list(scheduler.running), self.gathers(scheduler.running, scheduler.waiting)
        scheduled = scheduler.schedule()
        self.check_choice(before, gathers, scheduled)
        for item in scheduled:
            pending_row = () if item.seq.pending_row is None else (self.launched[item.seq],)
            self.oracle.write(item.seq, item.num_tokens, self.living, pending_row)
        scheduler.advance(scheduled)
        done = [item.seq for item in scheduled if item.seq.num_uncomputed_tokens == 0]
        ready = [seq for seq in done if seq.request.params.max_tokens > 0]
        if self.forces:
            self.read()
            ready = [seq for seq in ready if seq in self.living and seq.num_uncomputed_tokens == 0]
        launched = {seq: (sum(seq.token_ids) + self.launched.get(seq, 0) + seq.sample) % 2 for seq in ready}
        for seq in done:
            if seq.request.params.max_tokens == 0:  # it only had to run its prompt
                scheduler.finish(seq)
        self.read()
        self.launched = launched
        for row, seq in enumerate(launched):
            if seq in self.living:
                seq.await_token(row)
        if not self.ahead:
            self.read()

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def give_up(self):
        """Schedule a step and do not run it."""
        before, gathers = list(self.scheduler.running), self.gathers(self.scheduler.running, self.scheduler.waiting)
        self.check_choice(before, gathers, self.scheduler.schedule())

    def read(self):
        for seq, token in self.launched.items():
            if seq in self.living:
                seq.append(token)
                for _ in range(sum(seq.token_ids) % 4 if self.forces else 0):
                    if not self.has_ended(seq):
                        seq.append(len(seq) % 2, is_forced=True)
                if self.has_ended(seq):
                    self.scheduler.finish(seq)
        self.launched = {}

    def has_ended(self, seq):
        return seq.num_generated == seq.request.params.max_tokens or self.ends_early(seq)

    def ends_early(self, seq):
        """End a sequence as a stop token does: that is known only when the token is read."""
        return seq.num_generated >= 3 and seq.token_ids[-3:] == [1, 0, 1]

    def check_choice(self, before, gathers, scheduled):
        scheduler = self.scheduler
        chosen = {item.seq: item.num_tokens for item in scheduled}
        complete = [seq for seq in self.living if seq.is_complete]
        assert scheduled or complete, f"nothing runs, though {self.driver.running} and {self.driver.waiting} want to"
        assert not any(seq.is_complete for seq in chosen), "run beyond its last token"
        assert len(chosen) == len(scheduled) <= scheduler.max_num_seqs, f"{len(scheduled)} sequences"
        assert sum(chosen.values()) <= scheduler.max_num_batched_tokens, f"{sum(chosen.values())} tokens"
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert all(1 <= num_tokens <= seq.num_uncomputed_tokens for seq, num_tokens in chosen.items())
        assert all(seq in scheduler.running for seq in chosen)
        original = scheduler.original_max_position_embeddings
        running = [seq for seq in scheduler.running if not seq.is_complete]
        prefills = [seq.request.priority for seq in running if self.is_prefill(seq)]
        for seq in running:
            assert seq.rope_set == (original is not None and (scheduler.static_long or len(seq) > original))
            stands_aside = bool(prefills) and seq.request.priority > min(prefills)
            if stands_aside:
                assert seq not in chosen, f"{seq.seq_id} runs together with a prompt of a higher priority"
            elif not self.is_prefill(seq):
                assert seq in chosen, f"decode {seq.seq_id} was left out"
        bulk = [n for seq, n in chosen.items() if seq.request.priority > 0 and self.is_prefill(seq)]
        assert sum(bulk) <= scheduler.max_num_bulk_tokens
        if running:
            assert running[0] in chosen, f"the first one, {running[0].seq_id}, was left out"

        gone = [seq for seq in before if seq in scheduler.waiting]
        kept = [seq for seq in before if seq in scheduler.running]
        unfinished = [seq for seq in gone if not seq.is_complete]  # the others need no place: those after them may run
        if unfinished and kept:
            assert max(map(precedence, kept)) < min(map(precedence, unfinished)), (
                "a sequence that a preempted one precedes still runs"
            )
        admitted = [seq for seq in scheduler.running if seq not in before]
        if gathers and not gone and not any(map(self.is_prefill, before)):  # one may start over with long factors
            assert not admitted, f"{admitted} did not wait for more prompts"
        for seq in admitted:
            first = seq.num_cached_tokens // self.blocks.block_size
            others = [other for other in self.prefills(seq) if precedence(other) < precedence(seq) or other in before]
            wanted = self.prefixes(seq, first, seq.first_needed_logit // self.blocks.block_size)[:1]
            assert not any(set(wanted) & self.missing(other) for other in others), f"{seq.seq_id} computes it too"
            if scheduler._is_long(seq):
                assert not any(map(scheduler._is_long, others)), f"{seq.seq_id} is the second long prompt"
        for seq in scheduler.waiting:
            if seq.is_complete or self.waits(seq):
                continue
            assert not admitted or precedence(seq) > max(map(precedence, admitted)), f"{seq.seq_id} was passed over"
            if precedence(seq)[0] < max((precedence(other)[0] for other in scheduler.running), default=0):
                equals = [other for other in scheduler.running if precedence(other)[0] <= precedence(seq)[0]]
                tokens = sum(other.num_uncomputed_tokens for other in equals if not other.is_complete)
                assert tokens >= scheduler.max_num_batched_tokens, (
                    f"{seq.seq_id} waits though others could be preempted"
                )

    def gathers(self, running, waiting):
        """Return whether prompts must wait for others, from what ran and waited before the step."""
        scheduler, gathering = self.scheduler, self.scheduler.gathering
        decodes = [seq for seq in running if not seq.is_complete]
        num_free = scheduler.max_num_seqs - len(running)
        if not decodes or any(map(self.is_prefill, decodes)) or not waiting or not 0 < num_free <= gathering.seats:
            return False
        priority = waiting[0].request.priority
        if priority < running[-1].request.priority or (priority == 0 and not gathering.is_bulk):
            return False
        num_decoded = sum(seq.num_uncomputed_tokens for seq in decodes)
        most = scheduler.max_num_batched_tokens - num_decoded
        most = most if priority == 0 else min(most, scheduler.max_num_bulk_tokens)
        return sum(seq.num_uncomputed_tokens for seq in waiting[:num_free]) < most

    def waits(self, seq):
        """Return whether a running sequence is computing a block that the sequence begins with, or both are long."""
        wanted = set(self.prefixes(seq, 0, seq.first_needed_logit // self.blocks.block_size))
        is_long = self.scheduler._is_long
        return any((is_long(seq) and is_long(other)) or wanted & self.missing(other) for other in self.prefills(seq))

    def is_prefill(self, seq):
        return seq.num_uncomputed_tokens > 1 + seq.num_forced

    def prefills(self, seq):
        """Return other running sequences of at least its priority with more than one token to compute."""
        return [
            other
            for other in self.scheduler.running
            if other is not seq and self.is_prefill(other) and precedence(other)[0] <= precedence(seq)[0]
        ]

    def missing(self, seq):
        size = self.blocks.block_size
        return set(self.prefixes(seq, seq.num_computed_tokens // size, len(seq.token_ids) // size))

    def prefixes(self, seq, first, end):
        """Return the contents of blocks first .. end - 1, each with all tokens before it."""
        if not self.blocks.enable_prefix_cache:
            return []
        size, rope_set = self.blocks.block_size, self.scheduler._rope_set(seq)
        return [(rope_set, *seq.token_ids[: (index + 1) * size]) for index in range(first, end)]

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def finish(self, data):
        self.scheduler.finish(data.draw(st.sampled_from(self.living)))

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.living)).request
        expected = {seq for seq in self.living if seq.request is request}
        assert set(self.scheduler.abort(request.request_id)) == expected
        assert not any(seq.request is request for seq in self.living)

    @invariant()
    def books_agree(self):
        if hasattr(self, "driver"):
            self.blocks.check(self.living)
            self.oracle.check(self.living)
            assert not any(seq.block_table or seq.num_computed_tokens for seq in self.scheduler.waiting)
            for queue in (self.scheduler.waiting, self.scheduler.running):
                order = [precedence(seq) for seq in queue]
                assert order == sorted(order), f"{order} is not in order of precedence"

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        todo = self.living
        bound = 4 * sum(seq.num_prompt_tokens + seq.request.params.max_tokens for seq in todo)
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            self.step()
            self.books_agree()
        assert not self.scheduler.has_work, f"{self.driver.running}, {self.driver.waiting} left after {bound} steps"
        assert all(seq.num_generated == seq.request.params.max_tokens or self.ends_early(seq) for seq in todo)
        assert self.blocks.num_free == self.blocks.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
