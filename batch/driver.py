"""run_job and retry_job: what is not done of a job, or has failed, is planned and run."""

from collections.abc import Collection

from batch.ledger import Ledger
from batch.output.folder import OutputFolder
from batch.output.job_folder import check_folder
from batch.output.part import find_committed
from batch.planning.planner import plan_job
from batch.quantities import count
from batch.retry import find_failed
from batch.run import JobResult, Run
from batch.spec import JobSpec
from batch.watch.audience import Display
from engine.errors import OutputError


def run_job(
    spec: JobSpec, *, address: str | None = None, display: Display | None = None, price: float | None = None
) -> JobResult:
    """Run a job to its end, or from where its last run left it.

    address:  of a Ray cluster; None runs on this machine
    price:    for the forecast: USD for an hour of a card, or of a worker where there are none

    Raises UserError where the spec, the input, the model or the output folder is wrong; a job that fails otherwise has
    a result that says so.
    """
    job = plan_job(spec)
    folder = OutputFolder(spec.output.path)
    check_folder(folder, job.plan)
    shards = [shard.num_rows for shard in job.plan.shards]
    ledger = Ledger(shards, find_committed(folder, job.plan), spec.limits.max_failed(sum(shards)))
    return Run(job, folder, ledger, display, price=price).run(address)


def retry_job(
    spec: JobSpec, codes: Collection[str] = (), *, address: str | None = None, display: Display | None = None
) -> JobResult:
    """Run the failed rows of a finished job again, those with one of the codes where some are given. Each part that
    holds some is replaced, whole.

    Raises UserError as run_job does, and where the job is not finished.
    """
    job = plan_job(spec)
    folder = OutputFolder(spec.output.path)
    check_folder(folder, job.plan)
    shards = [shard.num_rows for shard in job.plan.shards]
    committed = find_committed(folder, job.plan)
    pending = sum(rows for shard, rows in enumerate(shards) if shard not in committed)
    if pending:
        raise OutputError(
            f"{folder.path}: {count(pending, 'row')} not done yet; retry is for jobs that are. Run it first."
        )
    again = find_failed(folder, job.plan, committed, codes)
    others = {shard: counts for shard, counts in committed.items() if shard not in again}
    ledger = Ledger(shards, others, spec.limits.max_failed(sum(shards)), stops_at_limit=False)
    return Run(job, folder, ledger, display, again).run(address)
