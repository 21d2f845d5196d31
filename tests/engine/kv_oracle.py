"""What a real KV cache would hold: the block tables of a run are judged by it."""

from engine.block_manager import BlockManager
from engine.sequence import Sequence


class KVOracle:
    """Every slot remembers the rope set and all the tokens up to its own that were run when it was written."""

    def __init__(self, block_manager: BlockManager) -> None:
        self.block_manager = block_manager
        self.slots = {}

    def _slot(self, seq: Sequence, position: int) -> int:
        size = self.block_manager.block_size
        return seq.block_table[position // size] * size + position % size

    def write(self, seq: Sequence, num_tokens: int, living: list[Sequence], unread: tuple[int, ...] = ()) -> None:
        """Run num_tokens of seq; every block written must be its own, and none that the prefix cache hands out."""
        tokens = (*seq.token_ids, *unread)
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            slot = self._slot(seq, position)
            block = slot // self.block_manager.block_size
            owners = [other.seq_id for other in living if block in other.block_table]
            assert owners == [seq.seq_id], f"{seq.seq_id} writes block {block} of {owners}"
            assert self.block_manager._hashes[block] is None, f"{seq.seq_id} writes cached block {block}"
            self.slots[slot] = (seq.rope_set, tokens[: position + 1])

    def check(self, living: list[Sequence]) -> None:
        """All that counts as computed is there, was computed from the same tokens and with the same factors."""
        for seq in living:
            for position in range(seq.num_computed_tokens):
                want = (seq.rope_set, tuple(seq.token_ids[: position + 1]))
                got = self.slots.get(self._slot(seq, position))
                assert got == want, f"sequence {seq.seq_id}, position {position}: cache holds {got}, needs {want}"
