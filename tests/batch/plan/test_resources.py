"""How stages share a cluster, as a table."""

from pathlib import Path
from typing import Any

import pytest
from made_jobs import make_spec

from moray.batch.fingerprint import Fingerprint
from moray.batch.plan.nodes import Node
from moray.batch.plan.resources import choose_resources, shards_per_worker
from moray.batch.shards import Plan, Shard, Slice
from moray.engine.errors import SpecError


def plan(*shard_rows: int) -> Plan:
    return Plan(Fingerprint({}, {}), tuple(Shard(i, (Slice("a", 0, rows),)) for i, rows in enumerate(shard_rows)))


MANY = plan(*[16] * 100)


def choose(
    folder: Path,
    of: Plan = MANY,
    nodes: int = 1,
    cpus: float = 2,
    gpus: int = 0,
    can_grow: bool = False,
    **sections: Any,
) -> Any:
    there = [Node({"CPU": cpus / nodes, "GPU": gpus / nodes}, {})] * nodes
    return choose_resources(make_spec(folder, **sections), of, there, can_grow=can_grow)


@pytest.mark.parametrize("cpus", [0.5, 1, 2, 64])
def test_all_stages_fit_in_the_cpus_of_a_worker(tmp_path: Path, cpus: float) -> None:
    auto = choose(tmp_path, cpus=max(1, cpus))
    asked = choose(tmp_path, cpus=cpus, workers={"cpus": cpus})
    assert auto.worker.cpus + 2 * auto.io_actor.cpus < 1.0
    assert 0 < asked.worker.cpus < cpus
    assert asked.worker.cpus + 2 * asked.io_actor.cpus < max(1, cpus)
    assert (auto.threads, asked.threads) == (None, max(1, int(cpus)))


@pytest.mark.parametrize(
    ("cluster", "workers", "wanted"),
    [
        ({}, {}, (1, 1, 0)),
        ({"nodes": 3, "can_grow": True}, {}, (1, 3, 0)),
        ({"gpus": 8}, {}, (1, 8, 1)),
        ({"gpus": 8}, {"gpus": 0.5}, (1, 16, 0.5)),
        ({"gpus": 8}, {"gpus": 0.4}, (1, 16, 0.4)),
        ({"gpus": 8}, {"max": 3}, (1, 3, 1)),
        ({"gpus": 8}, {"gpus": 0}, (1, 1, 0)),
        ({}, {"min": 2}, (2, 2, 0)),  # two on one node, where the spec says so
        ({}, {"min": 3, "max": 4, "cpus": 0.5}, (3, 4, 0)),
        ({"gpus": 8, "of": plan(10, 10)}, {}, (1, 2, 1)),
        ({"can_grow": True}, {"min": 4, "gpus": 1}, (4, 4, 1)),
        ({"gpus": 8}, {"gpus": 2}, (1, 4, 2)),
        ({"gpus": 8}, {"gpus": 8}, (1, 1, 8)),
        ({"nodes": 2, "gpus": 6}, {"gpus": 2}, (1, 2, 2)),  # of a node's three GPUs one is left over
        ({"nodes": 2, "gpus": 2, "can_grow": True}, {"gpus": 2}, (1, 1, 2)),
    ],
)
def test_workers_follow_the_cluster_and_the_spec(
    tmp_path: Path, cluster: dict[str, Any], workers: dict[str, Any], wanted: tuple[int, int, float]
) -> None:
    resources = choose(tmp_path, **cluster, workers=workers, engine={"kv_cache_memory": 1 << 20})
    assert (resources.min_workers, resources.max_workers, resources.worker.gpus) == wanted


@pytest.mark.parametrize(
    ("gpus", "workers", "wanted"),
    [(8, {}, (4, 2)), (0, {}, (1, 0)), (0, {"accelerator": "A100"}, (1, 2)), (8, {"gpus": 0}, (1, 0))],
)
def test_a_worker_has_a_gpu_for_each_rank(
    tmp_path: Path, gpus: int, workers: dict[str, Any], wanted: tuple[int, float]
) -> None:
    found = choose(tmp_path, gpus=gpus, workers=workers, engine={"tensor_parallel": 2}, can_grow=True)
    assert (found.max_workers, found.worker.gpus) == wanted


def test_what_a_machine_does_not_have_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"workers.gpus: 2 x 1 are requested; this machine has 1"):
        choose(tmp_path, gpus=1, workers={"min": 2})
    with pytest.raises(SpecError, match=r"workers.gpus: 1 x 2 are requested, one for each rank; this machine has 1"):
        choose(tmp_path, gpus=1, engine={"tensor_parallel": 2})
    with pytest.raises(SpecError, match=r"workers.cpus: 1 x 4 are requested; Ray has 2 here"):
        choose(tmp_path, workers={"cpus": 4})
    with pytest.raises(SpecError, match=r"workers.cpus: 3 x 1 are requested; Ray has 2 here"):
        choose(tmp_path, workers={"min": 3})


@pytest.mark.parametrize(
    ("rows", "seqs", "n", "calls"),
    [(16, 64, 1, 8), (1000, 64, 1, 2), (16, "auto", 1, 8), (1, 8, 1, 16), (16, 64, 4, 2)],
)
def test_a_small_jobs_calls_fill_the_engine_twice(tmp_path: Path, rows: int, seqs: Any, n: int, calls: int) -> None:
    resources = choose(tmp_path, of=plan(rows, rows), engine={"max_num_seqs": seqs}, sampling={"n": n})
    assert resources.max_shards_per_worker == calls


@pytest.mark.parametrize(
    ("shards", "rows", "workers", "calls"),
    [
        (16, 16, 1, 8),
        (64, 16, 1, 32),
        (1000, 16, 1, 64),
        (1000, 1000, 1, 16),
        (64, 16, 2, 16),
        (64, 16, 4, 8),
        (10000, 16, 64, 64),
    ],
)
def test_in_a_large_job_shards_may_wait_for_their_last_row(shards: int, rows: int, workers: int, calls: int) -> None:
    assert shards_per_worker(shards, rows, 64, workers) == calls
