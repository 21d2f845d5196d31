"""SharedMemoryCommunicator: the Communicator of ranks on the CPUs of one machine."""

import mmap
from collections.abc import Callable

import numpy as np
from torch import Tensor

from moray.engine.backends.communicator import GatherCancelled
from moray.engine.partition import Partition
from moray.kernels.cpu import gather

SLICE_NS = 50_000_000  # how long a rank waits for another in compiled code before it looks at what has happened


class SharedMemoryCommunicator:
    """Exchanges parts through memory that the ranks share.

    partition:  the place of this rank
    memory:     file descriptor of the shared memory, of gather.shared_bytes(size) zero bytes
    on_wait:    see Backend.join_ranks
    """

    def __init__(self, partition: Partition, memory: int, on_wait: Callable[[float, int | None], None]) -> None:
        self.partition = partition
        self._on_wait = on_wait
        self._map = mmap.mmap(memory, gather.shared_bytes(partition.size))
        self._address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self._number = 0  # of the last gather

    def gather(self, part: Tensor) -> Tensor:
        """Return the columns of all ranks next to each other.

        Raises GatherCancelled on the other ranks if rank 0 calls cancel() instead.
        """
        size, (num_rows, columns) = self.partition.size, part.shape
        part = part.contiguous()
        out = part.new_empty(num_rows, size * columns)
        rows = gather.rows_at_once(columns * part.element_size())
        for first in range(0, num_rows, rows):
            self._gather_rows(part[first : first + rows], out[first : first + rows])
        return out

    def cancel(self) -> None:
        """End the gather for which the other ranks wait, or will wait: they raise GatherCancelled. For rank 0 alone."""
        self._number += 1
        self._wait(lambda: gather.cancel(self._address, self.partition.size, self._number, SLICE_NS), self._number - 1)

    def wait(self) -> None:
        """Return at once: a CPU has computed what was launched, and gathers wait themselves."""

    def _gather_rows(self, part: Tensor, out: Tensor) -> None:
        self._number += 1
        place = self._address, self.partition.rank, self.partition.size, self._number
        self._wait(lambda: gather.contribute(*place, part, SLICE_NS), self._number - 1)
        if self._wait(lambda: gather.collect(*place, part, out, SLICE_NS), self._number) == gather.CANCELLED:
            raise GatherCancelled

    def _wait(self, call: Callable[[], int], number: int) -> int:
        """Call again while others are waited for. A slice counts as SLICE_NS, also if this process was stopped."""
        slices = 0
        while (state := call()) == gather.WAITING:
            slices += 1
            self._on_wait(slices * SLICE_NS / 1e9, self._find_late(number))
        return state

    def _find_late(self, number: int) -> int:
        """Return the rank that has not contributed to gather `number`; this one if all have by now."""
        for rank in range(self.partition.size):
            if gather.contributed(self._address, rank) < number:
                return rank
        return self.partition.rank
