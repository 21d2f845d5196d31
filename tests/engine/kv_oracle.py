"""KVOracle: an independent model of the contents of a KV cache, against which tests check block tables."""

from moray.engine.core.block_manager import BlockManager
from moray.engine.core.sequence import Sequence


class KVOracle:
    """Records, for every slot, the rope set and all tokens up to the one that was run when the slot was written."""

    def __init__(self, block_manager: BlockManager) -> None:
        self.block_manager = block_manager
        self.slots = {}

    def _slot(self, seq: Sequence, position: int) -> int:
        size = self.block_manager.block_size
        return seq.block_table[position // size] * size + position % size

    def write(self, seq: Sequence, num_tokens: int, living: list[Sequence], pending_row: tuple[int, ...] = ()) -> None:
        """Run num_tokens of seq; assert that it owns each block it writes, and that none is in the prefix cache."""
        tokens = (*seq.token_ids, *pending_row)
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            slot = self._slot(seq, position)
            block = slot // self.block_manager.block_size
            owners = [other.seq_id for other in living if block in other.block_table]
            assert owners == [seq.seq_id], f"{seq.seq_id} writes block {block} of {owners}"
            assert self.block_manager._hashes[block] is None, f"{seq.seq_id} writes cached block {block}"
            self.slots[slot] = (seq.rope_set, tokens[: position + 1])

    def check(self, living: list[Sequence]) -> None:
        """Assert that all computed tokens are in the cache, computed from the same tokens with the same factors."""
        for seq in living:
            for position in range(seq.num_computed_tokens):
                want = (seq.rope_set, tuple(seq.token_ids[: position + 1]))
                got = self.slots.get(self._slot(seq, position))
                assert got == want, f"sequence {seq.seq_id}, position {position}: cache holds {got}, needs {want}"
