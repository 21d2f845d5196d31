"""How the stages share a cluster's CPUs and GPUs. Pure. To Ray a CPU is a ticket, not a thread: see Resources."""

from dataclasses import dataclass

from batch.plan import Plan
from batch.spec import JobSpec
from engine.errors import Problem, SpecError
from engine.limits import DEFAULTS

SIDE_CPUS = 0.2  # of one actor of prepare or commit; with half a CPU for a worker, all fit in one CPU
MAX_SIDE_ACTORS = 8


@dataclass(frozen=True)
class Resources:
    """What to ask Ray for.

    cpus:         tickets of a worker; its threads are a matter of its own
    threads:      torch's in a worker; None = as many as there are cores
    calls:        shards that are in a worker at once: twice what fills the engine, so that a shard's last rows do not
                  leave it empty
    side_actors:  most actors of prepare, and of commit
    """

    min_workers: int
    max_workers: int
    gpus: int
    cpus: float
    threads: int | None
    calls: int
    side_actors: int


def choose_resources(spec: JobSpec, plan: Plan, nodes: int, cpus: float, gpus: int, *, can_grow: bool) -> Resources:
    """
    nodes, cpus, gpus:  what the cluster has now
    can_grow:           it may get more; else SpecError is raised for what it does not have
    """
    workers = spec.workers
    gpus_each = min(1, gpus) if workers.gpus == "auto" else workers.gpus
    cpus_each = 1.0 if workers.cpus == "auto" else workers.cpus
    problems = []
    if not can_grow and workers.min * gpus_each > gpus:
        problems.append(Problem("workers.gpus", f"{workers.min} x {gpus_each} are asked for; this machine has {gpus}"))
    if not can_grow and workers.min * cpus_each > max(1.0, cpus):
        problems.append(Problem("workers.cpus", f"{workers.min} x {cpus_each:g} are asked for; Ray has {cpus:g} here"))
    if problems:
        raise SpecError(problems)
    fitting = gpus // gpus_each if gpus_each else nodes
    max_workers = max(workers.min, fitting) if workers.max == "auto" else workers.max
    max_workers = max(workers.min, min(max_workers, len(plan.shards)))
    return Resources(
        min_workers=workers.min,
        max_workers=max_workers,
        gpus=gpus_each,
        cpus=max(cpus_each - 0.5, cpus_each / 2),
        threads=None if workers.cpus == "auto" else max(1, int(workers.cpus)),
        calls=_calls(spec, plan, "cuda" if gpus_each else "cpu"),
        side_actors=min(max_workers, MAX_SIDE_ACTORS),
    )


def _calls(spec: JobSpec, plan: Plan, device: str) -> int:
    seqs = DEFAULTS[device].max_num_seqs if spec.engine.max_num_seqs == "auto" else spec.engine.max_num_seqs
    shard_seqs = max((shard.num_rows for shard in plan.shards), default=1) * spec.sampling.n
    return max(2, -(-2 * seqs // shard_seqs))
