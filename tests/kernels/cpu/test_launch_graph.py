"""Tests of graphs of launches: a replay computes what the function would, or the function is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moray.kernels.cpu.launch import call, launch
from moray.kernels.cpu.launch_graph import GraphMemory, NotCapturable, capture
from moray.kernels.cpu.norms import add_rms_norm
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, keep
from moray.kernels.cpu.route import softmax_topk
from moray.kernels.cpu.thread_pool import use_cores


def layers(x: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Launch kernels of ours, and use operations of PyTorch that make views, copies, new tensors, or change one."""
    chosen = table[positions] * 2.0
    total, normed = add_rms_norm(chosen.to(x.dtype), x, torch.ones(x.shape[1], dtype=x.dtype), 1e-5)
    normed.clamp_(-1.0, 1.0)
    weights, ids = softmax_topk(normed.view(len(x), -1)[:, :8].contiguous(), 2)
    ones = x.new_zeros(len(x), 1) + 1
    return total + normed * ones, weights.cos(), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_computes_what_the_function_does(dtype: torch.dtype) -> None:
    x, positions, table = torch.randn(3, 64).to(dtype), torch.tensor([2, 0, 5]), torch.randn(9, 64)
    results, graph = capture(lambda: layers(x, positions, table), GraphMemory())
    for got, want in zip(results, layers(x, positions, table), strict=True):
        assert torch.equal(got, want)
    for _ in range(3):
        x.copy_(torch.randn(3, 64))
        positions.copy_(torch.randint(9, (3,)))
        graph.spoil()
        graph.replay()
        for got, want in zip(results, layers(x, positions, table), strict=True):
            assert torch.equal(got, want)


def test_what_no_graph_sees_is_missing_in_a_spoiled_one() -> None:
    x = torch.ones(4, 4)

    def write_beside() -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        out.numpy()[:] = x.numpy() + 1
        return (out + 1,)

    (result,), graph = capture(write_beside, GraphMemory())
    assert torch.equal(result, x + 2)
    graph.spoil()
    graph.replay()
    assert result.isnan().all()


@pytest.mark.parametrize("function", [lambda x: (x + float(x.sum()),), lambda x: x.split(2)])
def test_what_a_graph_cannot_repeat_is_refused(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.ones(4, 4)
    with pytest.raises(NotCapturable, match="returns no tensor"):
        capture(lambda: function(x), GraphMemory())
    assert torch.equal(add_rms_norm(x, x, x[0], 1e-5)[0], 2 * x), "launches are seen by nobody any more"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_kernel_without_memory_is_an_error() -> None:
    """A C function loses the exception; the launch and a replay find that it did not report."""
    size = torch.ones(1, dtype=torch.int64)

    def run() -> tuple[Tensor, ...]:
        launch(ALLOCATE, (size.data_ptr(),), reports=True)
        return (size + 1,)

    _, graph = capture(run, GraphMemory())
    graph.replay()
    size[0] = 1 << 60
    with pytest.raises(MemoryError, match="a kernel found no memory"):
        graph.replay()
    with pytest.raises(MemoryError, match="a kernel found no memory"):
        run()


def allocate(arguments: Any, piece: Any) -> None:
    """Allocate as many bytes as a number in memory says."""
    words = array_at(arguments, (2,), np.uint64)
    keep(np.empty(array_at(words[0], (1,), np.int64)[0], np.uint8))
    words[1] = 1


ALLOCATE = CFunction(allocate)


@pytest.mark.parametrize("sizes", [[4000, 1, 1000], [1000, 2000, 3000, 4000]])
def test_graphs_share_memory(sizes: list[int]) -> None:
    memory, graphs = GraphMemory(), []
    for num_rows in sizes:
        x = torch.randn(num_rows, 64)
        graphs.append((x, *capture(lambda x=x: add_rms_norm(x, x, torch.ones(64), 1e-5), memory)))  # type: ignore[misc]
    largest = 2 * 4000 * 64 * 4
    assert largest <= memory.num_bytes <= 2 * largest
    for x, (total, normed), graph in graphs:
        x.normal_()
        graph.replay()
        want = add_rms_norm(x, x, torch.ones(64), 1e-5)
        assert torch.equal(total, want[0]) and torch.equal(normed, want[1])


def test_a_graph_is_of_a_number_of_cores() -> None:
    x = torch.randn(2, 64)
    with use_cores(2):
        _, graph = capture(lambda: add_rms_norm(x, x, x[0], 1e-5), GraphMemory())
        assert graph.fits_cores
    with use_cores(3):
        assert not graph.fits_cores


def test_a_call_between_launches_is_made_again() -> None:
    x, calls = torch.randn(2, 64), []

    def run() -> tuple[Tensor, ...]:
        first = add_rms_norm(x, x, x[0], 1e-5)
        call(lambda: calls.append(first[0].tolist()))
        return add_rms_norm(*first, x[0], 1e-5)

    _, graph = capture(run, GraphMemory())
    x.normal_()
    graph.replay()
    assert len(calls) == 2 and calls[0] != calls[1] == (x + x).tolist()
