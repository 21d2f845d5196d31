"""Time the gathers of a step among ranks: by NCCL, as the engine makes them, and through memory that the GPUs share.

Each rank is a process with a GPU of its own. A gather waits for all ranks, so all make the same ones in the same order.

The memory that GPUs share is that of torch.distributed._symmetric_memory. It is private, and the engine does not use it
(docs/decisions/0049): these figures say what it would gain. Gathers through it are at most those that fit its buffer.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from gpu.measure import captured, replayed
from gpu.progress import Row
from moray.engine.backends.cuda.communicator import CudaCommunicator
from moray.engine.partition import Partition

distributed: Any = torch.distributed  # its stubs lack much of it

NCCL, MULTICAST, COPIES = "NCCL", "symmetric memory, multicast", "symmetric memory, copies"
TOKENS, HIDDEN, INTERMEDIATE, TOP_K = (1, 32, 256), 4096, 6400, 2  # of a step, and of Phi-3.5-MoE
SHAPES = tuple(
    shape for n in TOKENS for shape in ((n, HIDDEN), (TOP_K * n, INTERMEDIATE), (TOP_K * n, HIDDEN))
)  # rows and columns of what all ranks have together
DRY_SHAPES = ((1, 16), (6, 24))
BUFFER_BYTES = 16 << 20
CALLS, ROUNDS = 50, 11  # gathers of a CUDA graph, and its replays
GROUP = "moray-gathers"
CONNECTED_S = 60.0  # within which the ranks are connected

Gather = Callable[[Tensor], Tensor]  # of [rows, columns]; returns [ranks, rows, columns]


class SymmetricGathers:
    """Gathers through memory that the GPUs share. Raises RuntimeError where the machine cannot do that."""

    def __init__(self, partition: Partition, device: torch.device, store: Any) -> None:
        symmetric: Any = torch._C._distributed_c10d._SymmetricMemory
        symmetric.set_group_info(GROUP, partition.rank, partition.size, store)
        self._buffer = symmetric.empty_strided_p2p((BUFFER_BYTES,), (1,), torch.uint8, device, GROUP)
        self._shared = symmetric.rendezvous(self._buffer)
        self._partition = partition

    def multicast(self, part: Tensor) -> Tensor:
        """Gather by stores that the switch brings to all GPUs: NVSwitch of H100 and later."""
        rows, columns = part.shape
        size = self._partition.size
        parts: Tensor = self._shared.get_buffer(self._partition.rank, (size * rows, columns), part.dtype)
        torch.ops.symm_mem.multimem_all_gather_out(part, GROUP, parts)
        return parts.view(size, rows, columns).clone()  # the next gather has the same memory

    def copies(self, part: Tensor) -> Tensor:
        """Gather by a copy from each rank's memory between two barriers."""
        parts = part.new_empty(self._partition.size, *part.shape)
        self._shared.get_buffer(self._partition.rank, part.shape, part.dtype).copy_(part)
        self._shared.barrier()
        for rank, target in enumerate(parts):
            target.copy_(self._shared.get_buffer(rank, part.shape, part.dtype))
        self._shared.barrier()
        return parts


def time_gathers(size: int, timeout_s: float, *, is_dry: bool) -> Iterator[Row]:
    """Start the ranks and yield the rows of the first, which has one for each way and shape.

    timeout_s: after which ranks that hang are ended; the row of the one that hangs is an error
    """
    context = multiprocessing.get_context("spawn")
    memories = [os.memfd_create(name) for name in ("moray-gathers", "moray-symmetric")]
    receiver, sender = context.Pipe(duplex=False)
    paths = [f"/proc/{os.getpid()}/fd/{memory}" for memory in memories]
    ranks = [
        context.Process(target=_run_rank, args=(Partition(rank, size), paths, sender if rank == 0 else None, is_dry))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    sender.close()
    end_s = time.monotonic() + timeout_s
    try:
        while receiver.poll(max(0.0, end_s - time.monotonic())):
            yield {"ranks": size, **receiver.recv()}
        yield {"gather": "all", "ranks": size, "error": f"the ranks did not end in {timeout_s:.0f} s"}
    except EOFError:  # the first rank has ended
        ranks[0].join(timeout_s)
        if ranks[0].exitcode != 0:
            yield {"gather": "all", "ranks": size, "error": f"rank 0 ended with exit code {ranks[0].exitcode}"}
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
        for memory in memories:
            os.close(memory)


def _run_rank(partition: Partition, paths: list[str], sender: Connection | None, is_dry: bool) -> None:
    device = torch.device("cpu") if is_dry else torch.device("cuda", partition.rank)
    if not is_dry:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # makes the context, which is no part of what NCCL takes
    before = _free_bytes(device)

    def on_wait(seconds: float, rank: int | None) -> None:
        if seconds > CONNECTED_S:
            raise RuntimeError(f"the ranks were not connected in {CONNECTED_S:g} s")

    memory, symmetric_memory = (os.open(path, os.O_RDWR) for path in paths)
    communicator = CudaCommunicator(partition, device, memory, on_wait)
    report = sender.send if sender is not None else _nothing
    shapes = DRY_SHAPES if is_dry else SHAPES
    for shape in shapes:
        report(_row(NCCL, shape, partition, device, communicator.gather_parts, communicator.gather_parts))
    report({"gather": NCCL, "memory": "taken of each GPU", "mib": (before - _free_bytes(device)) >> 20})
    if is_dry:
        return
    try:
        store = distributed.FileStore(f"/proc/self/fd/{symmetric_memory}", partition.size)
        symmetric = SymmetricGathers(partition, device, store)
    except Exception as error:
        report({"gather": MULTICAST, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        return
    for name, gather in ((COPIES, symmetric.copies), (MULTICAST, symmetric.multicast)):
        for shape in shapes:
            try:
                report(_row(name, shape, partition, device, gather, communicator.gather_parts))
            except Exception as error:  # the same on all ranks: a machine without multicast
                report({"gather": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
                break


def _nothing(row: Row) -> None:
    pass


def _row(
    name: str, shape: tuple[int, int], partition: Partition, device: torch.device, gather: Gather, expected: Gather
) -> Row:
    rows, columns = shape
    generator = torch.Generator().manual_seed(partition.rank)
    part = torch.randn(rows, columns // partition.size, generator=generator).bfloat16().to(device)
    equal = torch.equal(gather(part), expected(part))
    return {"gather": name, "rows": rows, "columns": columns, "us": _microseconds(gather, part), "equal": equal}


def _microseconds(gather: Gather, part: Tensor) -> float:
    """Return the median time of a gather in a CUDA graph; without a GPU, of one call, which means nothing."""
    if part.device.type == "cpu":
        started = time.perf_counter()
        gather(part)
        return (time.perf_counter() - started) * 1e6
    graph = captured([lambda: gather(part)] * CALLS)
    return statistics.median(replayed(graph, 1) for _ in range(ROUNDS)) * 1e3 / CALLS


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
