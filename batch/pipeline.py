"""The job as a Ray Data pipeline: shards -> prepare -> Worker -> commit, one shard one block all the way."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from batch.ledger import Committed, Counts
from batch.placement.cards import check_cards
from batch.placement.nodes import Node
from batch.placement.resources import Resources, choose_resources
from batch.planning.plan import Plan, Shard
from batch.planning.planner import PlannedJob
from batch.stages.side import CommitStage, PrepareStage, Setup, pack
from batch.stages.worker import Worker

SIDE_TASKS_IN_FLIGHT = 4  # of an actor: with Ray's own 2 it waits for the driver where a shard takes milliseconds


def cluster_nodes() -> list[Node]:
    """Those of the cluster that this process is connected to."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node.get("Labels") or {}) for node in nodes if node["Alive"]]


def choose_for_cluster(job: PlannedJob, *, can_grow: bool) -> Resources:
    """Raises SpecError: see choose_resources and check_cards."""
    nodes = cluster_nodes()
    resources = choose_resources(job.spec, job.plan, nodes, can_grow=can_grow)
    if resources.worker.gpus:
        cards = {node.card for node in nodes if resources.worker.fits(node)}
        check_cards(job.spec, job.facts, cards, resources.worker.gpus)
    return resources


def run_pipeline(setup: Setup, plan: Plan, shards: Sequence[Shard], resources: Resources) -> Iterator[Committed]:
    """Run the shards; yields each when its part is published, in the order in which they are."""
    _configure()
    items = [{"item": pack(shard, plan)} for shard in shards]
    side = ActorPoolStrategy(
        min_size=1, max_size=resources.side_actors, max_tasks_in_flight_per_actor=SIDE_TASKS_IN_FLIGHT
    )
    pool = ActorPoolStrategy(
        min_size=resources.min_workers,
        max_size=resources.max_workers,
        max_concurrent_calls_per_actor=resources.calls,
        max_tasks_in_flight_per_actor=resources.calls + 1,
        enable_true_multi_threading=True,
    )
    config = replace(
        setup.spec.engine_config(), num_threads=resources.threads, device="auto" if resources.worker.gpus else "cpu"
    )
    worker_args = (setup.model_path, config, setup.spec.limits.row_timeout_s, setup.monitor)
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    beside = resources.side.ray_options() | whole
    prepared = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PrepareStage, fn_constructor_args=(setup,), compute=side, **beside
    )
    # map_batches, which only calls this, asks for a batch size wherever GPUs are; a shard is one block and one call.
    generated = prepared.map_batches_internal(
        Worker, fn_constructor_args=worker_args, compute=pool, **resources.worker.ray_options(), **whole
    )
    records = generated.map_batches(CommitStage, fn_constructor_args=(setup,), compute=side, **beside)
    _hush()
    for bundle in records.iter_internal_ref_bundles():  # iter_rows prefetches and counts, a fifth of the driver's time
        for entry in bundle.blocks:
            for row in ray.get(entry.ref).to_pylist():
                yield Committed(row["shard"], Counts(**json.loads(row["counts"])))


def _configure() -> None:
    """Keep a shard one block, let nothing but the spec end the job, start workers in time, and keep quiet."""
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # else each call of a stage starts a thread
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    # Ray's own is 1.75, which was never reached, and no second worker started: one shard waits at a worker, not as many
    # as it has places.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0


def _hush() -> None:
    """Ray Data logs to the terminal what its log files have too."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.CRITICAL + 1)
