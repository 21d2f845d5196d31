"""BlockManager: which block of the KV cache belongs to whom, and which prefixes it still holds.

A block is shared by reference count. Full blocks are known by a chained hash of all tokens up to their end, so equal
prefixes find each other; freed blocks stay known until their place is needed, least recently used first.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from engine.sequence import Sequence


class BlockManager:
    """Hands out blocks 0 .. num_blocks-1 of `block_size` tokens each.

    A block in use is full and shared, or it has one owner, who alone writes it. Two sequences that compute the same
    block at the same time each keep their own; the prefix cache knows the first. The Scheduler sees to it that this is
    rare.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._clear()

    def _clear(self) -> None:
        self._ref_counts = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(self.num_blocks - 1, -1, -1))  # free, not in the prefix cache
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free, in the prefix cache, least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, those of the prefix cache that nobody uses included."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks the prefix cache knows, in use or not."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> None:
        """Attach the cached blocks that a sequence without blocks begins with, and count their tokens as computed.

        None of them holds a token whose logits are still wanted: the last one, and those that prompt logprobs come of.
        """
        assert not seq.block_table, f"sequence {seq.seq_id} already has {len(seq.block_table)} blocks"
        if self.enable_prefix_cache:
            for index in range(self._num_wanted(seq)):
                block = self._block_of.get(self._hash(seq, index))
                if block is None:
                    break
                if self._ref_counts[block] == 0:
                    del self._evictable[block]
                self._ref_counts[block] += 1
                seq.block_table.append(block)
        seq.num_computed_tokens = seq.num_cached_tokens = len(seq.block_table) * self.block_size

    def num_cached_tokens(self, seq: Sequence) -> int:
        """How many tokens match_prefix would find for a sequence without blocks. Ends are evicted before what they
        continue, so halving finds out."""
        wanted = range(self._num_wanted(seq) if self.enable_prefix_cache else 0)
        num_blocks = bisect_left(wanted, True, key=lambda index: self._hash(seq, index) not in self._block_of)
        return num_blocks * self.block_size

    def is_computed_by(self, other: Sequence, seq: Sequence) -> bool:
        """Whether the first block that match_prefix did not find for `seq` is one that `other`, which runs, is yet to
        compute."""
        index = len(seq.block_table)
        if not self.enable_prefix_cache or index >= self._num_wanted(seq):
            return False
        computes = other.num_computed_tokens // self.block_size <= index < len(other.token_ids) // self.block_size
        return computes and self._hash(other, index) == self._hash(seq, index)

    def ensure(self, seq: Sequence, num_tokens: int, spare: int = 0) -> bool:
        """Give the sequence blocks for positions below num_tokens: all that lack, or False and none.

        With `spare`, taking any must leave that many free.
        """
        num_missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if num_missing > max(0, self.num_free - spare):
            return False
        for _ in range(num_missing):
            seq.block_table.append(self._take())
        return True

    def register(self, seq: Sequence) -> None:
        """Enter the sequence's full computed blocks, of tokens that have been read, into the prefix cache."""
        if not self.enable_prefix_cache:
            return
        num_tokens = min(seq.num_computed_tokens, len(seq.token_ids))
        for index in range(seq.num_registered, num_tokens // self.block_size):
            key, block = self._hash(seq, index), seq.block_table[index]
            if self._block_of.setdefault(key, block) == block:
                self._hashes[block] = key
            seq.num_registered = index + 1

    def free(self, seq: Sequence) -> None:
        """Take the sequence's blocks back; nothing of it counts as computed any more."""
        # The end of a prefix is of no use without its beginning: evict it first.
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = None
        seq.block_table.clear()
        seq.num_computed_tokens = seq.num_registered = 0

    def reset(self) -> None:
        """Forget the prefix cache. No sequence may hold blocks."""
        assert self.num_free == self.num_blocks, f"{self.num_blocks - self.num_free} blocks are in use"
        self._clear()

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            key = self._hashes[block]
            assert key is not None, f"evictable block {block} has no hash"
            del self._block_of[key]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def _num_wanted(self, seq: Sequence) -> int:
        """Full blocks that the sequence could take over."""
        return seq.next_logits // self.block_size

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """Hash of a full block and of all before it, for the sequence's rope set."""
        for i in range(len(seq.block_hashes), index + 1):
            parent = seq.block_hashes[i - 1] if i else bytes([seq.rope_set])
            tokens = array("q", seq.token_ids[i * self.block_size : (i + 1) * self.block_size])
            seq.block_hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return seq.block_hashes[index]

    def check(self, seqs: Iterable[Sequence]) -> None:
        """Assert that the books agree with each other and with the tables of all living sequences."""
        counts = [0] * self.num_blocks
        for seq in seqs:
            assert len(set(seq.block_table)) == len(seq.block_table), (
                f"{seq.seq_id} has a block twice: {seq.block_table}"
            )
            held = len(seq.block_table) * self.block_size
            assert seq.num_computed_tokens <= held, f"{seq.seq_id}: {seq.num_computed_tokens} computed, room for {held}"
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self._ref_counts, f"tables hold {counts}, reference counts say {self._ref_counts}"
        free = [*self._blank, *self._evictable]
        unused = [block for block, count in enumerate(counts) if count == 0]
        assert sorted(free) == unused, f"free {sorted(free)}, but unused are {unused}"
        known = {block: key for block, key in enumerate(self._hashes) if key is not None}
        assert {key: block for block, key in known.items()} == self._block_of, f"{known} against {self._block_of}"
        assert len(known) == len(self._block_of), f"{len(known)} blocks share {len(self._block_of)} hashes"
        assert known.keys().isdisjoint(self._blank), f"blank {self._blank}, cached {sorted(known)}"
        assert known.keys() >= self._evictable.keys(), f"evictable {list(self._evictable)}, cached {sorted(known)}"
