import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_oracle import KVOracle

from moray.engine.core.block_manager import BlockManager
from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request


def make_seq(tokens, *, seq_id=0, rope_set=0, prompt_logprobs=None, continuation=()):
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    continuations = [continuation] if continuation else ()
    seq = Sequence(seq_id, Request(str(seq_id), tokens, params, continuations=continuations))
    seq.rope_set = rope_set
    return seq


def compute(blocks, seq):
    """Start a sequence and run all its tokens."""
    blocks.match_prefix(seq)
    assert blocks.ensure(seq, len(seq))
    seq.num_computed_tokens = len(seq)
    blocks.register(seq)
    return seq


def cached_tokens(blocks, tokens, **kwargs):
    """Return how many tokens a new sequence finds in the prefix cache."""
    seq = make_seq(tokens, seq_id=99, **kwargs)
    foreseen = blocks.num_cached_tokens(seq)
    blocks.match_prefix(seq)
    found = seq.num_cached_tokens
    assert foreseen == found == seq.num_computed_tokens == len(seq.block_table) * blocks.block_size
    blocks.free(seq)
    return found


@pytest.mark.parametrize(("num_tokens", "want"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_cover_the_tokens(num_tokens, want):
    blocks, seq = BlockManager(8, 4), make_seq(range(9))
    assert blocks.blocks_for(num_tokens) == want
    assert blocks.ensure(seq, num_tokens)
    assert len(seq.block_table) == want and blocks.num_free == 8 - want
    assert blocks.ensure(seq, num_tokens) and len(seq.block_table) == want, "asking again gives no more"
    blocks.check([seq])


def test_ensure_is_all_or_nothing():
    blocks, first, second = BlockManager(3, 4), make_seq([1]), make_seq([2], seq_id=1)
    assert blocks.ensure(first, 8)
    assert not blocks.ensure(second, 5)
    assert not second.block_table and blocks.num_free == 1
    assert blocks.ensure(second, 4) and blocks.num_free == 0
    blocks.check([first, second])


def test_spare_blocks_are_left():
    blocks, seq = BlockManager(3, 4), make_seq([1])
    assert not blocks.ensure(seq, 8, spare=2)
    assert blocks.ensure(seq, 8, spare=1)
    assert blocks.ensure(seq, 8, spare=3), "takes none"


@pytest.mark.parametrize(("length", "want"), [(4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_hits_are_full_blocks_without_the_last_token(length, want):
    blocks = BlockManager(8, 4)
    compute(blocks, make_seq(range(11)))
    assert cached_tokens(blocks, range(length)) == want


def test_hits_end_at_the_first_difference():
    blocks = BlockManager(8, 4)
    seq = compute(blocks, make_seq(range(12)))
    other = make_seq([*range(7), 70, 8, 9, 10, 11], seq_id=1)
    blocks.match_prefix(other)
    assert other.block_table == seq.block_table[:1], "block 1 differs, so equal tokens in block 2 are no hit"
    blocks.check([seq, other])


def test_rope_sets_share_nothing():
    blocks = BlockManager(8, 4)
    compute(blocks, make_seq(range(9), rope_set=0))
    assert cached_tokens(blocks, range(9), rope_set=1) == 0
    assert cached_tokens(blocks, range(9), rope_set=0) == 8


def test_prompt_logprobs_give_hits_but_take_none():
    blocks = BlockManager(8, 4)
    compute(blocks, make_seq(range(9), prompt_logprobs=0))
    assert cached_tokens(blocks, range(9), prompt_logprobs=0) == 0
    assert cached_tokens(blocks, range(9)) == 8


@pytest.mark.parametrize(("length", "want"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_continuation_to_score_takes_hits_before_the_last_token_of_its_prompt(length, want):
    """The logits after the prompt's last token are the first that are needed."""
    blocks = BlockManager(8, 4)
    compute(blocks, make_seq(range(12)))
    tokens, rest = range(length), range(length, 12)
    assert cached_tokens(blocks, tokens, prompt_logprobs=1, continuation=rest) == want
    assert cached_tokens(blocks, tokens, continuation=rest) == 8, "without logprobs it is a prompt like others"


def test_prompt_logprobs_that_are_known_are_not_computed_again():
    blocks = BlockManager(8, 4)
    seq = make_seq(range(12), prompt_logprobs=0)
    blocks.match_prefix(seq)
    assert blocks.ensure(seq, 12)
    for computed, want in [(4, 4), (7, 4), (9, 8), (12, 8)]:
        seq.num_computed_tokens = computed
        blocks.register(seq)
        seq.prompt_logprobs += [None] * (min(computed, 11) + 1 - len(seq.prompt_logprobs))
        blocks.free(seq)
        blocks.match_prefix(seq)
        assert seq.num_cached_tokens == want
        assert blocks.ensure(seq, 12)


def test_only_computed_blocks_are_registered():
    blocks, seq = BlockManager(8, 4), make_seq(range(12))
    blocks.match_prefix(seq)
    assert blocks.ensure(seq, 12)
    for computed, want in [(3, 0), (4, 4), (7, 4), (12, 8)]:
        seq.num_computed_tokens = computed
        blocks.register(seq)
        assert cached_tokens(blocks, range(12)) == want
        assert blocks.num_cached == computed // 4
        blocks.check([seq])


def test_generated_tokens_are_cached_too():
    blocks = BlockManager(8, 4)
    seq = compute(blocks, make_seq(range(3)))
    seq.append(3)
    seq.num_computed_tokens = 4
    blocks.register(seq)
    assert cached_tokens(blocks, range(5)) == 4


def test_shared_block_is_freed_by_its_last_owner():
    blocks = BlockManager(3, 4)
    first, second = compute(blocks, make_seq(range(5))), compute(blocks, make_seq(range(5), seq_id=1))
    assert first.block_table[0] == second.block_table[0] and blocks.num_free == 0
    blocks.free(first)
    assert blocks.num_free == 1
    blocks.check([second])
    blocks.free(second)
    assert blocks.num_free == 3 and first.num_computed_tokens == second.num_computed_tokens == 0
    blocks.check([])


def test_two_that_compute_the_same_block_each_keep_their_own():
    blocks, seqs = BlockManager(4, 4), [make_seq(range(6)), make_seq(range(6), seq_id=1)]
    for seq in seqs:
        blocks.match_prefix(seq)
        assert blocks.ensure(seq, 6)
    for seq in seqs:
        seq.num_computed_tokens = 6
        blocks.register(seq)
        blocks.check(seqs)
    assert blocks.num_cached == 1 and seqs[0].block_table[0] != seqs[1].block_table[0]
    blocks.free(seqs[1])
    blocks.check(seqs[:1])
    blocks.free(seqs[0])
    assert cached_tokens(blocks, range(6)) == 4


def test_blank_blocks_go_before_cached_ones():
    blocks = BlockManager(4, 4)
    blocks.free(compute(blocks, make_seq(range(8))))
    seq = make_seq([50], seq_id=1)
    assert blocks.ensure(seq, 8) and blocks.num_cached == 2
    assert blocks.ensure(seq, 12) and blocks.num_cached == 1
    blocks.check([seq])


@pytest.mark.parametrize(("num_taken", "want"), [(1, (8, 8)), (2, (8, 4)), (3, (8, 0)), (4, (4, 0)), (5, (0, 0))])
def test_eviction_takes_the_least_recently_used_and_the_end_of_a_prefix_first(num_taken, want):
    blocks = BlockManager(5, 4)
    old, new = range(9), range(100, 109)
    for seq_id, tokens in enumerate([old, new, old]):  # the third one uses `old` again
        blocks.free(compute(blocks, make_seq(tokens, seq_id=seq_id)))
    taker = make_seq([50], seq_id=3)
    assert blocks.ensure(taker, num_taken * 4)
    assert (cached_tokens(blocks, old), cached_tokens(blocks, new)) == want
    blocks.check([taker])


def test_without_prefix_cache_nothing_is_kept():
    blocks = BlockManager(4, 4, enable_prefix_cache=False)
    seq = compute(blocks, make_seq(range(9)))
    assert blocks.num_cached == 0 and cached_tokens(blocks, range(5)) == 0
    blocks.free(seq)
    assert blocks.num_free == 4
    blocks.check([])


def test_reset_forgets_all_and_refuses_while_blocks_are_held():
    blocks = BlockManager(4, 4)
    seq = compute(blocks, make_seq(range(9)))
    with pytest.raises(AssertionError, match="3 blocks are in use"):
        blocks.reset()
    blocks.free(seq)
    assert blocks.num_cached == 2
    blocks.reset()
    assert blocks.num_cached == 0 and cached_tokens(blocks, range(9)) == 0
    blocks.check([])


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences over an alphabet of two tokens start, grow, run and end, in any order, in a tiny pool."""

    @initialize(num_blocks=st.integers(1, 8), block_size=st.integers(1, 3), cache=st.booleans())
    def start_up(self, num_blocks, block_size, cache):
        self.blocks = BlockManager(num_blocks, block_size, cache)
        self.oracle = KVOracle(self.blocks)
        self.living = []
        self.num_seqs = 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        continuation=st.lists(st.integers(0, 1), max_size=3),
        rope_set=st.integers(0, 1),
        plain=st.booleans(),
    )
    def start(self, tokens, continuation, rope_set, plain):
        asked = None if plain else 0
        seq = make_seq(
            tokens, seq_id=self.num_seqs, rope_set=rope_set, prompt_logprobs=asked, continuation=continuation
        )
        self.num_seqs += 1
        self.blocks.match_prefix(seq)
        first_wanted = len(seq) if plain else len(tokens) if continuation else 1
        assert seq.num_computed_tokens < first_wanted
        assert seq.num_computed_tokens == 0 or self.blocks.enable_prefix_cache
        self.living.append(seq)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def run_tokens(self, data):
        seq = data.draw(st.sampled_from(self.living))
        num_tokens = data.draw(st.integers(0, len(seq) - seq.num_computed_tokens))
        before, num_free = seq.block_table[:], self.blocks.num_free
        if not self.blocks.ensure(seq, seq.num_computed_tokens + num_tokens):
            assert seq.block_table == before and self.blocks.num_free == num_free
            return
        self.oracle.write(seq, num_tokens, self.living)
        seq.num_computed_tokens += num_tokens
        self.blocks.register(seq)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data, token):
        data.draw(st.sampled_from(self.living)).append(token)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), again=st.booleans())
    def free(self, data, again):
        seq = data.draw(st.sampled_from(self.living))
        self.blocks.free(seq)
        assert not seq.block_table and seq.num_computed_tokens == 0
        if again:  # as after a preemption
            self.blocks.match_prefix(seq)
        else:
            self.living.remove(seq)

    @invariant()
    def books_agree(self):
        if hasattr(self, "blocks"):
            self.blocks.check(self.living)
            self.oracle.check(self.living)

    def teardown(self):
        if hasattr(self, "blocks"):
            for seq in self.living:
                self.blocks.free(seq)
            self.blocks.check([])
            assert self.blocks.num_free == self.blocks.num_blocks
            self.blocks.reset()
            assert self.blocks.num_cached == 0


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
