"""The job as a Ray Data pipeline: shards -> prepare -> worker -> commit, with one block per shard all the way."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext

from moray.batch.ledger import Committed, Counts
from moray.batch.plan.gpus import check_gpus
from moray.batch.plan.planner import PlannedJob
from moray.batch.plan.resources import Resources, choose_resources
from moray.batch.runtime.actors import CommitActor, PrepareActor
from moray.batch.runtime.cluster_nodes import cluster_nodes
from moray.batch.runtime.ray_internals import iter_blocks, map_blocks, silence_data_logs
from moray.batch.runtime.stage_config import StageConfig
from moray.batch.runtime.worker_actor import WorkerActor
from moray.batch.shards import Plan, Shard
from moray.batch.stages.shard_item import ShardItem

IO_TASKS_IN_FLIGHT = 4  # per actor; with Ray's default of 2 it waits for the driver where a shard takes milliseconds


def choose_for_cluster(job: PlannedJob, *, can_grow: bool) -> Resources:
    """Return the resources of the job's actors on the present cluster.

    Raises SpecError; see choose_resources and check_gpus.
    """
    nodes = cluster_nodes()
    resources = choose_resources(job.spec, job.plan, nodes, can_grow=can_grow)
    if resources.worker.gpus:
        models = {node.gpu_model for node in nodes if resources.worker.fits(node)}
        check_gpus(job.spec, job.config, job.model_info, models)
    return resources


def run_pipeline(
    stage_config: StageConfig, plan: Plan, shards: Sequence[Shard], resources: Resources
) -> Iterator[Committed]:
    """Run the shards; yield each one when its part is published, in the order of publication."""
    _configure()
    items = [ShardItem.from_plan(shard, plan).to_row() for shard in shards]
    io_pool = ActorPoolStrategy(
        min_size=1, max_size=resources.max_io_actors, max_tasks_in_flight_per_actor=IO_TASKS_IN_FLIGHT
    )
    worker_pool = ActorPoolStrategy(
        min_size=resources.min_workers,
        max_size=resources.max_workers,
        max_concurrent_calls_per_actor=resources.max_shards_per_worker,
        max_tasks_in_flight_per_actor=resources.max_shards_per_worker + 1,
        enable_true_multi_threading=True,
    )
    stages = (
        (PrepareActor, resources.io_actor, io_pool),
        (WorkerActor, resources.worker, worker_pool),
        (CommitActor, resources.io_actor, io_pool),
    )
    dataset: Any = ray.data.from_items(items, override_num_blocks=len(items))
    for actor_class, placement, pool in stages:
        dataset = map_blocks(dataset, actor_class, stage_config, compute=pool, **placement.ray_options())
    silence_data_logs()
    for block in iter_blocks(dataset):
        for row in block.to_pylist():
            yield Committed(row["shard"], Counts(**json.loads(row["counts"])))


def _configure() -> None:
    """Configure Ray Data for this pipeline.

    A shard stays one block, only the spec's limits end the job, workers are started in time, and Ray Data prints
    nothing.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # otherwise each call of a stage starts a thread
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    # Ray's default of 1.75 was never reached, and no second worker started: one shard waits at a worker, not as many as
    # it can run at once.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
