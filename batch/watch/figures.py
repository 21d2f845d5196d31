"""Figures: what a worker tells of itself every second. Pure."""

from dataclasses import dataclass

from engine.metrics import Metrics


@dataclass(frozen=True)
class Figures:
    """One worker at one moment. Names as at the endpoint's /metrics.

    at_s:         seconds by the worker's clock, which is no other's
    rows:         in the engine
    seqs:         samples of the rows that were given to the worker and are not done
    waiting_seqs: those of them that have no place in a step yet
    free_blocks, blocks:  of the KV cache; free ones may hold cached prefixes
    totals:       since the engine started; busy_s with the step that is running
    """

    at_s: float
    rows: int
    seqs: int
    waiting_seqs: int
    free_blocks: int
    blocks: int
    totals: Metrics

    @property
    def used_blocks(self) -> int:
        return self.blocks - self.free_blocks
