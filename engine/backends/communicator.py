"""Communicator: how the ranks of tensor parallelism exchange what they computed. Each device has one of its own."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from moray.engine.partition import WHOLE, Partition


class GatherCancelled(Exception):
    """Rank 0 has interrupted the step that this rank runs for it; nothing of it counts."""


class Communicator(Protocol):
    """Connects the ranks that hold the parts of one model. All ranks make the same gathers in the same order.

    partition: the place of this rank
    """

    partition: Partition

    def gather(self, part: Tensor) -> Tensor:
        """Return the columns of all ranks next to each other, in the order of the ranks.

        part: [num_rows, num_columns] of this rank, as large on every rank

        Raises GatherCancelled if rank 0 has interrupted the step.
        """

    def cancel(self) -> None:
        """Interrupt the step on the other ranks: their next gather raises GatherCancelled. For rank 0 alone.

        Only a device whose steps may be interrupted needs it: one whose backend is not is_async.
        """

    def wait(self) -> None:
        """Wait until this rank's device has done what was launched; raise EngineError on rank 0 if a rank has failed.

        Call it before the host waits for the device in any other way, which nothing would end if a rank has failed.
        """


class Alone:
    """The Communicator of a model that one rank holds as a whole."""

    partition = WHOLE

    def gather(self, part: Tensor) -> Tensor:
        return part

    def cancel(self) -> None:
        pass

    def wait(self) -> None:
        pass


ALONE = Alone()


def gather_of(communicator: Communicator) -> Callable[[Tensor], Tensor] | None:
    """Return what gathers the columns of all ranks; None if there is one rank."""
    return None if communicator.partition.size == 1 else communicator.gather
