"""How the stages share a cluster's CPUs and GPUs. Pure. To Ray a CPU is a ticket, not a thread: see Resources."""

from collections.abc import Sequence
from dataclasses import dataclass

from batch.placement.nodes import Node, Placement, explain_absence
from batch.planning.plan import Plan
from batch.spec import JobSpec
from engine.errors import Problem, SpecError
from engine.limits import DEFAULTS

SIDE_CPUS = 0.2  # of one actor of prepare or commit; with half a CPU for a worker, all fit in one CPU
MAX_SIDE_ACTORS = 8
LINGERING = 8  # times what fills an engine: shards that may be in a worker, most of them for a last long row


@dataclass(frozen=True)
class Resources:
    """What to ask Ray for.

    worker, side:  of a worker: tickets, since its threads are a matter of its own; of an actor of prepare or commit
    threads:       torch's in a worker; None = as many as there are cores
    calls:         shards that a worker holds at once: what fills the engine twice and, where the job has many, more,
                   so that those that wait for a last long row do not leave it empty
    side_actors:   most actors of prepare, and of commit
    """

    min_workers: int
    max_workers: int
    worker: Placement
    side: Placement
    threads: int | None
    calls: int
    side_actors: int


def choose_resources(spec: JobSpec, plan: Plan, nodes: Sequence[Node], *, can_grow: bool) -> Resources:
    """
    nodes:     that the cluster has now
    can_grow:  it may get more; else SpecError is raised for what it does not have
    """
    workers = spec.workers
    wanted = Placement(0.0, 0.0, workers.accelerator, workers.labels)
    suitable = [node for node in nodes if wanted.fits(node)]
    cpus, gpus = (sum(node.resources.get(name, 0.0) for node in suitable) for name in ("CPU", "GPU"))
    auto_gpus = 1.0 if workers.accelerator is not None else min(1.0, gpus)
    gpus_each = auto_gpus if workers.gpus == "auto" else workers.gpus
    cpus_each = 1.0 if workers.cpus == "auto" else workers.cpus
    worker = Placement(max(cpus_each - 0.5, cpus_each / 2), gpus_each, workers.accelerator, workers.labels)
    problems = []
    if not can_grow and not suitable:
        key = "workers.labels" if workers.accelerator is None else "workers.accelerator"
        problems.append(Problem(key, explain_absence(worker, nodes)))
    elif not can_grow and workers.min * gpus_each > gpus:
        asked = f"{workers.min} x {gpus_each:g} are asked for"
        problems.append(Problem("workers.gpus", f"{asked}; this machine has {gpus:g}"))
    elif not can_grow and workers.min * cpus_each > max(1.0, cpus):
        problems.append(Problem("workers.cpus", f"{workers.min} x {cpus_each:g} are asked for; Ray has {cpus:g} here"))
    if problems:
        raise SpecError(problems)
    fitting = int(gpus) * int(1 / gpus_each + 1e-9) if gpus_each else len(suitable)
    max_workers = max(workers.min, fitting) if workers.max == "auto" else workers.max
    max_workers = max(workers.min, min(max_workers, len(plan.shards)))
    return Resources(
        min_workers=workers.min,
        max_workers=max_workers,
        worker=worker,
        side=Placement(SIDE_CPUS, labels=workers.io_labels),
        threads=None if workers.cpus == "auto" else max(1, int(workers.cpus)),
        calls=_calls(spec, plan, "cuda" if gpus_each else "cpu", max_workers),
        side_actors=min(max_workers, MAX_SIDE_ACTORS),
    )


def _calls(spec: JobSpec, plan: Plan, device: str, max_workers: int) -> int:
    seqs = DEFAULTS[device].max_num_seqs if spec.engine.max_num_seqs == "auto" else spec.engine.max_num_seqs
    shard_seqs = max((shard.num_rows for shard in plan.shards), default=1) * spec.sampling.n
    return most_calls(len(plan.shards), shard_seqs, seqs, max_workers)


def most_calls(num_shards: int, shard_seqs: int, max_num_seqs: int, max_workers: int) -> int:
    """Shards that a worker holds at once. shard_seqs: samples of the largest shard"""
    filling = max(2, -(-2 * max_num_seqs // shard_seqs))
    half_a_share = num_shards // (2 * max_workers)  # what one worker holds no other can take over
    return max(filling, min(LINGERING * filling, half_a_share))
