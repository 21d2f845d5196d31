"""Generate: the stage that runs prepared rows through the model."""

from collections.abc import Callable, Mapping
from threading import Lock

import pyarrow as pa

from moray.batch.stages.block_schemas import GENERATED, read_shard
from moray.batch.stages.results import build_result_block, read_rows
from moray.batch.worker.in_flight_shard import InFlightShard
from moray.batch.worker.quarantine import Suspect
from moray.batch.worker.shard_executor import ShardExecutor


class Generate:
    """Runs the rows of one block per call through a worker's engine.

    Several threads may call it at once, so that the engine has the rows of several shards.

    admit:  called with a shard's number; returns its suspects by row, or None where no shard may start any more
    """

    def __init__(self, executor: ShardExecutor, admit: Callable[[int], Mapping[int, Suspect] | None]) -> None:
        self._executor = executor
        self._admit = admit
        self._admission_lock = Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a row for each sample of the block's rows; no row for an empty block, or where it may not start.

        Raises JobError where the engine failed.
        """
        shard = self._start(block) if block.num_rows else None
        if shard is None:
            return GENERATED.empty_table()
        shard.wait()
        return build_result_block(block, shard)

    def _start(self, block: pa.Table) -> InFlightShard | None:
        """Wait for room, then admit a shard and start its rows; return None where no shard may start any more."""
        with self._admission_lock:  # so that each call sees the rows that the one before it queued
            self._executor.wait_for_room()
            index, *_ = read_shard(block)
            suspects = self._admit(index)
            if suspects is None:
                return None
            shard = InFlightShard(index, list(read_rows(block)), suspects=suspects)
            self._executor.start(shard)
            return shard
