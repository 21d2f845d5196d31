"""BlockManager: allocates the blocks of the KV cache to sequences, and keeps the prefix cache.

Blocks are shared by reference count. A full block is identified by a chained hash of all tokens up to its end, so
sequences with equal prefixes find the same blocks. A freed block stays in the prefix cache until its space is needed;
the least recently used block is evicted first.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from moray.engine.core.sequence import Sequence


class BlockManager:
    """Allocates blocks 0 .. num_blocks-1 of `block_size` tokens each.

    A block in use is either full, and may be shared, or it belongs to one sequence, which alone writes it. Two
    sequences that compute the same block at the same time each keep their own block; the prefix cache has the first
    one. The Scheduler makes sure that this is rare.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._clear()

    def _clear(self) -> None:
        self._ref_counts = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._block_by_hash: dict[bytes, int] = {}
        # Free blocks outside the prefix cache, and free blocks in it, least recently used first.
        self._free_uncached = list(range(self.num_blocks - 1, -1, -1))
        self._free_cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Return the number of blocks that can be allocated now, including the unused blocks of the prefix cache."""
        return len(self._free_uncached) + len(self._free_cached)

    @property
    def num_cached(self) -> int:
        """Return the number of blocks in the prefix cache, in use or not."""
        return len(self._block_by_hash)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> None:
        """Attach the cached blocks of the longest known prefix to a sequence that has no blocks.

        Their tokens count as computed. No attached block holds a token whose logits are still needed: the last token,
        and the tokens that prompt logprobs are computed from.
        """
        assert not seq.block_table, f"sequence {seq.seq_id} already has {len(seq.block_table)} blocks"
        if self.enable_prefix_cache:
            for index in range(self._num_matchable_blocks(seq)):
                block = self._block_by_hash.get(self._hash(seq, index))
                if block is None:
                    break
                if self._ref_counts[block] == 0:
                    del self._free_cached[block]
                self._ref_counts[block] += 1
                seq.block_table.append(block)
        seq.num_computed_tokens = seq.num_cached_tokens = len(seq.block_table) * self.block_size

    def num_cached_tokens(self, seq: Sequence) -> int:
        """Return how many tokens match_prefix would find for a sequence without blocks.

        The end of a prefix is evicted before its beginning, so a binary search finds the number.
        """
        candidates = range(self._num_matchable_blocks(seq) if self.enable_prefix_cache else 0)
        num_blocks = bisect_left(candidates, True, key=lambda index: self._hash(seq, index) not in self._block_by_hash)
        return num_blocks * self.block_size

    def is_pending_in(self, other: Sequence, seq: Sequence) -> bool:
        """Return whether the running sequence `other` is about to compute the block that `seq` needs next.

        That block is the first one that match_prefix did not find for `seq`.
        """
        index = len(seq.block_table)
        if not self.enable_prefix_cache or index >= self._num_matchable_blocks(seq):
            return False
        is_computing = other.num_computed_tokens // self.block_size <= index < len(other.token_ids) // self.block_size
        return is_computing and self._hash(other, index) == self._hash(seq, index)

    def ensure(self, seq: Sequence, num_tokens: int, spare: int = 0) -> bool:
        """Allocate the blocks that the sequence lacks for positions below `num_tokens`.

        spare: number of blocks that must stay free if any are allocated

        Returns False, and allocates nothing, when there are too few free blocks.
        """
        num_missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if num_missing > max(0, self.num_free - spare):
            return False
        for _ in range(num_missing):
            seq.block_table.append(self._allocate_block())
        return True

    def register(self, seq: Sequence) -> None:
        """Add the sequence's full computed blocks to the prefix cache, as far as their tokens have been read."""
        if not self.enable_prefix_cache:
            return
        num_tokens = min(seq.num_computed_tokens, len(seq.token_ids))
        for index in range(seq.num_registered, num_tokens // self.block_size):
            key, block = self._hash(seq, index), seq.block_table[index]
            if self._block_by_hash.setdefault(key, block) == block:
                self._hashes[block] = key
            seq.num_registered = index + 1

    def free(self, seq: Sequence) -> None:
        """Free the sequence's blocks; none of its tokens count as computed any more."""
        # The end of a prefix is useless without its beginning, so it must be evicted first.
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free_uncached.append(block)
                else:
                    self._free_cached[block] = None
        del seq.block_table[:]
        seq.num_computed_tokens = seq.num_registered = 0

    def reset(self) -> None:
        """Empty the prefix cache. No sequence may hold blocks."""
        assert self.num_free == self.num_blocks, f"{self.num_blocks - self.num_free} blocks are in use"
        self._clear()

    def _allocate_block(self) -> int:
        if self._free_uncached:
            block = self._free_uncached.pop()
        else:
            block, _ = self._free_cached.popitem(last=False)
            key = self._hashes[block]
            assert key is not None, f"evictable block {block} has no hash"
            del self._block_by_hash[key]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def _num_matchable_blocks(self, seq: Sequence) -> int:
        """Return how many leading full blocks the sequence could use from the prefix cache."""
        return seq.first_needed_logit // self.block_size

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """Return the hash of a full block and of all blocks before it, for the sequence's rope set."""
        for i in range(len(seq.block_hashes), index + 1):
            parent = seq.block_hashes[i - 1] if i else bytes([seq.rope_set])
            tokens = array("q", seq.token_ids[i * self.block_size : (i + 1) * self.block_size])
            seq.block_hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return seq.block_hashes[index]

    def check(self, seqs: Iterable[Sequence]) -> None:
        """Assert that the internal state agrees with itself and with the block tables of all sequences, `seqs`."""
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
        free = [*self._free_uncached, *self._free_cached]
        unused = [block for block, count in enumerate(counts) if count == 0]
        assert sorted(free) == unused, f"free {sorted(free)}, but unused are {unused}"
        known = {block: key for block, key in enumerate(self._hashes) if key is not None}
        assert {key: block for block, key in known.items()} == self._block_by_hash, (
            f"{known} against {self._block_by_hash}"
        )
        assert len(known) == len(self._block_by_hash), f"{len(known)} blocks share {len(self._block_by_hash)} hashes"
        assert known.keys().isdisjoint(self._free_uncached), (
            f"free and uncached {self._free_uncached}, cached {sorted(known)}"
        )
        assert known.keys() >= self._free_cached.keys(), (
            f"free and cached {list(self._free_cached)}, cached {sorted(known)}"
        )
