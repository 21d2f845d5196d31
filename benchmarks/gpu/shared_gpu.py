"""Ranks that share one GPU, which NCCL refuses: for checks on a machine with a single one."""

from collections.abc import Callable

import torch
from torch import Tensor

from moray.engine.backends.base import Backend
from moray.engine.backends.cuda.backend import CudaBackend
from moray.engine.backends.cuda.communicator import CudaCommunicator
from moray.engine.partition import Partition


class HostCommunicator(CudaCommunicator):
    """Gathers in the host's memory, by gloo, and waits for the GPU to do so."""

    def gather(self, part: Tensor) -> Tensor:
        return super().gather(part.cpu()).to(part.device)


class SharedGpuBackend(CudaBackend):
    """Runs all ranks on one GPU. Its steps wait for the host at each gather, so no graph can hold them."""

    def prepare_ranks(self, size: int, memory: int) -> None:
        pass

    def join_ranks(self, partition: Partition, memory: int, on_wait: Callable[[float, int | None], None]) -> Backend:
        host = torch.device("cpu")
        return type(self)(self.torch_device, HostCommunicator(partition, host, memory, on_wait))

    def capture_graphs(self, *_: object) -> None:
        pass
