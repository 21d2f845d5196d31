"""WorkerStats: what a worker reports about itself every second. Pure."""

from dataclasses import dataclass

from moray.engine.metrics import Metrics


@dataclass(frozen=True)
class WorkerStats:
    """Holds the statistics of one worker at one moment; the names are those of the endpoint's /metrics.

    at_s:                 seconds by the worker's own clock, which is not comparable with any other
    rows:                 rows in the engine
    seqs:                 samples of the rows that were given to the worker and are not done
    waiting_seqs:         those of them that are not part of the engine's steps yet
    free_blocks, blocks:  blocks of the KV cache; free ones may hold cached prefixes
    max_num_seqs, max_num_batched_tokens:  the limits of the engine's steps, as they are now
    totals:               the engine's counters since it started; busy_s includes the step that is running
    """

    at_s: float
    rows: int
    seqs: int
    waiting_seqs: int
    free_blocks: int
    blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    totals: Metrics

    @property
    def used_blocks(self) -> int:
        return self.blocks - self.free_blocks
