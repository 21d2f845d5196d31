"""The CPUs of each rank, from made topologies: one and two sockets, containers that have a part of them."""

import os
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

import pytest

from moray.engine.backends.cpu import backend
from moray.engine.backends.cpu.backend import CPU
from moray.engine.partition import Partition
from moray.engine.platform.cpus import cores_of_rank, numa_nodes
from moray.engine.runner.ranks import Ranks

TWO_SOCKETS = ["0-7,16-23", "8-15,24-31"]
FOUR_NODES = ["0-3", "4-7", "8-11", "12-15"]


def write_nodes(root: Path, cpulists: Iterable[str]) -> Path:
    (root / "possible").parent.mkdir(parents=True, exist_ok=True)
    (root / "possible").write_text("0-1\n")
    for number, cpulist in enumerate(cpulists):
        (root / f"node{number}").mkdir()
        (root / f"node{number}/cpulist").write_text(f"{cpulist}\n")
    return root


def test_nodes_as_linux_lists_them(tmp_path: Path) -> None:
    root = write_nodes(tmp_path, ["0-3,8-11", "4", "", *["7"] * 8])  # the third one has memory alone
    nodes = numa_nodes(root)
    assert nodes[:2] == [{0, 1, 2, 3, 8, 9, 10, 11}, {4}] and len(nodes) == 10
    assert numa_nodes(tmp_path / "none") == []


def span(*bounds: tuple[int, int]) -> set[int]:
    return {cpu for first, last in bounds for cpu in range(first, last + 1)}


@pytest.mark.parametrize(
    ("cpulists", "allowed", "size", "cores"),
    [
        ([], span((0, 7)), 2, None),
        (["0-7"], span((0, 7)), 2, None),
        (TWO_SOCKETS, span((0, 31)), 2, [span((0, 7), (16, 23)), span((8, 15), (24, 31))]),
        (TWO_SOCKETS, span((0, 31)), 4, [*[span((0, 7), (16, 23))] * 2, *[span((8, 15), (24, 31))] * 2]),
        (FOUR_NODES, span((0, 15)), 2, [span((0, 7)), span((8, 15))]),
        (FOUR_NODES, span((0, 15)), 4, [span((0, 3)), span((4, 7)), span((8, 11)), span((12, 15))]),
        (["0-3", "4-7", "8-11"], span((0, 11)), 2, None),  # three nodes
        (["0-3", "4-7", "8-11"], span((0, 11)), 4, None),
        (TWO_SOCKETS, span((4, 11)), 2, [span((4, 7)), span((8, 11))]),  # a container with half of each
        (TWO_SOCKETS, span((8, 15)), 2, None),  # a container with one socket
        (TWO_SOCKETS, span((0, 7), (8, 11)), 2, None),  # twice as many of the first socket: a rank would wait
        (TWO_SOCKETS, span((0, 6), (8, 15)), 2, [span((0, 6)), span((8, 15))]),  # of 15 CPUs each has 7 threads
        (TWO_SOCKETS, span((0, 7), (8, 8)), 8, None),
    ],
)
def test_ranks_are_bound_to_their_nodes(
    tmp_path: Path, cpulists: list[str], allowed: set[int], size: int, cores: list[set[int]] | None
) -> None:
    nodes = numa_nodes(write_nodes(tmp_path, cpulists))
    num_threads = max(1, len(allowed) // size)
    found = [cores_of_rank(Partition(rank, size), allowed, nodes, num_threads) for rank in range(size)]
    assert found == (cores or [None] * size)


def test_a_limited_share_of_both_sockets_is_not_bound_too_tightly() -> None:
    nodes = [span((0, 7)), span((8, 15))]
    assert cores_of_rank(Partition(1, 2), span((0, 15)), nodes, num_threads=3) == nodes[1]  # by a quota of 6 CPUs


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process has one CPU")
def test_a_rank_binds_its_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = (frozenset({cpu}) for cpu in os.sched_getaffinity(0))
    before, found = os.sched_getaffinity(0), set[int]()
    monkeypatch.setattr(backend, "numa_nodes", lambda: [first, second])
    monkeypatch.setattr(backend, "available_cores", lambda: 2)

    def start() -> None:
        ranks = Ranks(2, CPU, num_threads=2)
        found.update(os.sched_getaffinity(0))
        ranks.close()

    thread = Thread(target=start)
    thread.start()
    thread.join()
    assert found == first and os.sched_getaffinity(0) == before
