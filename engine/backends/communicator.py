"""Communicator: how the ranks of tensor parallelism exchange what they computed. Each device has one of its own."""

from typing import Protocol

from torch import Tensor

from moray.engine.partition import WHOLE, Partition


class GatherCancelled(Exception):
    """Rank 0 has interrupted the step that this rank runs for it; nothing of it counts."""


class Communicator(Protocol):
    """Connects the ranks that hold the parts of one model. All ranks make the same calls in the same order.

    partition: the place of this rank
    """

    partition: Partition

    def gather(self, part: Tensor) -> Tensor:
        """Return the columns of all ranks next to each other, in the order of the ranks.

        part: [num_rows, num_columns] of this rank, as large on every rank

        Raises GatherCancelled if rank 0 has interrupted the step.
        """

    def cancel(self) -> None:
        """Interrupt the step on the other ranks: their next gather raises GatherCancelled. For rank 0 alone."""


class Alone:
    """The Communicator of a model that one rank holds as a whole."""

    partition = WHOLE

    def gather(self, part: Tensor) -> Tensor:
        return part

    def cancel(self) -> None:
        pass


ALONE = Alone()
