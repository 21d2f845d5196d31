"""ShardItem: a shard on its way into the first stage."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from moray.batch.shards import Plan, Shard

COLUMN = "item"


@dataclass(frozen=True)
class ShardItem:
    """Holds what Prepare needs to know of one shard.

    part:          name of its part
    file_digests:  path -> digest of each of its files when the job was planned
    """

    shard: Shard
    part: str
    file_digests: Mapping[str, str]

    @classmethod
    def from_plan(cls, shard: Shard, plan: Plan) -> "ShardItem":
        """Return the item of a shard, which in a retry holds only some rows of the plan's shard."""
        digests = {piece.file: plan.fingerprint.files[piece.file] for piece in shard.slices}
        return cls(shard, plan.part_name(shard), digests)

    def to_row(self) -> dict[str, bytes]:
        """Return the row of a Ray dataset that holds the item."""
        return {COLUMN: pickle.dumps(self)}

    @staticmethod
    def from_block(block: pa.Table) -> "ShardItem":
        """Return the item of a block of one such row."""
        assert block.num_rows == 1, f"{block.num_rows} shards came in one block"
        item: ShardItem = pickle.loads(block[COLUMN][0].as_py())
        return item
