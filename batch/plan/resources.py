"""Choose how the stages share a cluster's CPUs and GPUs. Pure. CPUs are Ray's logical CPUs, not threads."""

from collections.abc import Sequence
from dataclasses import dataclass

from moray.batch.plan.nodes import Node, Placement, explain_unschedulable
from moray.batch.shards import Plan
from moray.batch.spec import JobSpec
from moray.engine.core.step_limits import DEFAULTS
from moray.engine.errors import Problem, SpecError

IO_ACTOR_CPUS = 0.2  # logical CPUs of one actor of prepare or commit; with a worker's half, all three fit in one CPU
MAX_IO_ACTORS = 8  # of prepare, and of commit
# Shards that a worker may hold, as a multiple of what fills its engine: most of them only wait for a last long row.
SHARD_OVERSUBSCRIPTION = 8


@dataclass(frozen=True)
class Resources:
    """Describes what a job asks of Ray.

    worker:                 what one worker asks for; its CPUs are logical and do not limit its threads
    io_actor:               what one actor of prepare or commit asks for
    threads:                torch's threads in a worker; None = as many as there are cores
    max_shards_per_worker:  shards that a worker holds at once: what fills the engine twice and, where the job has many,
                            more, so that shards that wait for a last long row do not leave the engine empty
    max_io_actors:          most actors of prepare, and of commit
    """

    min_workers: int
    max_workers: int
    worker: Placement
    io_actor: Placement
    threads: int | None
    max_shards_per_worker: int
    max_io_actors: int


def choose_resources(spec: JobSpec, plan: Plan, nodes: Sequence[Node], *, can_grow: bool) -> Resources:
    """Choose the number of workers and the resources of each stage's actors.

    nodes:     nodes that the cluster has now
    can_grow:  an autoscaler may add nodes

    Raises SpecError for what the nodes do not have and cannot get.
    """
    workers = spec.workers
    constraints = Placement(0.0, 0.0, workers.accelerator, workers.labels)
    suitable = [node for node in nodes if constraints.fits(node)]
    cpus, gpus = (sum(node.resources.get(name, 0.0) for node in suitable) for name in ("CPU", "GPU"))
    gpus_each = spec.gpus_per_worker(has_gpus=gpus > 0)
    cpus_each = 1.0 if workers.cpus == "auto" else workers.cpus
    worker = Placement(max(cpus_each - 0.5, cpus_each / 2), gpus_each, workers.accelerator, workers.labels)
    num_fitting = sum(map(worker.num_by_gpus, suitable)) if gpus_each else len(suitable)
    problems = []
    if not can_grow and not suitable:
        key = "workers.labels" if workers.accelerator is None else "workers.accelerator"
        problems.append(Problem(key, explain_unschedulable(worker, nodes)))
    elif not can_grow and gpus_each and workers.min > num_fitting:
        requested = f"{workers.min} x {gpus_each:g} are requested{', one for each rank' if gpus_each > 1 else ''}"
        problems.append(Problem("workers.gpus", f"{requested}; this machine has {gpus:g}"))
    elif not can_grow and workers.min * cpus_each > max(1.0, cpus):
        problems.append(Problem("workers.cpus", f"{workers.min} x {cpus_each:g} are requested; Ray has {cpus:g} here"))
    if problems:
        raise SpecError(problems)
    max_workers = max(workers.min, num_fitting) if workers.max == "auto" else workers.max
    max_workers = max(workers.min, min(max_workers, len(plan.shards)))
    return Resources(
        min_workers=workers.min,
        max_workers=max_workers,
        worker=worker,
        io_actor=Placement(IO_ACTOR_CPUS, labels=workers.io_labels),
        threads=None if workers.cpus == "auto" else max(1, int(workers.cpus)),
        max_shards_per_worker=_shards_per_worker(spec, plan, "cuda" if gpus_each else "cpu", max_workers),
        max_io_actors=min(max_workers, MAX_IO_ACTORS),
    )


def _shards_per_worker(spec: JobSpec, plan: Plan, device: str, max_workers: int) -> int:
    seqs = DEFAULTS[device].max_num_seqs if spec.engine.max_num_seqs == "auto" else spec.engine.max_num_seqs
    shard_seqs = max((shard.num_rows for shard in plan.shards), default=1) * spec.sampling.n
    return shards_per_worker(len(plan.shards), shard_seqs, seqs, max_workers)


def shards_per_worker(num_shards: int, shard_seqs: int, max_num_seqs: int, max_workers: int) -> int:
    """Return how many shards a worker holds at once, at most.

    shard_seqs: samples of the largest shard
    """
    filling = max(2, -(-2 * max_num_seqs // shard_seqs))
    half_a_share = num_shards // (2 * max_workers)  # a shard that one worker holds cannot move to another
    return max(filling, min(SHARD_OVERSUBSCRIPTION * filling, half_a_share))
