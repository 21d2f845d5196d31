"""CudaCommunicator: the Communicator of ranks on the GPUs of one machine, by NCCL.

Ranks whose tensors are on the CPU, as under Triton's interpreter, use gloo instead.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from moray.engine.errors import DeviceError
from moray.engine.partition import Partition

distributed: Any = torch.distributed  # its stubs lack much of it

POLL_S = 50e-6  # between two looks whether what is waited for is done
LOOK_S = 0.05  # between two looks whether the other ranks still run
NOTICED_S = 2.0  # within which the end of a process is noticed, after that of its connections
NEVER = timedelta(days=365)
# What decides about a rank that has failed is on_wait, not threads of torch, which would end this process.
SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "NCCL_SOCKET_IFNAME": "lo",  # ranks are on one machine: they find each other without a network
}


class CudaCommunicator:
    """Gathers columns in the order of the GPU's work, without waiting for it. Gathers can be captured in CUDA graphs.

    Ranks find each other through a file in memory, without a port.

    partition:  the place of this rank
    device:     of the tensors that are gathered
    memory:     descriptor of an empty file in memory, the same for all ranks
    on_wait:    see Backend.join_ranks
    """

    def __init__(
        self,
        partition: Partition,
        device: torch.device,
        memory: int,
        on_wait: Callable[[float, int | None], None],
    ) -> None:
        """Connect the ranks. Waits until all are there. Raises DeviceError if they cannot be connected."""
        self.partition = partition
        self._device, self._on_wait = device, on_wait
        self._group: Any = None
        self._memory = os.dup(memory)
        store = distributed.FileStore(f"/proc/self/fd/{self._memory}", partition.size)
        ranks = [f"rank {rank}" for rank in range(partition.size)]
        store.set(ranks[partition.rank], "here")
        self._poll(lambda: store.check(ranks))
        try:
            self._group = _open_group(store, partition, device)
            self.gather(torch.zeros(1, 1, device=device))  # connects, before anything is loaded or captured
            self.wait()
        except RuntimeError as error:
            raise DeviceError(
                f"rank {partition.rank} of {partition.size} cannot be connected with the others: {error}. With "
                "NCCL_DEBUG=INFO in the environment NCCL says why."
            ) from error

    def __del__(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group = None  # before its file: it opens that by the number of the descriptor
        os.close(self._memory)

    def gather(self, part: Tensor) -> Tensor:
        """Return the columns of all ranks next to each other."""
        num_rows, columns = part.shape
        if part.numel() == 0:
            return part.new_empty(num_rows, self.partition.size * columns)
        try:
            parts = self.gather_parts(part.contiguous())
        except RuntimeError as error:
            self._fail(error)
        if num_rows == 1:  # the parts are next to each other as they are
            return parts.view(1, -1)
        return parts.transpose(0, 1).reshape(num_rows, -1)

    def gather_parts(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks one after the other: [size, num_rows, columns].

        All that goes from GPU to GPU goes through here: a faster way for small parts would be chosen here.

        part: [num_rows, columns], contiguous and not empty
        """
        size, (num_rows, columns) = self.partition.size, part.shape
        parts = part.new_empty(size * num_rows, columns)
        options = distributed.distributed_c10d.AllgatherOptions()
        options.asyncOp = False  # in the current stream, not beside it
        work = self._group._allgather_base(parts, part, options)
        if self._device.type == "cpu":
            self._poll(work.is_completed)
        if work is not None:
            work.wait()
        return parts.view(size, num_rows, columns)

    def cancel(self) -> None:
        """Steps on a GPU are never interrupted."""
        raise NotImplementedError("a step on a GPU is never interrupted: the backend is_async")

    def wait(self) -> None:
        """Wait until the GPU has done what was launched in this stream. Raises EngineError if a rank has failed."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.wait_for(event)

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Wait for an event. Raises EngineError on rank 0 if a rank has failed, and so may never come to it."""
        try:
            self._poll(event.query)
        except RuntimeError as error:
            self._fail(error)

    def _poll(self, is_done: Callable[[], bool]) -> None:
        """Wait, and call on_wait meanwhile. Each look counts as LOOK_S, also if this process was stopped."""
        looks, looked = 0, time.monotonic()
        while not is_done():
            time.sleep(POLL_S)
            if time.monotonic() - looked >= LOOK_S:
                looks, looked = looks + 1, time.monotonic()
                self._look(looks * LOOK_S)

    def _look(self, seconds: float) -> None:
        try:
            self._on_wait(seconds, None)
        except BaseException:
            if self._group is not None:
                self._group.abort()  # ends the gathers that the GPU waits in
            raise

    def _fail(self, error: RuntimeError) -> NoReturn:
        """Raise the error of a rank that has ended, if that is the reason, else `error`."""
        end = time.monotonic() + NOTICED_S
        while time.monotonic() < end:
            self._look(0.0)
            time.sleep(LOOK_S)
        raise error


def _open_group(store: Any, partition: Partition, device: torch.device) -> Any:
    """Return a process group of this communicator alone: torch's default group would allow one engine a process."""
    if device.type == "cpu":
        return distributed.distributed_c10d.ProcessGroupGloo(store, partition.rank, partition.size, NEVER)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    options = distributed.distributed_c10d.ProcessGroupNCCL.Options()
    options._timeout = NEVER
    return distributed.distributed_c10d.ProcessGroupNCCL(store, partition.rank, partition.size, options)
